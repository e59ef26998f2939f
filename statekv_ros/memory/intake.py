"""Camera frames one by one, prepared and gathered until there are enough for the memory's next piece of work."""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.pose import Pose
from statekv_ros.memory.stamps import StreamTime, check_frame


@dataclass
class PendingFrames:
    """Prepared frames that wait until there are enough of them for a step.

    `failed`: one with them in it failed; `pose`: where the camera was, as far as is known, and `settled` whether it stays that.
    """
    frames: list[np.ndarray] = field(default_factory=list)
    stamps_ns: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    preprocess_ms: float = 0.0
    segment: int = 0
    failed: bool = False
    pose: Pose | None = None
    settled: bool = True

    def __len__(self) -> int:
        return len(self.frames)

    def add(self, frame: np.ndarray, stamp_ns: int, seconds: float, preprocess_ms: float) -> None:
        self.frames.append(frame)
        self.stamps_ns.append(stamp_ns)
        self.seconds.append(seconds)
        self.preprocess_ms += preprocess_ms

    def copy(self) -> PendingFrames:
        return PendingFrames([*self.frames], [*self.stamps_ns], [*self.seconds], self.preprocess_ms, self.segment, self.failed,
                             self.pose, self.settled)

    def after_failure(self) -> PendingFrames:
        """What waits again when their step failed: all but the newest, once. Were they at fault, every later step would fail too."""
        if self.failed or len(self) < 2:
            return PendingFrames()
        return PendingFrames(self.frames[:-1], self.stamps_ns[:-1], self.seconds[:-1], self.preprocess_ms, self.segment, True,
                             self.pose, self.settled)


class FrameIntake:
    """Checks and prepares frames, and keeps those that wait.

    Attributes:
        pending: frames that wait.
        time: stamps so far.
    """

    def __init__(self, backbone: Backbone):
        self.pending = PendingFrames()
        self.time = StreamTime()
        self._backbone = backbone

    def prepare(self, frame: np.ndarray, stamp_ns: int) -> tuple[np.ndarray, float]:
        """The frame as the model wants it, and the ms that took.

        Raises:
            FrameError: not an image, or a stamp that is not positive or the same as the last one.
        """
        check_frame(frame, stamp_ns, self.time.last_ns)
        clock = PhaseClock(torch.device('cpu'))
        prepared = self._backbone.prepare(frame)
        clock.mark()
        return prepared, clock.phases_ms()[0]

    def parts_from(self, prepared: np.ndarray, stamp_ns: int) -> bool:
        """Whether frames wait that cannot be in one step with this one: of another size, or of another segment."""
        return bool(self.pending) and (self.pending.frames[0].shape != prepared.shape or self.time.goes_back(stamp_ns))

    def add(self, prepared: np.ndarray, stamp_ns: int, preprocess_ms: float) -> int:
        """Let a prepared frame wait with the others; how many wait now."""
        self.pending.add(prepared, stamp_ns, self.time.advance(stamp_ns), preprocess_ms)
        self.pending.segment = self.time.segment
        return len(self.pending)

    def take(self) -> PendingFrames:
        """The frames that wait, which then do so no longer."""
        pending, self.pending = self.pending, PendingFrames()
        return pending
