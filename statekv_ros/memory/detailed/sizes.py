"""What steps take in a detailed cache, known from their shape alone."""
from dataclasses import replace
from typing import NamedTuple

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed.formats import Format
from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
from statekv_ros.memory.detailed.packed import PackedSteps
from statekv_ros.memory.detailed.pages import page_lengths
from statekv_ros.memory.detailed.rows import RowPool, TokenRows
from statekv_ros.memory.detailed.table import PageTable


class StepBytes(NamedTuple):
    """Bytes of a step: its rows in the pools, and its pages' entries in the index and the page table, once they are sorted."""
    rows: int
    index: int


def step_bytes(layout: KVLayout, form: Format, axes: int, tokens: int, page_tokens: int) -> StepBytes:
    """Bytes of a step of `tokens` tokens, once it is no longer among the newest; takes no memory.

    Args:
        axes: of a token's position.

    Raises:
        ParameterError: the format cannot hold such heads.
    """
    layout = replace(layout, device=torch.device('meta'))
    pages = len(page_lengths(tokens, page_tokens))
    table = PageTable(layout, INDEXES[DEFAULT_INDEX])
    if form.rotated:
        rows = tokens * RowPool(lambda capacity: TokenRows.empty(layout, capacity)).row_bytes
    else:
        rows = PackedSteps(layout, table, form, axes).needed(tokens, pages)
    return StepBytes(rows, pages * table.page_bytes)


def index_bytes(layout: KVLayout, pages: int) -> int:
    """Bytes of the index and the page table with so many pages, the newest of which are not in 4 bits yet; takes no memory."""
    return PageTable(replace(layout, device=torch.device('meta')), INDEXES[DEFAULT_INDEX]).bytes_of(pages)
