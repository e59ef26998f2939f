"""What the page knows of one camera."""
import time
from collections import deque
from dataclasses import dataclass, field

from statekv_ros.msg import FrameTiming
from statekv_ros.view.facts import to_ns

SECONDS = 300               # of the charts
LIVE_S = 0.5                # between two live pictures on average, for all pages together
_MOST_SEGMENTS, _MOST_MARKS = 200, 400


@dataclass
class Second:
    """A second's frame steps: the machine's time, how many, all their milliseconds, tokens of the state after them, drops."""
    at: int
    steps: int = 0
    ms: float = 0.0
    state_tokens: int = 0
    dropped: int = 0


@dataclass
class CameraSeen:
    """Timing of a camera's frame steps, as far as the charts and the timeline need it; its size has a bound.

    Attributes:
        begin_ns, newest_ns: header stamps of the oldest picture that the node has, and of the newest frame step; 0: none.
        segments: (first stamp, last stamp, number) of each run of stamps without a jump back.
        drops: (stamp, images replaced before their turn), put together over longer and longer times when they get many.
        seconds: of the charts.
    """
    name: str
    begin_ns: int = 0
    newest_ns: int = 0
    budget: int = 0
    dropped: int = 0
    segments: deque = field(default_factory=lambda: deque(maxlen=_MOST_SEGMENTS))
    drops: list[tuple[int, int]] = field(default_factory=list)
    seconds: deque = field(default_factory=lambda: deque(maxlen=SECONDS))
    _counted: int | None = None
    _together_ns: int = 10**9       # drops
    _live_ns: int = 0
    _live_due: float = 0.0

    def note(self, timing: FrameTiming) -> None:
        """Take a frame step."""
        stamp_ns, now = to_ns(timing.header.stamp), int(time.time())
        new = max(0, timing.dropped - self._counted) if self._counted is not None else 0
        self._counted, self.dropped, self.budget = timing.dropped, timing.dropped, timing.budget
        if new:
            self._drop(stamp_ns, new)
        if self.segments and self.segments[-1][2] == timing.segment:
            self.segments[-1] = (self.segments[-1][0], stamp_ns, timing.segment)
        else:
            self.segments.append((stamp_ns, stamp_ns, timing.segment))
        if not self.seconds or self.seconds[-1].at != now:
            self.seconds.append(Second(now))
        second = self.seconds[-1]
        second.steps, second.ms, second.dropped = second.steps + 1, second.ms + timing.total_ms, second.dropped + new
        second.state_tokens = timing.state_tokens
        self.newest_ns, self.begin_ns = stamp_ns, self.begin_ns or stamp_ns
        if time.monotonic() >= self._live_due:
            self._show_newest()

    def span(self, first_ns: int, last_ns: int) -> None:
        """Pictures reach from here to there, those from before this page began included."""
        self.begin_ns, self.newest_ns = first_ns, max(self.newest_ns, last_ns)
        if not self.segments or self.segments[0][0] > first_ns:
            number = self.segments[0][2] if self.segments else 0
            end_ns = self.segments.popleft()[1] if self.segments else last_ns
            self.segments.appendleft((first_ns, end_ns, number))
        self.drops = [drop for drop in self.drops if drop[0] >= first_ns]

    def live_ns(self) -> int:
        """Stamp of the picture to show now, whoever asks: the newest, but two a second at most, changed when a frame step ends. So a
        picture is asked of the node when it has just done its work, rather than in the midst of the next step."""
        if time.monotonic() >= self._live_due + LIVE_S:     # no step followed the newest
            self._show_newest()
        return self._live_ns

    def _show_newest(self) -> None:
        now = time.monotonic()
        # From when it was due, so that steps that come twice a second, sometimes a little early, are shown each.
        self._live_ns, self._live_due = self.newest_ns, max(self._live_due + LIVE_S, now + LIVE_S / 2)

    def _drop(self, stamp_ns: int, count: int) -> None:
        if self.drops and self.drops[-1][0] // self._together_ns == stamp_ns // self._together_ns:
            self.drops[-1] = self.drops[-1][0], self.drops[-1][1] + count
            return
        self.drops.append((stamp_ns, count))
        if len(self.drops) > _MOST_MARKS:
            self._together_ns *= 2
            drops, self.drops = self.drops, []
            for drop in drops:
                self._drop(*drop)
