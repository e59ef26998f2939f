"""Where keys and values lie on the device: a ring of token rows, in which every step is one contiguous stretch of rows."""
from collections.abc import Callable

import torch

from statekv_ros.backbones.base import KVLayout

_FIRST_ROWS = 256


class RowPool:
    """Rows are taken behind the newest step and given back from the oldest one; what is there is never moved, except when the
    pool grows.

    Attributes:
        key, value: [layers, kv_heads, capacity, head_dim].
        visual: whether a row is a visual token, [capacity] bool.
        capacity: rows there are; `most` is where growing ends.
    """

    def __init__(self, layout: KVLayout, most: int):
        """most: rows that there may be."""
        self.layout, self.most = layout, most
        self.capacity = 0
        self._begin = self._end = 0     # the oldest live row, and the row behind the newest one
        self._live = 0                  # live rows, the gap that a wrap leaves at the end included
        self._wrapped = 0               # rows before the gap, while there is one
        self._allocate(0)

    @property
    def bytes(self) -> int:
        """Bytes of all rows, those in use and those that are not."""
        return self.capacity * self.layout.bytes_per_token

    def find(self, tokens: int) -> int | None:
        """First row of `tokens` free rows side by side; None when there are none without giving back or growing."""
        if not self._live:
            return 0 if tokens <= self.capacity else None
        if self._end > self._begin:     # one stretch: free is what lies behind it, and what lies before it
            if self._end + tokens <= self.capacity:
                return self._end
            return 0 if tokens <= self._begin else None
        return self._end if self._end + tokens <= self._begin else None

    def take(self, row: int, tokens: int) -> None:
        """Use the rows that `find` found."""
        if not self._live:
            self._begin = self._end = row
        if row < self._end:     # it begins again at the front
            self._wrapped = self._end
            self._live += self.capacity - self._end
        self._end = row + tokens
        self._live += tokens

    def give_back(self, row: int, tokens: int) -> None:
        """Free the rows of the oldest step."""
        self._begin = row + tokens
        self._live -= tokens
        if self._wrapped and self._begin == self._wrapped:
            self._live -= self.capacity - self._wrapped
            self._begin = self._wrapped = 0
        if not self._live:
            self._wrapped = 0

    def grow(self, tokens: int, steps: list[tuple[int, int]], moved: Callable[[int, int], None]) -> bool:
        """Have room for `tokens` more rows, where `most` allows it; live rows then stand one behind the other from the front.

        Args:
            steps: first row and rows of each live step, oldest first.
            moved: called with a step's number in that list and its new first row.

        Raises:
            torch.OutOfMemoryError: there is no memory for it; the pool is as it was.
        """
        used = sum(rows for _, rows in steps)
        capacity = min(self.most, max(_FIRST_ROWS, 2 * (used + tokens)))
        if capacity <= self.capacity or used + tokens > capacity:
            return False
        old = self.key, self.value, self.visual
        self._allocate(capacity)
        end = 0
        for number, (row, rows) in enumerate(steps):
            for was, new in zip(old, (self.key, self.value, self.visual)):
                new.narrow(-2 if new.ndim > 1 else 0, end, rows).copy_(was.narrow(-2 if was.ndim > 1 else 0, row, rows))
            moved(number, end)
            end += rows
        self._begin, self._end, self._live, self._wrapped = 0, end, used, 0
        return True

    def _allocate(self, capacity: int) -> None:
        key, value = self.layout.empty(capacity), self.layout.empty(capacity)
        self.key, self.value = key, value
        self.visual = torch.zeros(capacity, dtype=torch.bool, device=self.layout.device)
        self.capacity = capacity
