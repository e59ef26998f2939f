"""Steps as rows of numbers: over hours there are many that hardly anybody looks at, and as objects they take several times as
much."""
from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np

from statekv_ros.memory.cut import Cut
from statekv_ros.memory.detailed.pages import HeldStep, Stretch, page_lengths
from statekv_ros.memory.detailed.room import zeros_of_numpy
from statekv_ros.memory.pose import Place, Pose, shared
from statekv_ros.memory.records import StepRecord

_OF_RECORD = [field.name for field in fields(StepRecord) if field.name != 'pose']
_ROWS = {name: row for row, name in enumerate([*_OF_RECORD, 'page', 'turn', 'stretch', 'pose_ns'])}
_FIRST_STEPS = 64


class StepRows(Sequence[HeldStep]):
    """Steps that have left the device, oldest first; one is made an object when it is asked for, a new one each time.

    A slice shares the numbers and is not changed by steps that are added or removed later.
    """

    def __init__(self, page_tokens: int):
        """page_tokens: as of `page_lengths`."""
        self._page_tokens = page_tokens
        self._at = range(0)     # columns of those that are here
        self._numbers = np.empty((len(_ROWS), _FIRST_STEPS), np.int64)
        # From the first step with a pose on: x, y, z and orientation, [7, steps]; frame_id and covariance, [2, steps].
        self._places: np.ndarray | None = None
        self._told: np.ndarray | None = None
        self._stretches: list[Stretch] = []     # few of them, which steps name by where they are

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: int | slice) -> HeldStep | StepRows:
        if isinstance(index, slice):
            return self._part(cut_out(self._at, index))
        at = self._at[index]
        *numbers, page, turn, stretch, _ = self._numbers[:, at].tolist()
        record = StepRecord(*numbers, self._pose(at))
        lengths = page_lengths(record.tokens, self._page_tokens)
        return HeldStep(record, -1, self._stretches[stretch], page, lengths, None, turn=turn)

    def column(self, name: str) -> np.ndarray:
        """One number of each, [steps] int64: a field of `StepRecord` other than the pose, `page` or `turn`."""
        return self._numbers[_ROWS[name], self._at.start:self._at.stop]

    def numbers(self, indices: np.ndarray, names: Sequence[str]) -> list[list[int]]:
        """Columns of some of the steps, which are not made objects for it; a list for each name, as `column` has them."""
        rows = np.array([_ROWS[name] for name in names])
        return self._numbers[rows[:, None], indices + self._at.start].tolist()

    def find(self, number: int) -> int | None:
        """Index of a step by its number in the stream; None where it is not here."""
        numbers = self.column('step')
        at = int(np.searchsorted(numbers, number))
        return at if at < len(numbers) and numbers[at] == number else None

    def append(self, step: HeldStep) -> None:
        """Take down a step, newer than all that are here."""
        if self._at.stop == self._numbers.shape[1]:
            self._move(self._at, max(_FIRST_STEPS, len(self) + len(self) // 2))
        if not self._stretches or self._stretches[-1] is not step.stretch:
            self._stretches.append(step.stretch)
        record = step.record
        self._numbers[:, self._at.stop] = [*(getattr(record, name) for name in _OF_RECORD), step.page, step.turn,
                                           len(self._stretches) - 1, 0]
        self._at = range(self._at.start, self._at.stop + 1)
        if record.pose is not None:
            self.place(len(self) - 1, record.pose)

    def pop(self, index: int) -> HeldStep:
        """Remove a step."""
        step = self[index]
        if index:       # what a slice shares stays as it is
            self._move(np.delete(self._at, index), self._numbers.shape[1])
        else:
            self._at = self._at[1:]
        return step

    def place(self, index: int, pose: Pose) -> None:
        """Where a step was seen is known now."""
        if self._told is None:
            capacity = self._numbers.shape[1]
            self._places, self._told = np.zeros((7, capacity)), np.full((2, capacity), None)
        at = self._at[index]
        self._numbers[_ROWS['pose_ns'], at] = pose.stamp_ns
        self._places[:, at] = *pose.position, *pose.orientation
        covariance = None if pose.covariance is None else shared(np.array(pose.covariance, np.float64).tobytes())
        self._told[:, at] = sys.intern(pose.frame_id), covariance

    def poses(self) -> Iterator[Pose]:
        """Of those whose pose is known."""
        return filter(None, map(self._pose, self._at)) if self._told is not None else iter(())

    def within(self, cut: Cut) -> StepRows:
        """Those that belong to it."""
        wanted = np.full(len(self), True)
        if cut.first_ns is not None:
            wanted &= self.column('last_stamp_ns') >= cut.first_ns
        if cut.last_ns is not None:
            wanted &= self.column('first_stamp_ns') <= cut.last_ns
        if cut.place is not None:
            wanted &= self._in_cube(cut.place)
            for at in np.flatnonzero(wanted).tolist():
                wanted[at] = cut.place.holds(self._pose(self._at[at]))
        return self._part(self._at.start + np.flatnonzero(wanted))

    def _in_cube(self, place: Place) -> np.ndarray:
        """Whether each was seen from the cube around a place, [steps] bool: few are left to be asked one by one."""
        if self._told is None:
            return np.full(len(self), False)
        here = slice(self._at.start, self._at.stop)
        apart = np.abs(self._places[:3, here] - np.array(place.position)[:, None])
        return (self._told[0, here] == place.frame_id) & (apart <= place.radius_m).all(axis=0)

    def _pose(self, at: int) -> Pose | None:
        if self._told is None or self._told[0, at] is None:
            return None
        frame_id, covariance = self._told[:, at]
        if covariance is not None:
            covariance = shared(tuple(np.frombuffer(covariance).tolist()))
        x, y, z, *orientation = self._places[:, at].tolist()
        return Pose(int(self._numbers[_ROWS['pose_ns'], at]), frame_id, (x, y, z), tuple(orientation), covariance)

    def _part(self, columns: range | np.ndarray) -> StepRows:
        part = copy.copy(self)
        if isinstance(columns, range):
            part._at = columns
        else:
            part._move(columns, len(columns))
        return part

    def _move(self, columns: range | np.ndarray, capacity: int) -> None:
        """Have some of the steps in arrays of their own with room for so many."""
        def moved(rows: np.ndarray | None) -> np.ndarray | None:
            if rows is None:
                return None
            shape = len(rows), capacity     # of objects: None where there is none
            room = np.empty(shape, rows.dtype) if rows.dtype.hasobject else zeros_of_numpy(*shape, dtype=rows.dtype)
            room[:, :len(columns)] = rows[:, columns]
            return room

        self._numbers, self._places, self._told = map(moved, (self._numbers, self._places, self._told))
        self._at = range(len(columns))
        stretches = self._numbers[_ROWS['stretch'], :len(columns)]
        gone = int(stretches[0]) if len(columns) else 0
        stretches -= gone
        self._stretches = self._stretches[gone:]


def cut_out(steps: range, index: slice) -> range:
    """Those that a slice takes. Raises ValueError where it leaves some out between them."""
    found = steps[index]
    if found.step != 1:
        raise ValueError(f'steps are read as they follow each other: a slice of them has no stride, got {found.step}')
    return found
