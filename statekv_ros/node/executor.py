"""The node's executor: a callback that raises is logged, and the others go on."""
import time
import traceback
from collections.abc import Callable

from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

_AGAIN_S = 10.0


class LoggingExecutor(SingleThreadedExecutor):
    """Runs callbacks one by one in the thread that calls `run_once`.

    rclpy's own lets an exception of any callback end the spinning, and thereby the node: a SetParameters request with a
    value of an unknown type is enough.
    """

    def __init__(self, **options):
        """options: as for `SingleThreadedExecutor`."""
        super().__init__(**options)
        self._told: dict[tuple, tuple[float, int]] = {}

    def run_once(self, log: Callable[[str], None], timeout_s: float | None = None) -> bool:
        """Wait for one callback, or `timeout_s` seconds, and run it; False when it raised.

        log: takes the traceback, of one place in the code at most once in 10 s.

        Raises:
            ExternalShutdownException: somebody has shut ROS down.
        """
        try:
            self.spin_once(timeout_s)
        except ExternalShutdownException:
            raise
        except Exception as error:
            self._tell(error, log)
            return False
        return True

    def answer_all(self, log: Callable[[str], None], seconds: float) -> None:
        """Run callbacks until none waits for anything, so that every service call has its response; bounded by `seconds`."""
        end = time.monotonic() + seconds
        quiet = 0
        # One quiet turn may lie between two requests that are on their way.
        while quiet < 3 and time.monotonic() < end:
            self.run_once(log, 0.05)
            quiet = 0 if any(not task.done() for task, *_ in self._tasks) else quiet + 1

    def _tell(self, error: Exception, log: Callable[[str], None]) -> None:
        *_, place = traceback.extract_tb(error.__traceback__)
        kind, now = (type(error), place.filename, place.lineno), time.monotonic()
        last, unsaid = self._told.get(kind, (-_AGAIN_S, 0))
        if now - last < _AGAIN_S:
            self._told[kind] = last, unsaid + 1
            return
        self._told[kind] = now, 0
        more = f' ({unsaid} more like it since the last such message)' if unsaid else ''
        log(f'a callback failed; the node goes on{more}: ' + ''.join(traceback.format_exception(error)))
