"""Index entries in 8 bits: over hours nearly all of the index is these.

Each number of an entry becomes one of 256 steps between the least and the greatest of its channel in a volume of sorted pages, in
each layer and KV head. It becomes so once, when its volume has been sorted, and is never rounded again: whatever is sorted later
moves codes about.
"""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed.room import room_for, zeros

_STEPS = 255


class Codes:
    """Codes of consecutive volumes, from the oldest one that is held on.

    Each layer has arrays of its own, which grow when the layer is sorted: no step copies all of them, and the old and the new
    ones never lie in memory together.

    Attributes:
        volume: pages in one.
    """

    def __init__(self, layout: KVLayout, width: int, volume: int):
        """width: numbers in an entry."""
        self.volume = volume
        self._layout, self._width = layout, width
        self._from = self._to = 0               # volumes that are coded in all layers
        self._first = 0                         # number of the oldest page held
        self._bases = [0] * layout.layers       # volume at the front of the arrays
        self._codes, self._ranges = ([part] * layout.layers for part in self._empty(0))

    @property
    def stop(self) -> int:
        """Pages before this one have codes, and nothing else; all from `first` on, where some that are older have none."""
        return self._to * self.volume if self._first >= self._from * self.volume else 0

    @property
    def bytes(self) -> int:
        """Bytes of all codes and ranges, those not in use included."""
        return sum(part.nbytes for part in (*self._codes, *self._ranges))

    @property
    def page_bytes(self) -> int:
        """Bytes for each page, rounded up."""
        ranges = 2 * torch.float32.itemsize * self._width
        return self._layout.layers * self._layout.kv_heads * (self._width - (-ranges // self.volume))

    def put(self, layer: int, heads: slice, volume: int, entries: torch.Tensor) -> None:
        """Make codes of a volume in some KV heads of a layer; they count once `finish` was called.

        Args:
            entries: [kv_heads, pages, width] fp32, as they lie.
        """
        if volume - self._bases[layer] >= self._ranges[layer].shape[1]:
            self._grow(layer, volume)
        at = volume - self._bases[layer]
        least, most = entries.aminmax(dim=1, keepdim=True)
        step = (most - least) / _STEPS
        codes = (entries - least).div_(step.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(0, _STEPS)
        self._codes[layer][heads, at * self.volume:(at + 1) * self.volume] = codes
        self._ranges[layer][heads, at] = torch.cat([least, step], dim=1)

    def finish(self, volume: int) -> None:
        """All layers and KV heads of a volume are coded."""
        if volume != self._to:      # one between lost pages before it was sorted
            self._from = volume
        self._to = volume + 1

    def forget(self, first: int) -> None:
        """Pages before this one are not held any more."""
        self._first = first

    def lying(self, layer: int, pages: slice) -> torch.Tensor:
        """Codes at the places of pages, where they lie, [kv_heads, pages, width] uint8."""
        begin = self._bases[layer] * self.volume
        return self._codes[layer][:, pages.start - begin:pages.stop - begin]

    def entries(self, layer: int, pages: slice) -> torch.Tensor:
        """What codes at the places of pages of one volume stand for, [kv_heads, pages, width] fp32."""
        least, step = self._ranges[layer][:, pages.start // self.volume - self._bases[layer]].unbind(1)
        return self.lying(layer, pages).float().mul_(step[:, None]).add_(least[:, None])

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Codes [kv_heads, pages, width] uint8 and ranges [kv_heads, volumes, 2, width] fp32, which are least numbers and steps,
        and the place of the first code."""
        return self._codes[layer], self._ranges[layer], self._bases[layer] * self.volume

    def place(self) -> tuple[int, ...]:
        """Where codes lie: the same as long as none is found elsewhere."""
        return (self.stop, *self._bases, *(part.data_ptr() for part in (*self._codes, *self._ranges)))

    def of_heads(self, layout: KVLayout, heads: slice) -> 'Codes':
        """The same of some KV heads, for reading."""
        part = Codes(layout, self._width, self.volume)
        part._from, part._to, part._first, part._bases = self._from, self._to, self._first, list(self._bases)
        part._codes, part._ranges = ([each[heads] for each in parts] for parts in (self._codes, self._ranges))
        return part

    def _empty(self, volumes: int) -> tuple[torch.Tensor, torch.Tensor]:
        layout, width = self._layout, self._width
        return (zeros(layout.kv_heads, volumes * self.volume, width, dtype=torch.uint8, device=layout.device),
                zeros(layout.kv_heads, volumes, 2, width, dtype=torch.float32, device=layout.device))

    def _grow(self, layer: int, volume: int) -> None:
        """Make room for a volume, without those that are not held any more."""
        base = min(self._first // self.volume, volume)
        begin, held = base - self._bases[layer], volume - base
        codes, ranges = self._empty(1 + room_for(held))
        kept = self._codes[layer][:, begin * self.volume:][:, :held * self.volume], self._ranges[layer][:, begin:][:, :held]
        codes[:, :kept[0].shape[1]], ranges[:, :kept[1].shape[1]] = kept
        self._codes[layer], self._ranges[layer], self._bases[layer] = codes, ranges, base
