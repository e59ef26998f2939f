"""Where pages from below the device lie while they are read: slots of rows per layer, in which what was read last stays."""
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.backbones.upload import to_device
from statekv_ros.kernels.paged_attention import PackedPool
from statekv_ros.memory.detailed.blobs import SCALES
from statekv_ros.memory.detailed.formats import Format


class Staging:
    """A page of a layer, with all its KV heads, takes one slot. Which pages those are differs from layer to layer.

    Attributes:
        slots: pages that each layer has room for.
        page_tokens: tokens of the longest page that fits.
        positions: where the keys of each row stand, [layers, axes, rows] int32; visual: whether it is a visual token,
            [layers, rows] bool.
    """

    def __init__(self, layout: KVLayout, form: Format, axes: int, page_tokens: int, max_bytes: int):
        """As many slots as `max_bytes` allow, and one at least."""
        self.page_tokens, self._layout, self._form = page_tokens, layout, form
        size = _slot_bytes(layout, form, axes, page_tokens)
        self.slots = max(1, max_bytes // size)
        self.bytes = self.slots * size
        rows = self.slots * page_tokens
        # Keys and values, and below them scale and zero of each, in one tensor: a page is then written at once.
        width, dtype = (layout.head_dim, layout.dtype) if form.rotated else (layout.head_dim * form.bits // 8, torch.uint8)
        self._numbers = torch.zeros(layout.layers, 2, layout.kv_heads, rows, width, dtype=dtype, device=layout.device)
        self._scales = None if form.rotated else torch.zeros(
            layout.layers, SCALES, layout.kv_heads, self.slots, layout.head_dim, dtype=torch.float16, device=layout.device)
        self.positions = torch.zeros(layout.layers, axes, rows, dtype=torch.int32, device=layout.device)
        self.visual = torch.zeros(layout.layers, rows, dtype=torch.bool, device=layout.device)
        self._slot_of: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(layout.layers)]     # the last read is last

    def slot_of(self, layer: int) -> OrderedDict[int, int]:
        """Slots of the pages that a layer has, by their numbers."""
        return self._slot_of[layer]

    def missing(self, layer: int, wanted: Sequence[int]) -> list[int]:
        """Those of the pages that a layer does not have; the others count as read now."""
        held = self._slot_of[layer]
        for page in wanted:
            if page in held:
                held.move_to_end(page)
        return [page for page in wanted if page not in held]

    def place(self, layer: int, missing: Sequence[int]) -> list[int]:
        """Slots for pages to `fill`; what was read longest ago makes way."""
        held, slots = self._slot_of[layer], []
        for page in missing:
            slots.append(len(held) if len(held) < self.slots else held.popitem(last=False)[1])
            held[page] = slots[-1]
        return slots

    def fill(self, layer: int, slots: Sequence[int], given: Sequence[torch.Tensor], positions: torch.Tensor,
             visual: torch.Tensor) -> None:
        """Write pages; what a page has behind its own tokens may be anything.

        Args:
            given: keys, rotated, and values [pages, 2, kv_heads, tokens, head_dim]; of few bits, codes of keys and of values
                [pages, 2, kv_heads, tokens, bytes], and scale and zero of each [pages, 4, kv_heads, head_dim] fp16.
            positions: [pages, axes, tokens] int32, visual: [pages, tokens] bool; on the host.
        """
        device = self._layout.device
        numbers, *scales = (to_device(_in_words(part), device) for part in given)
        at = np.array(slots, np.int64)
        rows = (at[:, None] * self.page_tokens + np.arange(visual.shape[1])).ravel()
        at, rows = (to_device(torch.from_numpy(part), device) for part in (at, rows))
        if scales:
            _in_words(self._scales[layer]).index_copy_(2, at, scales[0].permute(1, 2, 0, 3))
        _in_words(self._numbers[layer]).index_copy_(2, rows, numbers.permute(1, 2, 0, 3, 4).flatten(2, 3))
        self.positions[layer].index_copy_(1, rows, to_device(positions.transpose(0, 1).flatten(1), device))
        self.visual[layer].index_copy_(0, rows, to_device(visual.flatten(), device))

    def raw(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer [kv_heads, rows, head_dim], where the format is not of few bits."""
        return self._numbers[layer].unbind(0)

    def packed(self, layer: int) -> PackedPool:
        """One layer where the format is of few bits."""
        return PackedPool(*self._numbers[layer].unbind(0), *self._scales[layer].unbind(0), self._form.bits)


def _in_words(numbers: torch.Tensor) -> torch.Tensor:
    """The same bytes as fewer numbers where these are wide enough: a CPU copies one after the other."""
    return numbers.view(torch.int64) if numbers.shape[-1] * numbers.itemsize % 8 == 0 else numbers


def _slot_bytes(layout: KVLayout, form: Format, axes: int, tokens: int) -> int:
    """Bytes of a slot in all layers."""
    place = layout.layers * tokens * (axes * torch.int32.itemsize + torch.bool.itemsize)
    if form.rotated:
        return tokens * layout.bytes_per_token + place
    numbers = layout.layers * layout.kv_heads * layout.head_dim
    return numbers * (2 * tokens * form.bits // 8 + SCALES * torch.float16.itemsize) + place
