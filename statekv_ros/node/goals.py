"""~/ask: each goal is a question; its client hears the answer grow, and may end it between two slices."""
import threading
import traceback

from rclpy.action import CancelResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.task import Future

from statekv_ros.action import Ask
from statekv_ros.errors import Code, QuestionError, StateKVError
from statekv_ros.node import messages
from statekv_ros.node.action_server import BoundedActionServer
from statekv_ros.node.engine import Engine
from statekv_ros.node.questions import Outcome, Progress, Question
from statekv_ros.node.services import DEEP, Services

NOT_ACTIVE = Code.NOT_ACTIVE, 'the node is not active: activate it, or ask its service ~/query, which answers from what was seen'


class Goals:
    """Serves the action. Any number of goals at once; none preempts another. Not open until `open`.

    A goal whose client has died goes on until it ends or its time limit is over; its result is dropped in time, as all are.
    """

    def __init__(self, node: Node, group: CallbackGroup, services: Services):
        """group: a reentrant one."""
        self._node, self._services = node, services
        self._lock = threading.Lock()   # transitions run in a thread of their own
        self._closed: tuple[Code, str] | None = NOT_ACTIVE
        self._questions: dict[bytes, Question] = {}
        self._server = BoundedActionServer(node, Ask, '~/ask', self._execute, group, self._cancel, DEEP)

    def open(self) -> None:
        """From now on goals are answered."""
        with self._lock:
            self._closed = None

    def close(self, code: Code, reason: str) -> None:
        """From now on goals are aborted, those under way with what they have, within a slice. From any thread."""
        with self._lock:
            self._closed = code, reason
            for question in self._questions.values():
                question.end(code, reason)
        self._wake_engine()

    def destroy(self) -> None:
        """Take the action off the graph."""
        self._server.destroy()

    def _cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        question = self._questions.get(bytes(handle.goal_id.uuid))
        if question is not None:
            question.end(Code.CANCELED, 'canceled, as its client asked')
            self._wake_engine()
        return CancelResponse.ACCEPT

    def _wake_engine(self) -> None:
        try:
            self._services.engine().notify()
        except QuestionError:   # there is none, and so no question
            pass

    async def _execute(self, handle: ServerGoalHandle) -> Ask.Result:
        try:
            result = await self._answer(handle)
        except StateKVError as error:
            result = Ask.Result(error_code=error.code, error_msg=str(error))
        except Exception as error:  # rclpy would send an empty result, which says nothing
            self._node.get_logger().error(f'a goal failed: {traceback.format_exc()}')
            result = Ask.Result(error_code=Code.UNKNOWN, error_msg=f'{type(error).__name__}: {error}')
        if result.success:
            handle.succeed()
        elif result.error_code == Code.CANCELED and handle.is_cancel_requested:
            handle.canceled()
        else:
            handle.abort()
        return result

    async def _answer(self, handle: ServerGoalHandle) -> Ask.Result:
        asked, news, key = self._node.get_clock().now().to_msg(), _News(self._services.wake), bytes(handle.goal_id.uuid)
        engine = self._services.engine()
        self._begin(engine, handle, news)
        try:
            while (outcome := await news.next()) is None:
                if (progress := news.progress()) is not None:
                    handle.publish_feedback(messages.feedback(progress))
        finally:
            del self._questions[key]
        result = Ask.Result(error_msg=outcome.error)
        await self._services.fill(engine, outcome, asked, handle.request.with_images, result)
        return result

    def _begin(self, engine: Engine, handle: ServerGoalHandle, news: '_News') -> None:
        with self._lock:
            if self._closed is not None:
                code, reason = self._closed
                raise QuestionError(reason, code)
            question = self._services.ask(engine, handle.request, news.end, news.note)
            self._questions[bytes(handle.goal_id.uuid)] = question
        if handle.is_cancel_requested:  # before it began
            self._cancel(handle)


class _News:
    """What the engine's thread tells a goal's coroutine: of progress only the newest, so that a slow executor holds up nobody."""

    def __init__(self, wake):
        self._wake = wake
        self._lock = threading.Lock()
        self._told = Future()
        self._progress: Progress | None = None
        self._outcome: Outcome | None = None

    def note(self, progress: Progress) -> None:
        """From the engine's thread."""
        self._progress = progress
        self._tell()

    def end(self, outcome: Outcome) -> None:
        """From the engine's thread, or the one that stops it."""
        self._outcome = outcome
        self._tell()

    def progress(self) -> Progress | None:
        """The newest, once."""
        progress, self._progress = self._progress, None
        return progress

    async def next(self) -> Outcome | None:
        """Wait for something new; the outcome, or None where it is progress."""
        await self._told
        with self._lock:
            self._told = Future()
        return self._outcome

    def _tell(self) -> None:
        with self._lock:
            if not self._told.done():
                self._told.set_result(None)
        self._wake()
