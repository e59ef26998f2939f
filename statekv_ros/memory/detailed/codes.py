"""Index entries in 4 bits: over hours nearly all of the index is these.

Once a volume of pages has been sorted, what is left to tell of a page is by how much it differs from its leaf: of each number one
of 16 levels around the leaf's, whose distances go by how much its channel differs in the volume, and by how much the leaf's pages
do. Pages that differ more than others are strays, and have exact entries of their own (`Leaves`).
"""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.kernels.page_votes.candidates import MIDDLE
from statekv_ros.memory.detailed.room import room_for, zeros

_LEVELS = 16


class Codes:
    """Codes of consecutive volumes, from the oldest one that is held on.

    Each layer has arrays of its own, which grow when the layer is sorted: no step copies all of them, and the old and the new
    ones never lie in memory together.

    Attributes:
        volume: pages in one.
        leaf: pages in one.
    """

    def __init__(self, layout: KVLayout, width: int, volume: int, leaf: int):
        """width: numbers in an entry."""
        self.volume, self.leaf = volume, leaf
        self._layout, self._width = layout, width
        self._from = self._to = 0               # volumes that are coded in all layers
        self._first = 0                         # number of the oldest page held
        self._bases = [0] * layout.layers       # volume at the front of the arrays
        self._codes, self._steps, self._scales = ([part] * layout.layers for part in self._empty(0))

    @property
    def stop(self) -> int:
        """Pages before this one have codes, and nothing else; all from `first` on, where some that are older have none."""
        return self._to * self.volume if self._first >= self._from * self.volume else 0

    @property
    def bytes(self) -> int:
        """Bytes of all codes and what they are in, those not in use included."""
        return sum(part.nbytes for part in (*self._codes, *self._steps, *self._scales))

    @property
    def page_bytes(self) -> int:
        """Bytes for each page, rounded up."""
        volume = torch.float32.itemsize * (self._width + self.volume // self.leaf)
        return self._layout.layers * self._layout.kv_heads * (self._code_width - (-volume // self.volume))

    def put(self, layer: int, heads: slice, volume: int, differences: torch.Tensor, strays: torch.Tensor) -> None:
        """Make codes of a volume in some KV heads of a layer; they count once `finish` was called.

        Args:
            differences: of entries from those of their leaves, as they lie, [kv_heads, leaves, pages of a leaf, width] fp32.
            strays: which of the pages are, [kv_heads, leaves, pages of a leaf] bool: what their codes say means nothing.
        """
        if volume - self._bases[layer] >= self._steps[layer].shape[1]:
            self._grow(layer, volume)
        at = volume - self._bases[layer]
        of_others = differences.masked_fill(strays[..., None], 0)
        others = (~strays).sum(dim=(1, 2)).clamp_min(1)
        step = (of_others.square().sum(dim=(1, 2)) / others[:, None]).sqrt_()
        self._steps[layer][heads, at] = step
        step = step[:, None, None]
        # What is furthest from its leaf has the first or the last level; what never differs has no step.
        scale = (of_others.abs() / step).nan_to_num_(0).amax(dim=(2, 3)) / MIDDLE
        leaves = self.volume // self.leaf
        self._scales[layer][heads, at * leaves:(at + 1) * leaves] = scale
        levels = (differences / (step * scale[..., None, None])).nan_to_num_(0).add_(MIDDLE).round_().clamp_(0, _LEVELS - 1)
        codes = torch.nn.functional.pad(levels.to(torch.uint8), (0, levels.shape[-1] % 2)).unflatten(-1, (-1, 2))
        low, high = codes.flatten(1, 2).unbind(-1)
        self._codes[layer][heads, at * self.volume:(at + 1) * self.volume] = low | high << 4

    def finish(self, volume: int) -> None:
        """All layers and KV heads of a volume are coded."""
        if volume != self._to:      # one between lost pages before it was sorted
            self._from = volume
        self._to = volume + 1

    def forget(self, first: int) -> None:
        """Pages before this one are not held any more."""
        self._first = first

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Codes, steps, scales and the place of the first code, as `kernels.page_votes.Entries` has them."""
        return self._codes[layer], self._steps[layer], self._scales[layer], self._bases[layer] * self.volume

    def place(self) -> tuple[int, ...]:
        """Where codes lie: the same as long as none is found elsewhere."""
        return (self.stop, *self._bases, *(part.data_ptr() for part in (*self._codes, *self._steps, *self._scales)))

    def of_heads(self, layout: KVLayout, heads: slice) -> 'Codes':
        """The same of some KV heads, for reading."""
        part = Codes(layout, self._width, self.volume, self.leaf)
        part._from, part._to, part._first, part._bases = self._from, self._to, self._first, list(self._bases)
        part._codes, part._steps, part._scales = (
            [each[heads] for each in parts] for parts in (self._codes, self._steps, self._scales))
        return part

    @property
    def _code_width(self) -> int:
        """Bytes of a page's codes."""
        return -(-self._width // 2)

    def _empty(self, volumes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layout = self._layout
        return (zeros(layout.kv_heads, volumes * self.volume, self._code_width, dtype=torch.uint8, device=layout.device),
                zeros(layout.kv_heads, volumes, self._width, dtype=torch.float32, device=layout.device),
                zeros(layout.kv_heads, volumes * self.volume // self.leaf, dtype=torch.float32, device=layout.device))

    def _grow(self, layer: int, volume: int) -> None:
        """Make room for a volume, without those that are not held any more."""
        base = min(self._first // self.volume, volume)
        gone, held = base - self._bases[layer], volume - base
        new = self._empty(1 + room_for(held))
        for parts, room, of_volume in zip((self._codes, self._steps, self._scales), new,
                                          (self.volume, 1, self.volume // self.leaf)):
            kept = parts[layer][:, gone * of_volume:][:, :held * of_volume]
            room[:, :kept.shape[1]] = kept
            parts[layer] = room
        self._bases[layer] = base
