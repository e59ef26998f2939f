"""Passes of one token of a stream's answers as recorded work: when it pays to record one, and which may be replayed."""
import time
from collections.abc import Callable

from statekv_ros.memory.pauses import Pauses
from statekv_ros.memory.recorded import Recorder, Result

# A recording takes the time of about three tokens, by count: the pass is queued once more, made a graph, and replayed to be
# compared. So it is made at this token in one place, and if as many may follow: a short answer never pays for one, and one that
# ends right after it has lost less than half of what it took.
RECORDED_AT = 8


class DecodeGraphs:
    """What the answers of one stream have recorded. They share a pool of memory, so only the newest recording is ever replayed;
    answers that are decoded side by side share passes anyhow, which are not recorded.

    Attributes:
        newest: replays it; None before the first. It keeps the pool, of which the next one makes use, when its answer is gone.
        replays: passes that were replayed.
    """

    def __init__(self, make_recorder: Callable[[], Recorder], recorded_at: int = RECORDED_AT,
                 now: Callable[[], float] = time.monotonic):
        """
        Args:
            make_recorder: asked for a new one after what the one before recorded was let go.
            recorded_at: the token in one place that is recorded, if at least as many may follow.
            now: seconds.
        """
        self._make_recorder, self.recorded_at = make_recorder, recorded_at
        self._pauses = Pauses('tokens of answers', now)
        self.replays = 0
        self.clear()

    @property
    def off(self) -> str:
        """Why tokens are decoded eagerly for now; '' while they are not."""
        return self._pauses.off

    @property
    def problem(self) -> str:
        """As `off`, as a sentence that says when recording is tried again; from any thread."""
        return self._pauses.problem

    def clear(self) -> None:
        """Forget what is recorded."""
        self._recorder: Recorder | None = None
        self.newest: Callable[[], None] | None = None

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """As a `Recorder`; only what is recorded last may be replayed."""
        self._recorder = self._recorder or self._make_recorder()
        self.newest, result = self._recorder(function)
        return self.newest, result

    def failed(self, error: Exception) -> None:
        """Nothing is recorded or replayed for a while."""
        self.clear()
        self._pauses.failed(error)
