"""The engine: one thread that alone owns the model, the GPU and the streams. No ROS in here.

A round takes at most one waiting image of each camera, those of one size together, and then decodes one slice of one question,
or of all whose answers' next tokens one pass can find, or of a watch's check where nobody asks. So an image waits for one slice
and for the other cameras' steps at most, answers go on however fast images come, and neither stops the other. A slice has as many
tokens however many questions share it, but one of each at least.
"""
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from statekv_ros.errors import Code, Interrupted, QuestionError, StateKVError
from statekv_ros.memory import StepReport
from statekv_ros.memory.together import Together
from statekv_ros.node.camera import Camera
from statekv_ros.node.disk import Disk
from statekv_ros.node.frame_steps import FrameSteps
from statekv_ros.node.questions import Question
from statekv_ros.node.reasons import code_of, reason_of
from statekv_ros.node.slices import advance, sharing
from statekv_ros.node.watches.checks import Checks

STOPPING = 'the node is shutting down'


@dataclass
class _Reset:
    cameras: list[Camera]
    done: Callable[[int, str], None]
    disk: Disk | None
    checks: Checks | None

    def run(self) -> None:
        try:
            frames = sum(camera.stream.reset() for camera in self.cameras)
            if self.checks is not None:
                self.checks.forget_answers([camera.name for camera in self.cameras])
            for camera in self.cameras:
                if camera.album is not None:
                    camera.album.clear()
        except Exception as error:  # whoever asked must hear of it
            self.fail(reason_of(error), Code.UNKNOWN)
        else:
            if self.disk is None:
                self.done(frames, '')
            else:
                self.disk.clear([camera.name for camera in self.cameras], lambda error: self.done(frames, error))

    def fail(self, reason: str, code: Code) -> None:
        self.done(0, reason)


