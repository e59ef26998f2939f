"""Where keys and values lie on the device: a ring of rows, in which what belongs together is one contiguous stretch of rows."""
import copy
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from statekv_ros.backbones.base import KVLayout

Rows = TypeVar('Rows', bound=tuple)


class TokenRows(NamedTuple):
    """A row for each token.

    Attributes:
        key, value: [layers, kv_heads, capacity, head_dim], keys rotated.
        visual: whether it is a visual token, [capacity] bool.
    """
    key: torch.Tensor
    value: torch.Tensor
    visual: torch.Tensor

    @staticmethod
    def empty(layout: KVLayout, capacity: int) -> 'TokenRows':
        visual = torch.zeros(capacity, dtype=torch.bool, device=layout.device)
        return TokenRows(layout.empty(capacity), layout.empty(capacity), visual)


class RowPool(Generic[Rows]):
    """Rows are taken behind the newest stretch and given back from the oldest one; what is there is never moved, except when
    the pool is resized.

    Attributes:
        rows: the tensors. Rows are the third dimension of those with four, and the last one of the others.
        capacity: rows there are.
        row_bytes: bytes of a row in all tensors.
    """

    def __init__(self, empty: Callable[[int], Rows]):
        """empty: makes the tensors for so many rows, a named tuple."""
        self._empty = empty
        self.row_bytes = sum(tensor.nbytes for tensor in empty(1))
        self.capacity = 0
        self.rows = empty(0)
        self._begin = self._end = 0     # the oldest live row, and the row behind the newest one
        self._live = 0                  # live rows, the gap that a wrap leaves at the end included
        self._wrapped = 0               # rows before the gap, while there is one

    @property
    def bytes(self) -> int:
        """Bytes of all rows, those in use and those that are not."""
        return self.capacity * self.row_bytes

    def find(self, count: int) -> int | None:
        """First row of `count` free rows side by side; None when there are none without giving back or resizing."""
        if not self._live:
            return 0 if count <= self.capacity else None
        if self._end > self._begin:     # one stretch: free is what lies behind it, and what lies before it
            if self._end + count <= self.capacity:
                return self._end
            return 0 if count <= self._begin else None
        return self._end if self._end + count <= self._begin else None

    def take(self, row: int, count: int) -> None:
        """Use the rows that `find` found."""
        if not self._live:
            self._begin = self._end = row
        if row < self._end:     # it begins again at the front
            self._wrapped = self._end
            self._live += self.capacity - self._end
        self._end = row + count
        self._live += count

    def give_back(self, row: int, count: int) -> None:
        """Free the oldest stretch."""
        self._begin = row + count
        self._live -= count
        if self._wrapped and self._begin == self._wrapped:
            self._live -= self.capacity - self._wrapped
            self._begin = self._wrapped = 0
        if not self._live:
            self._wrapped = 0

    def resize(self, capacity: int, stretches: Sequence[tuple[int, int]]) -> list[int]:
        """Have `capacity` rows; live ones then stand one behind the other from the front.

        Args:
            capacity: at least the live rows.
            stretches: first row and rows of each live stretch, oldest first.

        Returns:
            The new first row of each.

        Raises:
            torch.OutOfMemoryError: there is no memory for it; the pool is as it was.
        """
        old, self.rows = self.rows, self._empty(capacity)
        moved, end = [], 0
        for row, count in stretches:
            for was, new in zip(old, self.rows):
                dim = 2 if new.ndim == 4 else new.ndim - 1
                new.narrow(dim, end, count).copy_(was.narrow(dim, row, count))
            moved.append(end)
            end += count
        self.capacity = capacity
        self._begin, self._end, self._live, self._wrapped = 0, end, end, 0
        return moved

    def of_heads(self, heads: slice) -> 'RowPool[Rows]':
        """The same rows of some KV heads, for reading."""
        part = copy.copy(self)
        part.rows = type(self.rows)(*(rows[:, heads] if rows.ndim == 4 else rows for rows in self.rows))
        part.row_bytes = sum(rows.nbytes for rows in part.rows) // max(1, self.capacity)
        return part
