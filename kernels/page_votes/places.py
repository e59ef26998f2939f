"""Where chosen pages lie: the arguments and results of `page_places`."""
from typing import NamedTuple

import torch


class PageColumns(NamedTuple):
    """What is known of pages, by number.

    Attributes:
        columns: first row, rows and slot of the scales of each, [3 or more, capacity] int32.
        offset: to add to a page's number to find its column.
        near, boundary, stop: pages before number `near` are not on the device, those before `boundary` are in few bits, and
            `stop` is none any more.
        base: number of the first page in `moves` and `unwanted`.
        moves: how many positions further right each page is read, [pages] int32; None: all where they stand.
        unwanted: pages that are not read, [pages] bool; None: all are wanted.
    """
    columns: torch.Tensor
    offset: int
    near: int
    boundary: int
    stop: int
    base: int
    moves: torch.Tensor | None
    unwanted: torch.Tensor | None


class Places(NamedTuple):
    """Pages that lie in one pool, [kv_heads, pages] each.

    Attributes:
        pages: their numbers, int64.
        starts, lengths: first row and rows in the pool, int32; length 0: not read.
        moves: int32, or None; see `PageColumns`.
        slots: int32, where the pool is of pages in few bits, else None.
        far: they are not on the device; `starts` mean nothing.
    """
    pages: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    moves: torch.Tensor | None
    slots: torch.Tensor | None = None
    far: bool = False
