"""A set of step numbers that mostly follow each other."""
from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class StepSet:
    """Kept as where it begins and ends, so that hours of steps take no more than one. Changed by one thread at a time; others may
    look meanwhile."""

    def __init__(self, steps: Iterable[int] = ()):
        """steps: in any order."""
        self._ends: list[int] = []      # from each even one on, up to the odd one behind it, are in
        for step in sorted(steps):
            self.add(step)

    def __contains__(self, step: int) -> bool:
        return bool(bisect_right(self._ends, step) % 2)

    def add(self, step: int) -> None:
        if step not in self:
            self._turn_over(step)

    def discard(self, step: int) -> None:
        if step in self:
            self._turn_over(step)

    def clear(self) -> None:
        self._ends.clear()

    def _turn_over(self, step: int) -> None:
        begin, end = bisect_left(self._ends, step), bisect_right(self._ends, step + 1)
        there = self._ends[begin:end]
        self._ends[begin:end] = [at for at in (step, step + 1) if at not in there]     # at once, for those who look
