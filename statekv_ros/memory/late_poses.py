"""Poses that are told after their frames were taken: looked for again until what comes later can change nothing."""
from collections import deque
from dataclasses import dataclass

from statekv_ros.memory.intake import PendingFrames
from statekv_ros.memory.pose import Locate, Pose
from statekv_ros.memory.records import StepRecord
from statekv_ros.memory.saved.saving import WAITING

_MOST = 256     # steps; where poses are silent for longer, the oldest stay without one


@dataclass
class _Unsettled:
    """A step by its number, its pose so far, and the header stamps of its frames in ns, the newest first."""
    step: int
    segment: int
    pose: Pose | None
    stamps_ns: tuple[int, ...]


class LatePoses:
    """Steps of one stream and segment whose poses are not settled, oldest first.

    Attributes:
        unplaced: steps so far whose pose is not known.
    """

    def __init__(self):
        self.unplaced = 0
        self._waiting: deque[_Unsettled] = deque(maxlen=_MOST)

    def wants(self, pending: PendingFrames) -> bool:
        """Whether a pose that is told now may be one of a step's, or of the frames that wait. From any thread."""
        return bool(self._waiting) or not pending.settled

    def note(self, step: StepRecord, stamps_ns: tuple[int, ...], settled: bool) -> None:
        """A step was made; header stamps of its frames in ns, the newest first; whether its pose stays what it is."""
        self.unplaced += step.pose is None
        if self._waiting and self._waiting[-1].segment != step.segment:
            self._waiting.clear()       # stamps went back: what is told from now on is of another run
        if not settled:
            self._waiting.append(_Unsettled(step.step, step.segment, step.pose, stamps_ns))

    def look(self, locate: Locate, pending: PendingFrames) -> list[tuple[int, Pose]]:
        """Give the frames that wait what is known of them now, and find out what is of steps.

        Returns:
            The numbers of those that change, `WAITING` for the frames, and their poses. Of one it comes twice at most: once
            anything is known, and once that is settled.
        """
        changed, unsettled = [], []
        while self._waiting:
            step = self._waiting[0]
            pose, settled = locate(step.stamps_ns, True)
            if pose is None and not settled:    # newer steps are further still from what was told
                break
            self._waiting.popleft()
            if not settled:
                unsettled.append(step)
            if _is_news(pose, settled, step.pose):
                self.unplaced -= step.pose is None
                step.pose = pose
                changed.append((step.step, pose))
        self._waiting.extendleft(reversed(unsettled))
        if pending and not pending.settled:
            pose, pending.settled = locate(pending.stamps_ns[::-1], True)
            if _is_news(pose, pending.settled, pending.pose):
                pending.pose = pose
                changed.append((WAITING, pose))
        return changed


def _is_news(pose: Pose | None, settled: bool, before: Pose | None) -> bool:
    return pose is not None and pose != before and (settled or before is None)
