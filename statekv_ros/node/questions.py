"""A question on its way through the engine: one answer per camera asked, decoded slice by slice, within its time limit or until
somebody ends it."""
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from statekv_ros.errors import Code, QuestionError, StateKVError
from statekv_ros.memory import Answering, AnswerResult, Evidence, VideoStream

_LOOKED_AT = 3          # steps that progress names
_PROGRESS_SHARE = 0.1   # of the engine's time, at most, goes into telling progress


@dataclass(frozen=True)
class CameraAnswer:
    """One camera's answer with the times that only the engine knows (ms of wall time from the arrival of the question)."""
    camera: str
    result: AnswerResult
    queue_ms: float
    first_token_ms: float
    total_ms: float
    frame_steps_meanwhile: int


@dataclass(frozen=True)
class Outcome:
    """What came of a question: answers in the order of the cameras, and an error with its code, empty on success.

    A question that ran out of time or was ended has both: the answers hold what there was.
    """
    answers: tuple[CameraAnswer, ...]
    error: str
    code: Code = Code.NONE


@dataclass(frozen=True)
class Progress:
    """A question on its way.

    Attributes:
        place: questions that get a slice before this one gets its next.
        camera: whose answer is in the making; '' before the first slice.
        text, tokens: that answer so far.
        looked_at: what its newest token looked at most.
    """
    place: int
    camera: str = ''
    text: str = ''
    tokens: int = 0
    looked_at: tuple[Evidence, ...] = ()


@dataclass(eq=False)
class Question:
    """A question and its progress.

    Attributes:
        text: what is asked; cameras: the streams to ask; options: as for `VideoStream.begin_answer`.
        timeout_s: seconds from now until it ends with what it has.
        done: called once, even when it raises; in the engine thread, or in the one that stops the engine.
        on_progress: called in the engine thread, when it is its turn to be answered and after slices; None: nobody wants to know.
    """
    text: str
    cameras: list[str]
    options: dict
    timeout_s: float
    done: Callable[[Outcome], None]
    on_progress: Callable[[Progress], None] | None = None
    asked: float = field(default_factory=time.perf_counter)
    _open: list[tuple[str, Answering]] = field(default_factory=list)
    _answers: list[CameraAnswer] = field(default_factory=list)
    _steps_before: int = 0
    _begun: float = 0.0
    _first_token: float = 0.0
    _told: bool = False
    _ending: tuple[Code, str] | None = None
    _tell_again: float = 0.0

    def begin(self, streams: dict[str, VideoStream], steps: int) -> None:
        """Take a snapshot of every camera's memory, all at this frame boundary.

        Of several cameras, those that cannot answer (nothing seen yet, no frame in the time span) are left out.

        Raises:
            QuestionError: no camera can answer; the reason of each is named.
        """
        self._steps_before = steps
        reasons, codes = [], []
        for name, stream in streams.items():
            try:
                self._open.append((name, stream.begin_answer(self.text, **self.options)))
            except StateKVError as error:
                reasons.append(f'camera {name!r}: {error}')
                codes.append(error.code)
        if not self._open:
            raise QuestionError('; '.join(reasons), codes[0])

    def advance(self, tokens: int, steps: int) -> bool:
        """One slice of the next answer; True when all are done and `done` has been called."""
        answering = self.next_answer(steps)
        if answering is None:
            return True
        answering.advance(tokens)
        return self.settle(steps)

    def shares_with(self, other: 'Question') -> bool:
        """Whether the next pass of both can be one."""
        return bool(self._open and other._open) and self._open[0][1].shares_with(other._open[0][1])

    def next_answer(self, steps: int) -> Answering | None:
        """The answer that a slice is for, and `settle` comes after it; None: out of time, and `done` has been called."""
        if time.perf_counter() - self.asked > self.timeout_s:
            self._time_out(steps)
            return None
        self._begun = self._begun or time.perf_counter()
        return self._open[0][1]

    def settle(self, steps: int) -> bool:
        """After a slice: as `advance`."""
        answering = self._open[0][1]
        if answering.token_ids and not self._first_token:
            self._first_token = time.perf_counter()
        if answering.finish_reason:
            self._close(steps)
        if self._open:
            return False
        self._tell(Outcome(tuple(self._answers), ''))
        return True

    def end(self, code: Code, reason: str) -> None:
        """Have the engine close it with what there is, before its next slice. From any thread; wake the engine afterwards."""
        self._ending = self._ending or (code, reason)

    @property
    def is_ending(self) -> bool:
        """Whether somebody wants no more of it."""
        return self._ending is not None

    def close(self, steps: int) -> None:
        """What `end` asked for."""
        self._stop(*self._ending, 'canceled', steps)

    def fail(self, reason: str, code: Code = Code.UNKNOWN) -> None:
        """End it without an answer."""
        self._tell(Outcome((), reason, code))

    def tell_progress(self, place: int) -> None:
        """Tell how far it is, unless nobody wants to know or it was told so short a time ago that telling would cost too much."""
        begun = time.perf_counter()
        if self.on_progress is None or self._told or begun < self._tell_again:
            return
        name, answering = self._open[0] if self._begun else ('', None)
        self.on_progress(Progress(place) if answering is None else Progress(
            place, name, answering.text, len(answering.token_ids), answering.newest_evidence(_LOOKED_AT)))
        now = time.perf_counter()
        self._tell_again = now + (now - begun) * (1 / _PROGRESS_SHARE - 1)

    def _tell(self, outcome: Outcome) -> None:
        if not self._told:
            self._told = True
            self.done(outcome)

    def _time_out(self, steps: int) -> None:
        tokens = sum(len(answering.token_ids) for _, answering in self._open)
        self._stop(Code.TIMEOUT, f'no full answer within timeout_s = {self.timeout_s:g} s ({tokens} tokens so far): ask for '
                                 'fewer max_tokens or allow more time', 'timeout', steps)

    def _stop(self, code: Code, reason: str, finish_reason: str, steps: int) -> None:
        while self._open:
            self._open[0][1].finish(finish_reason)
            self._close(steps)
        self._tell(Outcome(tuple(self._answers), reason, code))

    def _close(self, steps: int) -> None:
        name, answering = self._open.pop(0)
        now = time.perf_counter()
        self._answers.append(CameraAnswer(
            name, answering.result(), ((self._begun or now) - self.asked) * 1e3,
            (self._first_token - self.asked) * 1e3 if self._first_token else 0.0, (now - self.asked) * 1e3,
            steps - self._steps_before))
        self._begun = self._first_token = 0.0
