"""What could not be recorded: its work runs eagerly for a while, longer after each failure, and whoever asks is told."""
import time
import warnings
from collections.abc import Callable

# After recording has failed once, twice, three times it is tried again after so many seconds; the fourth failure is for good.
PAUSES_S = (60.0, 600.0, 3600.0)


class Pauses:
    """Attributes:
        failures: how often recording failed; only a new object forgets them.
    """

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic):
        """
        Args:
            what: is recorded, in words, in the plural.
            now: seconds.
        """
        self._what, self._now = what, now
        self.failures = 0
        self._reason, self._off_until = '', float('-inf')

    @property
    def off(self) -> str:
        """Why nothing is recorded or replayed for now; '' while it is."""
        return self._reason if self._now() < self._off_until else ''

    @property
    def problem(self) -> str:
        """As `off`, as a sentence that says when recording is tried again; from any thread."""
        reason, left_s = self.off, self._off_until - self._now()
        again = f'tried again in {max(0.0, left_s):.0f} s' if left_s < float('inf') else 'not tried again'
        return reason and (f'{self._what} are not replayed as CUDA graphs but run eagerly, which is slower: {reason} '
                           f'(failure {self.failures} of {len(PAUSES_S) + 1}; {again})')

    def failed(self, error: Exception) -> None:
        """Begin a pause, and warn."""
        pause_s = PAUSES_S[self.failures] if self.failures < len(PAUSES_S) else float('inf')
        self.failures += 1
        self._reason, self._off_until = f'{type(error).__name__}: {error}', self._now() + pause_s
        warnings.warn(self.problem, RuntimeWarning, stacklevel=3)
