"""Where chosen pages lie: the arguments and results of `page_places`."""
from typing import NamedTuple

import torch


class PageColumns(NamedTuple):
    """What is known of pages, by number.

    Attributes:
        columns: first row, rows and slot of the scales of each, [3 or more, capacity] int32.
        offset: to add to a page's number to find its column.
        near, stop: pages before number `near` are not on the device, and `stop` is none any more.
        boundary: pages before this number are in few bits, [1] int64, on the device: more and more are as answers are decoded.
        packed: whether there are such pages on the device.
        exact: so many pages, the last ones, may be exact where others are in few bits.
        base: number of the first page in `moves` and `unwanted`.
        moves: how many positions further right each page is read, [pages] int32; None: all where they stand.
        unwanted: pages that are not read, [pages] bool; None: all are wanted.
    """
    columns: torch.Tensor
    offset: int
    near: int
    stop: int
    boundary: torch.Tensor
    packed: bool
    exact: int
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