class Engine:
    """Runs frame steps and answers in turn; `start` gives it its thread, `run_round` is one turn.

    Attributes:
        active: questions that are being answered.
        checks: of the watches; None where there are none.
        is_lost: whether an error means that the device is gone; the engine then ends. on_lost: told of it, with the reason.
    """

    def __init__(self, cameras: list[Camera], on_step: Callable[[Camera, StepReport, float], None],
                 slice_tokens: Callable[[], int], max_queued: int, log: Callable[[str], None], disk: Disk | None = None,
                 checks: Checks | None = None):
        """
        Args:
            on_step: called in the engine thread after each frame step, with the ms its last image waited in the mailbox.
            slice_tokens: tokens to decode, of all questions together, before images get their turn again; asked each time, so it
                can change.
            max_queued: questions that may wait or be answered at once.
            log: takes what went wrong unexpectedly, with its traceback.
            disk: keeps what is seen; None where nothing does.
        """
        self.cameras = {camera.name: camera for camera in cameras}
        self.active: deque[Question] = deque()
        self.checks = checks
        self._slice_tokens, self._max_queued, self._log = slice_tokens, max_queued, log
        self._frame_steps = FrameSteps(cameras, on_step, self._end_if_lost, log, disk, checks)
        self._inbox: deque[Question | _Reset] = deque()
        self._wake = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._working, self._progress = False, 0.0
        self._poses_came = False
        self.is_lost: Callable[[Exception], bool] = lambda error: False
        self.on_lost: Callable[[str], None] = lambda reason: None
        self._ended = STOPPING, Code.SHUTTING_DOWN      # what is said to those that wait, or come, after the end
        self._disk = disk
        if disk is not None:
            disk.on_idle = self.notify
        for camera in cameras:
            camera.stream.cancelled = self._note_progress

    @property
    def steps(self) -> int:
        """Frame steps of all cameras so far."""
        return self._frame_steps.count

    @property
    def together(self) -> Together:
        """What steps the cameras' streams."""
        return self._frame_steps.together

    @property
    def stopping(self) -> bool:
        """Whether work in progress should end; streams look at it once per layer, or per replayed step."""
        return self._stopping.is_set()

    def stuck_s(self) -> float:
        """Seconds since the thread, at work, last finished a layer, a step or a slice; 0 while it waits for work."""
        return time.monotonic() - self._progress if self._working else 0.0

    def start(self) -> None:
        """Begin to take turns in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name='statekv-engine', daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 4.0) -> bool:
        """End work in progress between two layers and answer what waits with an error; True when the thread ended."""
        self._stopping.set()
        self.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._frame_steps.ahead.close()
        self._fail_all()
        return self._thread is None or not self._thread.is_alive()

    def notify(self) -> None:
        """Something waits: an image in a mailbox, a question. From any thread."""
        with self._wake:
            self._wake.notify()

    def note_image(self, camera: str) -> None:
        """An image of this camera waits in its mailbox. From any thread."""
        self._frame_steps.ahead.look(self.cameras[camera])
        self.notify()

    def note_poses(self) -> None:
        """Poses came, which steps that were made before may have waited for. From any thread."""
        if any(camera.stream.late.wants(camera.stream.pending) for camera in self.cameras.values()):
            with self._wake:
                self._poses_came = True
                self._wake.notify()

    def ask(self, question: Question) -> None:
        """Queue a question; its `done` is called from the engine thread.

        Raises:
            QuestionError: too many are waiting, or the engine is stopping.
        """
        with self._wake:
            waiting = len(self.active) + len(self._inbox)
            if waiting >= self._max_queued:
                raise QuestionError(f'{waiting} questions are waiting already: ask again later, or raise the parameter '
                                    '"max_queued_questions"', Code.QUEUE_FULL)
            self._put(question)

    def reset(self, names: list[str], done: Callable[[int, str], None]) -> None:
        """Forget what these cameras saw, at the next frame boundary; `done` gets the number of frames forgotten and an error,
        empty on success.

        Raises:
            QuestionError: the engine is stopping.
        """
        with self._wake:
            self._put(_Reset([self.cameras[name] for name in names], done, self._disk, self.checks))

    def run_round(self) -> bool:
        """One turn: one image of each camera, new questions, one slice of questions or of a check. False when there was nothing.

        Images come first, so that a question sees those that were there before it; checks come when nobody asks. Questions that
        somebody wants to end are closed between any of these: within one frame step or slice.
        """
        if self._disk is not None:
            self._disk.save_snapshots()
        self._poses_came = False
        self._frame_steps.locate_again()
        return any([self._watch(), self._admit(), self._close_ending(), self._decode_slice() or self._check()])

    def _put(self, entry: Question | _Reset) -> None:
        # Under the lock that `_fail_all` takes after `stopping` was set: whatever comes in is failed there or refused here.
        if self.stopping:
            raise QuestionError(*self._ended)
        self._inbox.append(entry)
        self._wake.notify()

    def _run(self) -> None:
        while not self._note_progress():
            try:
                self._working = True
                if not self.run_round():
                    with self._wake:
                        if not (self._inbox or self.stopping or self._poses_came
                                or any(map(self._frame_steps.can_take, self.cameras.values()))):
                            self._working = False
                            self._wake.wait(self.checks.wait_s() if self.checks is not None else None)
            except Interrupted:
                break
            except Exception:  # of a callback: nobody's trouble may end the only thread that watches
                self._log(f'a callback failed: {traceback.format_exc()}')
        self._working = False
        self._fail_all()

    def _end_if_lost(self, error: Exception) -> None:
        """Raise Interrupted for good when the device is gone: every further step would fail too."""
        if self.is_lost(error):
            reason = reason_of(error)
            self._ended = f'the GPU was lost ({reason}): /diagnostics says what becomes of the node', Code.NOT_CONFIGURED
            self._stopping.set()
            self.on_lost(reason)
            raise Interrupted('the GPU was lost')

    def _note_progress(self) -> bool:
        self._progress = time.monotonic()
        return self.stopping

    def _admit(self) -> bool:
        admitted = bool(self._inbox)
        while self._inbox:
            entry, begun = self._inbox[0], False    # it stays there meanwhile, so that it counts as waiting
            try:
                begun = self._begin(entry)
            finally:
                with self._wake:
                    if self._inbox:     # `stop` may have given up waiting for this thread and have taken it
                        self._inbox.popleft()
                    if begun:
                        self.active.append(entry)
        return admitted

    def _begin(self, entry: Question | _Reset) -> bool:
        """Do what can be done at once; whether slices are to follow."""
        if isinstance(entry, _Reset):
            entry.run()
            return False
        if entry.is_ending:
            entry.close(self.steps)
            return False
        try:
            entry.begin({name: self.cameras[name].stream for name in entry.cameras}, self.steps)
            entry.tell_progress(len(self.active))
        except Exception as error:  # a question's trouble is its own
            entry.fail(reason_of(error), code_of(error))
            self._end_if_lost(error)
            return False
        return True

    def _close_ending(self) -> bool:
        """Close the questions that somebody wants to end, whoever's turn it is."""
        ending = [question for question in tuple(self.active) if question.is_ending]
        for question in ending:
            try:
                self.active.remove(question)
            except ValueError:  # `stop` gave up waiting for this thread and has taken it
                continue
            try:
                question.close(self.steps)
            except Exception as error:  # a question's trouble is its own
                question.fail(reason_of(error), code_of(error))
                raise
        return bool(ending)

    def _watch(self) -> bool:
        # Always in the same order: an image then waits for one step of each other camera, never for two of one.
        return any([work for cameras in self._frame_steps.batches()
                    for work in (self._close_ending(), self._frame_steps.run(cameras))])

    def _decode_slice(self) -> bool:
        active = tuple(self.active)
        if not active:
            return False
        questions = sharing(active)     # they stay there meanwhile, so that they count as active
        outcomes = advance(questions, self._slice_tokens(), self.steps)
        with ExitStack() as each:       # what one's callback raises keeps nobody from hearing of the others
            for question, outcome in reversed(list(zip(questions, outcomes))):
                each.callback(self._settle, question, outcome, len(active) - len(questions))
        return True

    def _settle(self, question: Question, outcome: bool | Exception, place: int) -> None:
        """place: questions that get a slice before this one gets its next."""
        finished = True
        try:
            if isinstance(outcome, Exception):
                raise outcome
            finished = outcome
            if not finished:
                question.tell_progress(place)
        except Exception as error:  # a question's trouble is its own
            if not isinstance(error, StateKVError):
                self._log(f'answering {question.text[:80]!r} failed: {traceback.format_exc()}')
            finished = True
            question.fail(reason_of(error), code_of(error))
            self._end_if_lost(error)
        finally:    # also when the callback that takes the outcome raises: one that stayed would be told without end
            with self._wake:
                if question in self.active:     # `stop` may have given up waiting for this thread and have taken it
                    self.active.remove(question)
                    self.active.extend([] if finished else [question])

    def _check(self) -> bool:
        return self.checks is not None and self.checks.advance(self._slice_tokens())

    def _fail_all(self) -> None:
        with self._wake:
            entries = [*self.active, *self._inbox]
            self.active.clear()
            self._inbox.clear()
        for entry in entries:
            try:
                entry.fail(*self._ended)
            except Exception:  # of its callback: the others are told all the same
                self._log(f'a callback failed: {traceback.format_exc()}')
