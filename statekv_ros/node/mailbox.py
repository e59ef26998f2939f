"""A camera's one-place mailbox: the newest image waits for the engine, and whatever it replaced is counted."""
import threading
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arrival:
    """One image as it came: the undecoded message, its header stamp, and when it arrived (`time.perf_counter` seconds)."""
    message: Any
    stamp_ns: int
    arrived: float

    @property
    def waited_ms(self) -> float:
        """Milliseconds since it arrived."""
        return (time.perf_counter() - self.arrived) * 1e3


class Mailbox:
    """Newest wins. `put` from any thread, `take` from the engine thread; neither waits for the other's work.

    Attributes:
        dropped: images that a newer one replaced before they were taken.
        newest: the waiting image, which stays there; None where none waits.
    """

    def __init__(self):
        self.dropped = 0
        self.newest: Arrival | None = None
        self._lock = threading.Lock()

    def put(self, message: Any, stamp_ns: int) -> None:
        """Leave an image, in place of one that still waits."""
        arrival = Arrival(message, stamp_ns, time.perf_counter())
        with self._lock:
            self.dropped += self.newest is not None
            self.newest = arrival

    def take(self) -> Arrival | None:
        """The waiting image, or None."""
        with self._lock:
            newest, self.newest = self.newest, None
        return newest

    @property
    def waiting(self) -> bool:
        return self.newest is not None
