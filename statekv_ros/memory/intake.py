"""Camera frames one by one, gathered until there are enough for the memory's next piece of work."""
from abc import ABC, abstractmethod

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.records import StepReport
from statekv_ros.memory.snapshot import PendingFrames
from statekv_ros.memory.stamps import StreamTime, check_frame


class FrameIntake(ABC):
    """Base of the memories; `flush` works on what was gathered and leaves `_pending` empty.

    Attributes:
        backbone: prepares the frames.
    """
    backbone: Backbone
    _pending: PendingFrames
    _time: StreamTime

    @abstractmethod
    def flush(self) -> StepReport | None:
        """Work on the frames that wait, as few as they are; None when none waits."""

    def _take(self, frame: np.ndarray, stamp_ns: int, preprocess_ms: float, wanted: int) -> StepReport | None:
        """Take a frame, and flush when `wanted` are there. One of another size or segment than those that wait flushes first.

        Returns:
            The report of what was flushed, or None.

        Raises:
            FrameError: not an image, or a stamp that is not positive or the same as the last one.
        """
        check_frame(frame, stamp_ns, self._time.last_ns)
        clock = PhaseClock(torch.device('cpu'))
        prepared = self.backbone.prepare(frame)
        clock.mark()
        unfit = self._pending and (self._pending.frames[0].shape != prepared.shape or self._time.goes_back(stamp_ns))
        try:
            report = self.flush() if unfit else None
        except BaseException:
            self._pending = PendingFrames()     # none of them can share a step with this frame, which itself is a good one
            raise
        finally:
            self._pending.add(prepared, stamp_ns, self._time.advance(stamp_ns), preprocess_ms + clock.phases_ms()[0])
            self._pending.segment = self._time.segment
        return report if len(self._pending) < wanted else self.flush()
