"""The steps that are held at a moment, all or some, and their records; objects are made of those that are looked at."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from statekv_ros.memory.cut import Cut
from statekv_ros.memory.detailed.pages import HeldStep
from statekv_ros.memory.detailed.step_rows import StepRows, cut_out
from statekv_ros.memory.pose import Pose
from statekv_ros.memory.records import StepRecord


class HeldSteps(Sequence[HeldStep]):
    """Oldest first."""

    def __init__(self, far: StepRows = StepRows(1), near: Sequence[HeldStep] = ()):
        """far: those that have left the device, older than those `near`; nothing is added to either any more."""
        self._far, self._near = far, near

    def __len__(self) -> int:
        return len(self._far) + len(self._near)

    def __getitem__(self, index: int | slice) -> HeldStep | HeldSteps:
        far, steps = len(self._far), range(len(self))
        if isinstance(index, slice):
            part = cut_out(steps, index)
            return HeldSteps(self._far[part.start:part.stop], self._near[max(0, part.start - far):max(0, part.stop - far)])
        at = steps[index]
        return self._far[at] if at < far else self._near[at - far]

    def __iter__(self) -> Iterator[HeldStep]:
        return chain(self._far, self._near)

    def column(self, name: str) -> np.ndarray:
        """As `StepRows.column`."""
        near = (getattr(step if name in ('page', 'turn') else step.record, name) for step in self._near)
        return np.concatenate([self._far.column(name), np.fromiter(near, np.int64, len(self._near))])

    def poses(self) -> Iterator[Pose]:
        """As `StepRows.poses`."""
        return chain(self._far.poses(), (step.record.pose for step in self._near if step.record.pose is not None))

    def within(self, cut: Cut) -> HeldSteps:
        """Those that belong to it."""
        return HeldSteps(self._far.within(cut), [
            step for step in self._near if cut.takes(step.record.first_stamp_ns, step.record.last_stamp_ns, step.record.pose)])


class Records(Sequence[StepRecord]):
    """What is known of each of these steps, and of some more behind them."""

    def __init__(self, steps: HeldSteps, more: tuple[StepRecord, ...] = ()):
        self._steps, self._more = steps, more

    def __len__(self) -> int:
        return len(self._steps) + len(self._more)

    def __getitem__(self, index: int | slice) -> StepRecord | Records:
        steps, records = len(self._steps), range(len(self))
        if isinstance(index, slice):
            part = cut_out(records, index)
            return Records(self._steps[part.start:part.stop], self._more[max(0, part.start - steps):max(0, part.stop - steps)])
        at = records[index]
        return self._steps[at].record if at < steps else self._more[at - steps]

    def __iter__(self) -> Iterator[StepRecord]:
        return chain((step.record for step in self._steps), self._more)

    def and_one(self, record: StepRecord) -> Records:
        """These and one more."""
        return Records(self._steps, (*self._more, record))

    def column(self, name: str) -> np.ndarray:
        """As `StepRows.column`, of what is a record's."""
        return np.concatenate([self._steps.column(name), np.array([getattr(record, name) for record in self._more], np.int64)])
