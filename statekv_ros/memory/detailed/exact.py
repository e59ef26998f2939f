"""Steps as they came, in the model's dtype: all of a detailed cache, or the newest where the others are in few bits."""
import copy
from collections import deque
from collections.abc import Callable

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed.pages import HeldStep, MemoryView
from statekv_ros.memory.detailed.rows import RowPool, TokenRows
from statekv_ros.memory.detailed.table import PageTable

_FIRST_ROWS = 256


class ExactSteps:
    """A step lies in one piece in a ring of token rows, which grows by doubling, or to what `kept` steps need.

    Attributes:
        steps: oldest first.
        most: rows that there may be.
        overwritten: ordinals below this one may have been overwritten by newer steps.
    """

    def __init__(self, layout: KVLayout, table: PageTable, kept: int = 0):
        """
        Args:
            table: of the pages of all steps; those of the exact ones are its newest.
            kept: so many steps at most are held; 0: any number.
        """
        self.steps: deque[HeldStep] = deque()
        self.overwritten = 0
        self._layout, self._table, self._kept = layout, table, kept
        self._pool = RowPool(lambda capacity: TokenRows.empty(layout, capacity))
        self._leftovers: deque[tuple[int, int, int]] = deque()      # gone, still there: ordinal behind, first row, rows
        self.most = 2**40

    @property
    def rows(self) -> TokenRows:
        return self._pool.rows

    @property
    def capacity(self) -> int:
        return self._pool.capacity

    @property
    def row_bytes(self) -> int:
        return self._pool.row_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all rows, those in use and those that are not."""
        return self._pool.bytes

    def find(self, tokens: int, before_growing: Callable[[int], None] = lambda size: None) -> int | None:
        """First of `tokens` free rows; grows for them where it may.

        Args:
            before_growing: called with the bytes that all rows will take.
        """
        row = self._pool.find(tokens)
        return self._pool.find(tokens) if row is None and self._grow(tokens, before_growing) else row

    def use(self, row: int, tokens: int) -> None:
        """Begin to write to the rows that `find` found."""
        hit = [number for number, (_, first, rows) in enumerate(self._leftovers) if first < row + tokens and row < first + rows]
        for _ in range(hit[-1] + 1 if hit else 0):
            self.overwritten = self._leftovers.popleft()[0]

    def append(self, step: HeldStep) -> None:
        """Hold a step whose rows are written."""
        record = step.record
        self._pool.take(step.row, record.tokens)
        self.rows.visual[step.row:step.row + record.tokens] = False
        visual = step.row + record.visual_start
        self.rows.visual[visual:visual + record.visual_tokens] = True
        self.steps.append(step)

    def pop(self, readable: bool) -> HeldStep:
        """Let go of the oldest step; `readable`: answers in progress may read it until it is overwritten."""
        step = self.steps.popleft()
        record = step.record
        self._pool.give_back(step.row, record.tokens)
        if readable:
            self._leftovers.append((record.first_ordinal + record.tokens, step.row, record.tokens))
        return step

    def view(self, steps: list[HeldStep]) -> MemoryView:
        """Steps that lie side by side, as `runs` finds them, where they lie."""
        first, last = steps[0], steps[-1]
        rows = slice(first.row, last.row + last.record.tokens)
        ordinals = torch.arange(rows.stop - rows.start, device=self._layout.device) + first.record.first_ordinal
        return MemoryView(self.rows.key[:, :, rows], self.rows.value[:, :, rows], ordinals, first.record.position,
                          first.stretch.shift, first.record.first_ordinal, reused=True)

    def of_heads(self, heads: slice) -> 'ExactSteps':
        """The same of some KV heads, for reading."""
        part = copy.copy(self)
        part.steps = deque(step.of_heads(heads) for step in self.steps)
        part._pool = self._pool.of_heads(heads)
        return part

    def _grow(self, tokens: int, before: Callable[[int], None]) -> bool:
        held = [(step.row, step.record.tokens) for step in self.steps]
        used = sum(rows for _, rows in held)
        if self._kept:      # with room for two more there is one stretch for a step wherever the ring begins
            wanted = (self._kept + 2) * max(tokens, max((rows for _, rows in held), default=0))
        else:
            wanted = max(_FIRST_ROWS, 2 * (used + tokens))
        capacity = min(self.most, wanted)
        if capacity <= self.capacity or used + tokens > capacity:
            return False
        try:
            before(capacity * self.row_bytes)
            rows = self._pool.resize(capacity, held)
        except torch.OutOfMemoryError:
            self.most = self.capacity   # what there is must do: packing and forgetting keep the camera seeing
            return False
        for step, row in zip(self.steps, rows):
            step.row = row
        if self.steps:
            last = self.steps[-1]
            self._table.line_up_rows(self.steps[0].page, last.page + len(last.lengths))
        self._leftovers.clear()
        return True
