"""Which images of a camera to watch, and which never came, from header stamps alone."""
import enum
import statistics
from collections import deque

from statekv_ros.errors import ParameterError

_NS = 10**9
_RECENT = 64            # gaps that the estimate of the camera's period rests on
# A gap of more than so many periods is a camera that paused (or was started anew), not images that got lost; but none under a
# second is, and every one above two.
_PAUSE_PERIODS, _PAUSE_NS = 12, (_NS, 2 * _NS)
_EARLY = 4              # an image may come this fraction (1/4) of the sampling period early


class Verdict(enum.Enum):
    """What to do with an image."""
    SAMPLE = 'sample'
    SKIP = 'between two samples'
    NO_STAMP = 'header stamp is zero: the camera driver must set it'
    DUPLICATE = 'header stamp is that of the previous image: the camera sends one image twice'


class Sampler:
    """Samples on a fixed grid of header time, so that rounding never adds up: every third image at 10 Hz from 30 Hz.

    A stamp that goes back (a looping bag) restarts the grid.

    Attributes:
        frames_in: images with a usable stamp, sampled or not.
        sampled: images chosen.
        lost: images that should have stood between two stamps.
        restarts: how often stamps went back.
        refused: images without a usable stamp.
    """

    def __init__(self, rate_hz: float):
        """Raises ParameterError unless rate_hz is a positive number."""
        self.frames_in = self.sampled = self.lost = self.restarts = self.refused = 0
        self._last_ns: int | None = None
        self._next_ns = 0
        self._gaps: deque[int] = deque(maxlen=_RECENT)
        self.set_rate(rate_hz)

    def set_rate(self, rate_hz: float) -> None:
        """Change the rate from the next image on."""
        if not 0 < rate_hz < float('inf'):
            raise ParameterError(f'rate_hz must be a positive number of images a second, got {rate_hz}')
        self._period_ns = round(_NS / rate_hz)
        if self._last_ns is not None:  # the next sample may be due long after a whole period of the new rate
            self._next_ns = min(self._next_ns, self._last_ns + self._period_ns)

    def judge(self, stamp_ns: int) -> Verdict:
        """Take the next image's header stamp, in nanoseconds."""
        if stamp_ns <= 0 or stamp_ns == self._last_ns:
            self.refused += 1
            return Verdict.NO_STAMP if stamp_ns <= 0 else Verdict.DUPLICATE
        self.frames_in += 1
        if self._last_ns is None or stamp_ns < self._last_ns:
            self.restarts += self._last_ns is not None
            self._gaps.clear()
            self._next_ns = stamp_ns
        else:
            self._note_gap(stamp_ns - self._last_ns)
        self._last_ns = stamp_ns
        early = self._period_ns // _EARLY
        if stamp_ns < self._next_ns - early:
            return Verdict.SKIP
        self._next_ns += ((stamp_ns + early - self._next_ns) // self._period_ns + 1) * self._period_ns
        self.sampled += 1
        return Verdict.SAMPLE

    def _note_gap(self, gap_ns: int) -> None:
        if len(self._gaps) >= 4 and gap_ns < _PAUSE_NS[1]:
            # The lowest fifth still ends at the camera's period when every second image gets lost.
            period = statistics.quantiles(self._gaps, n=5)[0]
            if gap_ns < max(_PAUSE_NS[0], _PAUSE_PERIODS * period):
                # Jitter of an eighth of a period either way must not look like a lost image.
                self.lost += max(0, int(gap_ns / period + 0.3) - 1)
        self._gaps.append(gap_ns)
