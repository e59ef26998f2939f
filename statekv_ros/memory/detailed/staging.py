"""Where pages from below the device lie while they are read: slots of rows per layer, where what is read again stays longest."""
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.backbones.upload import to_device
from statekv_ros.kernels.paged_attention import PackedPool
from statekv_ros.memory.detailed.blobs import SCALES
from statekv_ros.memory.detailed.formats import Format


class Staging:
    """A page of a layer, with all its KV heads, takes one slot. Which pages those are differs from layer to layer.

    A layer is one tensor of rows as wide as a token's in the format: keys and values of all KV heads, and below them scale and
    zero of each. So pages of any length, as tiers have them, are written at once.

    Attributes:
        slots: pages that each layer has room for.
        page_tokens: tokens of the longest page that fits.
        tokens: of each row, where its key stands and, last, whether it is a visual token, [layers, axes + 1, rows] int32.
    """

    def __init__(self, layout: KVLayout, form: Format, axes: int, page_tokens: int, max_bytes: int):
        """As many slots as `max_bytes` allow, and one at least."""
        self.page_tokens, self._layout, self._form = page_tokens, layout, form
        size = _slot_bytes(layout, form, axes, page_tokens)
        self.slots = max(1, max_bytes // size)
        self.bytes = self.slots * size
        rows = self.slots * page_tokens
        self._width = row_bytes(layout, form)
        self._in_scale = 0 if form.rotated else layout.head_dim * torch.float16.itemsize // self._width     # rows of a scale
        self._numbers_stop = 2 * layout.kv_heads * rows     # of keys and values; scales are behind them
        # Empty, for there may be gigabytes: a CPU would write all of it when the first question comes.
        self._rows = torch.empty(layout.layers, self._numbers_stop + SCALES * layout.kv_heads * self.slots * self._in_scale,
                                 self._width, dtype=torch.uint8, device=layout.device)
        self.tokens = torch.empty(layout.layers, axes + 1, rows, dtype=torch.int32, device=layout.device)
        self._slot_of: list[dict[int, int]] = [{} for _ in range(layout.layers)]
        # Pages that were read once since they are there, in earlier passes and in this one, and those that were read again; each
        # in the order in which they were read last.
        self._once, self._now, self._again = (
            [OrderedDict[int, None]() for _ in range(layout.layers)] for _ in range(3))
        self._places: dict[int, tuple[np.ndarray, np.ndarray]] = {}     # by length

    def slot_of(self, layer: int) -> dict[int, int]:
        """Slots of the pages that a layer has, by their numbers."""
        return self._slot_of[layer]

    def missing(self, layer: int, wanted: Sequence[int]) -> list[int]:
        """Those of the pages that a layer does not have, to be placed next; the others count as read now."""
        held, once, now, again = self._slot_of[layer], self._once[layer], self._now[layer], self._again[layer]
        once.update(now)
        now.clear()
        missing = []
        for page in wanted:
            if page not in held:
                missing.append(page)
            elif page in again:
                again.move_to_end(page)
            else:
                del once[page]
                again[page] = None
        return missing

    def place(self, layer: int, missing: Sequence[int]) -> list[int]:
        """Slots for pages to `fill`; what was read longest ago makes way, of those read once first: else each question displaced
        all that the one before it read, and what many of them want would be brought up for each. What the pass itself brought up
        makes way last."""
        held, once, now, again = self._slot_of[layer], self._once[layer], self._now[layer], self._again[layer]
        slots = list(range(len(held), min(self.slots, len(held) + len(missing))))
        for _ in range(len(missing) - len(slots)):
            page, _ = (once or again or now).popitem(last=False)
            slots.append(held.pop(page))
        held.update(zip(missing, slots))
        now.update(dict.fromkeys(missing))
        return slots

    def fill(self, layer: int, slots: Sequence[int], lengths: Sequence[int], data: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write pages; what is behind a page's own tokens in its slot may be anything.

        Args:
            lengths: of the pages, in rising order.
            data: bytes of the pages, one behind the other: keys, rotated, and values [kv_heads, tokens, head_dim] each; of few
                bits, as in `blobs`. On the host or the device.
            tokens: of the pages, one behind the other: what `tokens` has of each, [tokens x (axes + 1)] int32; on the host.
        """
        begin, into, tokens_into = 0, [], []
        for length, alike in groupby(lengths):
            end = begin + sum(1 for _ in alike)
            first, apart = self._placed(length)
            rows = first + np.array(slots[begin:end])[:, None] * apart
            into.append(rows.ravel())
            tokens_into.append(rows[:, :length].ravel())    # the first KV head's keys lie as the tokens do
            begin = end
        device = self._layout.device
        into, tokens_into = (to_device(torch.from_numpy(np.concatenate(part)), device) for part in (into, tokens_into))
        _in_words(self._rows[layer]).index_copy_(0, into, _in_words(to_device(data.view(-1, self._width), device)))
        self.tokens[layer].index_copy_(1, tokens_into, to_device(tokens, device).view(len(tokens_into), -1).t())

    def raw(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer [kv_heads, rows, head_dim], where the format is not of few bits."""
        return self._numbers(layer).view(self._layout.dtype).unbind(0)

    def packed(self, layer: int) -> PackedPool:
        """One layer where the format is of few bits."""
        layout = self._layout
        scales = self._rows[layer, self._numbers_stop:].flatten().view(torch.float16)
        scales = scales.view(SCALES, layout.kv_heads, self.slots, layout.head_dim)
        return PackedPool(*self._numbers(layer).unbind(0), *scales.unbind(0), self._form.bits)

    def _numbers(self, layer: int) -> torch.Tensor:
        return self._rows[layer, :self._numbers_stop].view(2, self._layout.kv_heads, -1, self._width)

    def _placed(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of a page of so many tokens lie in the first slot, and how much further on they lie in the next."""
        if length not in self._places:
            heads, per_scale = self._layout.kv_heads, self.slots * self._in_scale
            token = (np.arange(2 * heads)[:, None] * (self.slots * self.page_tokens) + np.arange(length)).ravel()
            scale = (np.arange(SCALES * heads)[:, None] * per_scale + np.arange(self._in_scale)).ravel() + self._numbers_stop
            self._places[length] = np.concatenate([token, scale]), np.repeat(
                [self.page_tokens, self._in_scale], [len(token), len(scale)])
        return self._places[length]


def row_bytes(layout: KVLayout, form: Format) -> int:
    """Bytes of a token's key, or of its value, in one layer and KV head."""
    return layout.head_dim * layout.dtype.itemsize if form.rotated else layout.head_dim * form.bits // 8


def _in_words(rows: torch.Tensor) -> torch.Tensor:
    """The same bytes as fewer numbers where these are wide enough: a CPU copies one after the other."""
    return rows.view(torch.int64) if rows.shape[-1] % 8 == 0 else rows


def _slot_bytes(layout: KVLayout, form: Format, axes: int, tokens: int) -> int:
    """Bytes of a slot in all layers."""
    place = layout.layers * tokens * (axes + 1) * torch.int32.itemsize
    if form.rotated:
        return tokens * layout.bytes_per_token + place
    numbers = layout.layers * layout.kv_heads * layout.head_dim
    return numbers * (2 * tokens * form.bits // 8 + SCALES * torch.float16.itemsize) + place
