"""SIGINT and SIGTERM: heard from the first moment on, never as an exception in the middle of something."""
import os
import signal
import threading
import time

# A terminal and a launch file may both pass on one Ctrl-C; a second signal after this long is a second wish.
DOUBLED_S = 0.5
FORCED_EXIT_S = 4.0


class StopSignals:
    """Turns both signals into `requested`.

    Until `hold` there is nothing to close, and a signal ends the process at once with exit code 0. After it the main thread
    looks at `requested` and closes everything; if it cannot in time, or on a second signal, the process ends all the same.

    Attributes:
        requested: whether the process was asked to stop.
    """

    def __init__(self):
        """Only in the main thread."""
        self.requested = False
        self._held = False
        self._first = 0.0
        self._woken, self._wake = os.pipe()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def hold(self) -> None:
        """From now on a signal is only noted."""
        threading.Thread(target=self._leave_in_time, name='statekv-exit', daemon=True).start()
        self._held = True

    def _hear(self, number: int, frame) -> None:
        if not self._held:
            os._exit(0)
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
            os.write(self._wake, b'.')
        elif now - self._first > DOUBLED_S:
            os._exit(0)

    def _leave_in_time(self) -> None:
        # A library call that loads or runs a large model cannot be interrupted; it must not keep the process alive.
        os.read(self._woken, 1)
        time.sleep(FORCED_EXIT_S)
        os._exit(0)
