"""What every source of poses can tell, and what it counts."""
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from statekv_ros.memory.pose import Found, Locate


class PoseSource(ABC):
    """Tells where a camera was, at once or not at all. Made once for all cameras; not open until `open`.

    Attributes:
        name: where the poses come from, as /diagnostics shows it; parameters: what it follows from.
        received: poses that could be used; refused: those that could not; last_error: why the newest of these could not.
        jumps: how often it was where nothing can have moved to; newest_jump: in words. Steps keep the pose that was told then.
        on_pose: called with nothing after something was received, in whatever thread.
    """
    name = ''
    parameters = '"pose.topic" and "pose.type"'

    def __init__(self):
        self.received = self.refused = self.jumps = 0
        self.last_error = self.newest_jump = self.frame_id = ''
        self.on_pose: Callable[[], None] = lambda: None

    @property
    def about(self) -> str:
        """What it is, where it cannot be opened."""
        return f'poses from {self.name}'

    def locate(self, camera_frame: Callable[[], str]) -> Locate:
        """For a stream. camera_frame: the frame_id of its newest image."""
        def locate(stamps_ns: Sequence[int], again: bool) -> Found:
            newest = found = self.at(stamps_ns[0], camera_frame(), again)
            for stamp_ns in stamps_ns[1:]:
                if found.pose is not None:
                    break
                found = self.at(stamp_ns, camera_frame(), again)
            return Found(found.pose, newest.settled)
        return locate

    @abstractmethod
    def open(self) -> None:
        """Begin to receive. Raises RCLError when the middleware refuses."""

    @abstractmethod
    def close(self) -> None:
        """Receive no more."""

    @abstractmethod
    def at(self, stamp_ns: int, camera_frame: str, again: bool) -> Found:
        """Where it was then, as far as is known now; `again`: this was asked before, and is not counted. From any thread; neither
        waits nor raises."""

    @abstractmethod
    def obstacle(self) -> str:
        """Why there may be no pose, and the remedy; '' where nothing is known to be wrong."""

    def note_refusal(self, error: Exception) -> None:
        """A pose could not be used."""
        self.refused += 1
        self.last_error = str(error)
