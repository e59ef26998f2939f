"""From header stamps to the seconds that the model reads, across clocks that jump back."""
import numpy as np

from statekv_ros.errors import FrameError


def check_frame(frame: np.ndarray, stamp_ns: int, last_ns: int | None) -> None:
    """Refuse what cannot be the next frame of a stream.

    Args:
        frame: to be uint8 [height, width, 3] RGB.
        last_ns: header stamp of the previous frame; None before the first.

    Raises:
        FrameError: not an image, or a stamp that is not positive or the same as the last one.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise FrameError(f'frame must be uint8 [height, width, 3] RGB, got {frame.dtype} {list(frame.shape)}')
    if stamp_ns <= 0:
        raise FrameError(f'header stamp must be positive, got {stamp_ns} ns: the camera driver must set it')
    if stamp_ns == last_ns:
        raise FrameError(f'header stamp {stamp_ns} ns is that of the previous frame: the camera sends one frame twice')


class StreamTime:
    """Seconds since the stream's first frame. A stamp that goes back (a looping bag) opens a new segment: its seconds go on
    from the last frame's, one usual gap later, so that time in the stream never runs backwards."""

    def __init__(self):
        self.segment = 0
        self.last_ns: int | None = None
        self._origin_ns = 0
        self._offset_s = 0.0
        self._gap_s = 0.0

    def goes_back(self, stamp_ns: int) -> bool:
        """Whether this stamp would open a new segment."""
        return self.last_ns is not None and stamp_ns < self.last_ns

    def advance(self, stamp_ns: int) -> float:
        """Take the next frame's stamp; its time in the stream, in seconds."""
        if self.last_ns is None:
            self._origin_ns = stamp_ns
        elif stamp_ns < self.last_ns:
            self._offset_s = self._seconds(self.last_ns) + self._gap_s
            self._origin_ns = stamp_ns
            self.segment += 1
        else:
            self._gap_s = (stamp_ns - self.last_ns) / 1e9
        self.last_ns = stamp_ns
        return self._seconds(stamp_ns)

    def saved(self) -> dict:
        """Itself as plain values, for `restored`."""
        return dict(vars(self))

    def restored(self, values: dict) -> None:
        """Go on where `saved` was called."""
        vars(self).update(values)

    def _seconds(self, stamp_ns: int) -> float:
        return self._offset_s + (stamp_ns - self._origin_ns) / 1e9
