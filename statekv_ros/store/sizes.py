"""What a frame step takes on disk, known from its shape alone."""
from dataclasses import dataclass

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed.blobs import page_cuts
from statekv_ros.memory.detailed.formats import Format
from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
from statekv_ros.memory.detailed.pages import page_lengths
from statekv_ros.memory.detailed.table import ENTRY_DTYPE
from statekv_ros.memory.saved.saving import LONGEST_CYCLE
from statekv_ros.store.retention import cost_of, likely_cost

_SLOT_BYTES = 8, 32     # of a slot of the compressed state beside key and value: its ordinal and its place


@dataclass(frozen=True)
class DiskStep:
    """Bytes of a step.

    Attributes:
        new: of the file, while a restart may need it to follow the carried context.
        kept: of the file, from then on.
        written: that are handed to the disk for it, once or later; whole pages of the file's trees come to that.
    """
    new: int
    kept: int
    written: int


def disk_step(layout: KVLayout, form: Format, axes: int, tokens: int, budget: int, page_tokens: int,
              cycle: int = LONGEST_CYCLE, picture: int = 0) -> DiskStep:
    """Of a step of `tokens` tokens.

    Args:
        axes: of a token's position.
        budget: tokens of the compressed state, one `cycle`-th of which is written with each step; 0 without one.
        picture: bytes of its picture, about; 0 without one.
    """
    heads, lengths = layout.layers * layout.kv_heads, page_lengths(tokens, page_tokens)
    entry = INDEXES[DEFAULT_INDEX].entry_width(layout.head_dim) * ENTRY_DTYPE.itemsize
    described = [heads * len(lengths) * entry, axes * tokens * torch.int32.itemsize]     # index, key_positions
    slots = -(-budget // cycle)
    half = layout.bytes_per_token // 2
    raw = [tokens * half, tokens * half, axes * tokens * torch.int64.itemsize]           # key, value, positions
    if budget:
        raw += [heads * tokens * torch.int32.itemsize, slots * half, slots * half,
                *(slots * heads * size for size in _SLOT_BYTES)]
    shown = likely_cost(picture) if picture else 0
    new = cost_of([*raw, *described]) + shown
    if form.rotated:
        return DiskStep(new, new, sum([*raw, *described, picture]))
    packed = layout.layers * page_cuts(layout, form.bits, lengths)[-1]
    return DiskStep(new + cost_of([packed]), cost_of([packed, *described]) + shown, sum([*raw, *described, packed, picture]))
