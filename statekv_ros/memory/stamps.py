"""From header stamps to the seconds that the model reads, across clocks that jump back."""


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

    def _seconds(self, stamp_ns: int) -> float:
        return self._offset_s + (stamp_ns - self._origin_ns) / 1e9
