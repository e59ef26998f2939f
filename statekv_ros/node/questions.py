"""A question on its way through the engine: one answer per camera asked, decoded slice by slice, within its time limit."""
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from statekv_ros.errors import QuestionError, StateKVError
from statekv_ros.memory import Answering, AnswerResult, VideoStream


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
    """What came of a question: answers in the order of the cameras, and an error, empty on success.

    A question that ran out of time has both: the answers hold what there was.
    """
    answers: tuple[CameraAnswer, ...]
    error: str


@dataclass
class Question:
    """A question and its progress.

    Attributes:
        text: what is asked; cameras: the streams to ask; options: as for `VideoStream.begin_answer`.
        timeout_s: seconds from now until it ends with what it has.
        done: called once, even when it raises; in the engine thread, or in the one that stops the engine.
    """
    text: str
    cameras: list[str]
    options: dict
    timeout_s: float
    done: Callable[[Outcome], None]
    asked: float = field(default_factory=time.perf_counter)
    _open: list[tuple[str, Answering]] = field(default_factory=list)
    _answers: list[CameraAnswer] = field(default_factory=list)
    _steps_before: int = 0
    _begun: float = 0.0
    _first_token: float = 0.0
    _told: bool = False

    def begin(self, streams: dict[str, VideoStream], steps: int) -> None:
        """Take a snapshot of every camera's memory, all at this frame boundary.

        Of several cameras, those that cannot answer (nothing seen yet, no frame in the time span) are left out.

        Raises:
            QuestionError: no camera can answer; the reason of each is named.
        """
        self._steps_before = steps
        reasons = []
        for name, stream in streams.items():
            try:
                self._open.append((name, stream.begin_answer(self.text, **self.options)))
            except StateKVError as error:
                reasons.append(f'camera {name!r}: {error}')
        if not self._open:
            raise QuestionError('; '.join(reasons))

    def advance(self, tokens: int, steps: int) -> bool:
        """One slice of the next answer; True when all are done and `done` has been called."""
        if time.perf_counter() - self.asked > self.timeout_s:
            self._time_out(steps)
            return True
        self._begun = self._begun or time.perf_counter()
        name, answering = self._open[0]
        finished = answering.advance(tokens)
        if answering.token_ids and not self._first_token:
            self._first_token = time.perf_counter()
        if finished:
            self._close(steps)
        if self._open:
            return False
        self._tell(Outcome(tuple(self._answers), ''))
        return True

    def fail(self, reason: str) -> None:
        """End it without an answer."""
        self._tell(Outcome((), reason))

    def _tell(self, outcome: Outcome) -> None:
        if not self._told:
            self._told = True
            self.done(outcome)

    def _time_out(self, steps: int) -> None:
        tokens = sum(len(answering.token_ids) for _, answering in self._open)
        while self._open:
            self._open[0][1].finish('timeout')
            self._close(steps)
        self._tell(Outcome(tuple(self._answers), f'no full answer within timeout_s = {self.timeout_s:g} s ({tokens} tokens '
                                                 'so far): ask for fewer max_tokens or allow more time'))

    def _close(self, steps: int) -> None:
        name, answering = self._open.pop(0)
        now = time.perf_counter()
        self._answers.append(CameraAnswer(
            name, answering.result(), ((self._begun or now) - self.asked) * 1e3,
            (self._first_token - self.asked) * 1e3 if self._first_token else 0.0, (now - self.asked) * 1e3,
            steps - self._steps_before))
        self._begun = self._first_token = 0.0
