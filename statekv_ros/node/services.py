"""~/query and ~/reset: requests become work for the engine, and what comes of it the response. Goals of ~/ask go the same way."""
import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from builtin_interfaces.msg import Time
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future

from statekv_ros.action import Ask
from statekv_ros.errors import Code, QuestionError, StateKVError, quoted
from statekv_ros.memory.pose import Place
from statekv_ros.msg import Answer
from statekv_ros.node import messages
from statekv_ros.node.engine import STOPPING, Engine
from statekv_ros.node.parameters import MAX_TOKENS, Parameters
from statekv_ros.node.pictures import Darkroom
from statekv_ros.node.pictures.evidence import EvidenceImage, evidence_pictures
from statekv_ros.node.pictures.markers import EvidenceMarkers
from statekv_ros.node.questions import Outcome, Progress, Question
from statekv_ros.srv import Query, Reset

# ROS's default keeps 10 requests and 10 responses: of more questions at once, some would never get a reply.
DEEP = QoSProfile(depth=1000)


class Services:
    """Serves both, and hands questions to the engine. No callback computes or waits."""

    def __init__(self, node: Node, group: CallbackGroup, settings: Parameters, engine: Callable[[], Engine],
                 publish: Callable[[Answer], None], darkroom: Darkroom, shown: Sequence[EvidenceImage | EvidenceMarkers]):
        """
        Args:
            group: a reentrant one: while one waits for its answer, the others go on.
            engine: raises QuestionError while there is none.
            publish: takes every answer; shown: what shows its evidence.
            darkroom: where pictures are looked up.
        """
        self._node, self._settings, self.engine, self._publish = node, settings, engine, publish
        self._darkroom, self._shown = darkroom, shown
        node.create_service(Query, '~/query', self._query, qos_profile=DEEP, callback_group=group)
        node.create_service(Reset, '~/reset', self._reset, qos_profile=DEEP, callback_group=group)

    def ask(self, engine: Engine, request: Query.Request | Ask.Goal, done: Callable[[Outcome], None],
            on_progress: Callable[[Progress], None] | None = None) -> Question:
        """Queue a question; both callbacks are the engine thread's. Raises StateKVError when it cannot be asked."""
        question = self._question(engine, request, done, on_progress)
        engine.ask(question)
        return question

    async def fill(self, engine: Engine, outcome: Outcome, asked: Time, with_images: bool,
                   response: Query.Response | Ask.Result) -> None:
        """Fill in and publish the answers; `asked` is the node's time of asking."""
        pictures = {}
        if with_images:
            loaded = Future()
            with contextlib.suppress(StateKVError):     # an answer is worth something without them, too
                looked_at = [(answer.camera, answer.result.evidence) for answer in outcome.answers]
                self.look_up(lambda: evidence_pictures(engine.cameras, looked_at), loaded)
                pictures = await loaded
        response.success, response.error_code = not outcome.error, outcome.code
        response.answers = [messages.answer(answer, asked, engine.cameras[answer.camera].frame_id, pictures)
                           for answer in outcome.answers]
        if response.answers:
            response.answer = messages.joined(response.answers)
        for answer in response.answers:
            self._publish(answer)
        for evidence in self._shown:
            evidence.show(engine.cameras, outcome.answers, asked)

    def look_up(self, work: Callable[[], Any], found: Future) -> None:
        """Have pictures looked up by a thread that may wait for a disk; `found` gets the result, or the StateKVError.

        Raises:
            QuestionError: the node is ending.
        """
        def look() -> None:
            try:
                found.set_result(work())
            except StateKVError as error:
                found.set_exception(error)
            except BaseException as error:
                found.set_exception(QuestionError(f'{type(error).__name__}: {error}', Code.UNKNOWN))
                raise
            finally:
                self.wake()

        if not self._darkroom.show(look):
            raise QuestionError(STOPPING, Code.SHUTTING_DOWN)

    def wake(self) -> None:
        """Have the executor look at what a future of ours was given by another thread."""
        if self._node.executor is not None:
            self._node.executor.wake()

    async def _query(self, request: Query.Request, response: Query.Response) -> Query.Response:
        asked, answered = self._node.get_clock().now().to_msg(), Future()
        try:
            engine = self.engine()
            self.ask(engine, request, lambda outcome: self._complete(answered, outcome))
        except StateKVError as error:
            response.error, response.error_code = str(error), error.code
            return response
        outcome: Outcome = await answered
        await self.fill(engine, outcome, asked, request.with_images, response)
        response.error = outcome.error
        return response

    async def _reset(self, request: Reset.Request, response: Reset.Response) -> Reset.Response:
        forgotten = Future()
        try:
            engine = self.engine()
            engine.reset(named(engine, request.camera), lambda *told: self._complete(forgotten, told))
        except StateKVError as error:
            response.error = str(error)
            return response
        response.frames_forgotten, response.error = await forgotten
        response.success = not response.error
        return response

    def _complete(self, future: Future, value) -> None:
        future.set_result(value)
        self.wake()

    def _question(self, engine: Engine, request: Query.Request | Ask.Goal, done: Callable[[Outcome], None],
                  on_progress: Callable[[Progress], None] | None) -> Question:
        limit = self._settings['max_question_chars']
        if len(request.question) > limit:
            raise QuestionError(f'question has {len(request.question)} characters, {limit} are allowed: shorten it, or raise '
                                'the parameter "max_question_chars"')
        if request.max_tokens > MAX_TOKENS:
            raise QuestionError(f'max_tokens must be at most {MAX_TOKENS}, got {request.max_tokens}: ask for fewer')
        if not 0 <= request.timeout_s < float('inf'):
            raise QuestionError(f'timeout_s must be 0 (the default) or a positive number of seconds, got {request.timeout_s}')
        span = tuple(messages.to_ns(stamp) or None for stamp in (request.from_stamp, request.to_stamp))
        options = {'answer_policy': request.answer_policy or self._settings['answer_policy'], 'span': span,
                   'max_tokens': request.max_tokens or self._settings['max_tokens'], 'temperature': request.temperature,
                   'seed': request.seed, 'evidence': self._settings['evidence_frames'], 'place': _place(request)}
        return Question(request.question, named(engine, request.camera), options,
                        request.timeout_s or self._settings['answer_timeout_s'], done, on_progress)


def _place(request: Query.Request | Ask.Goal) -> Place | None:
    if not 0 <= request.within_m < float('inf'):
        raise QuestionError(f'within_m must be 0 (not cut by place) or a positive number of metres, got {request.within_m}')
    if not request.within_m:
        return None
    frame, point = request.near.header.frame_id, request.near.point
    if not all(map(math.isfinite, (point.x, point.y, point.z))):
        raise QuestionError(f'near must be a point of finite numbers, got ({point.x}, {point.y}, {point.z})')
    if not frame:
        raise QuestionError('near.header.frame_id is empty: say in which frame the point is', Code.UNKNOWN_FRAME)
    return Place(frame, (point.x, point.y, point.z), request.within_m)


def named(engine: Engine, camera: str) -> list[str]:
    """Names of the cameras that a request is about. Raises QuestionError for an unknown one."""
    names = list(engine.cameras)
    if camera in ('', 'all'):
        return names
    if camera not in names:
        raise QuestionError(f'unknown camera {quoted(camera)}: the cameras are {", ".join(names)}, or "all"', Code.UNKNOWN_CAMERA)
    return [camera]
