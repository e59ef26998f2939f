"""A question under way, seen by who asked it."""
import threading
import time
import uuid
from collections.abc import Callable

from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.task import Future

from statekv_ros.action import Ask
from statekv_ros.client.action import AskEnds
from statekv_ros.client.replies import Reply, Result, reply_of, without_answer
from statekv_ros.client.spinning import Spinning
from statekv_ros.errors import Code

GRACE_S = 1.0       # beyond the question's own time limit, for the reply's way back
_DISCOVERY_S = 5.0  # for a node to be found, where the time limit allows it
_GONE_S = 2.0       # a server that is not seen for so long has left
_LOOK_S = 0.05


class Asking(Future):
    """A question under way: `await` it in a coroutine of rclpy; elsewhere it is a future, with `done`, `result` and
    `add_done_callback`, or `wait` for it. Its result is a `Reply`, whatever happens; it never raises.

    Attributes:
        feedback: the newest that was heard (action/Ask.action): queue place, text so far, evidence of the newest token.
        key: the goal's id.
    """

    def __init__(self, node: Node, group: CallbackGroup, ends: AskEnds, spinning: Spinning, memory: str,
                 on_text: Callable[[str], None] | None, closed: Callable[['Asking'], None]):
        """on_text: called by the executor with the answer so far, when there is more of it; closed: once it is over."""
        super().__init__()
        self.feedback = Ask.Feedback()
        self.key = uuid.uuid4().bytes
        self._node, self._group, self._ends, self._spinning, self._memory = node, group, ends, spinning, memory
        self._on_text, self._closed = on_text, closed
        self._once = threading.Lock()
        self._over = self._canceled = self._accepted = False
        self._goal: Ask.Goal | None = None      # until it is sent
        self._timer = None
        self._sent: list[Future] = []       # requests
        self._deadline = self._seen = 0.0
        self._timeout_s = 0.0

    def start(self, goal: Ask.Goal) -> None:
        """Send it, now or once a node is found."""
        self._goal, self._timeout_s, self._seen = goal, goal.timeout_s, time.monotonic()
        self._deadline = self._seen + min(self._timeout_s, _DISCOVERY_S)
        self._timer = self._node.create_timer(_LOOK_S, self._look, self._group, Clock(clock_type=ClockType.STEADY_TIME))
        self._look()

    def cancel(self) -> None:
        """Have the node end it between two slices: the reply, with what there was, comes then."""
        with self._once:
            unsent, self._canceled = self._goal is not None, True
        if unsent:
            self.finish(without_answer(Result.CANCELED, 'canceled before it was sent', Code.CANCELED))
        elif self._accepted:
            self._sent.append(self._ends.cancel(self.key))

    def wait(self, timeout_s: float | None = None) -> Reply | None:
        """Block until the reply is there, or for so long; None when it is not. For programs, not for callbacks.

        Raises:
            WouldBlock: this is a callback whose executor has no other thread.
        """
        with self._spinning.blocking('Asking.wait'):
            return self.wait_here(timeout_s)

    def wait_here(self, timeout_s: float | None = None) -> Reply | None:
        """The same, in a thread that may block."""
        limit = min(self._timeout_s, _DISCOVERY_S) + self._timeout_s + 2 * GRACE_S
        self._spinning.wait(self.done, limit if timeout_s is None else min(timeout_s, limit))
        if timeout_s is None and not self.done():
            # Its timer would have ended it.
            self.finish(without_answer(Result.TIMEOUT, f'the executor of node {self._node.get_name()!r} ran no callback of this '
                                       f'question in {limit:g} s: is anybody spinning it, and are all its threads blocked?'))
        return self.result() if self.done() else None

    def heard(self, feedback: Ask.Feedback) -> None:
        """Feedback of its goal came."""
        grown, self.feedback = feedback.text not in ('', self.feedback.text), feedback
        if grown and self._on_text is not None and not self._over:
            self._on_text(feedback.text)

    def finish(self, reply: Reply) -> None:
        """The first reply counts."""
        with self._once:
            if self._over:
                return
            self._over, self._goal = True, None
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
        for future in self._sent:
            self._ends.forget(future)
        self._closed(self)
        self.set_result(reply)
        self._spinning.notify()

    def _look(self) -> None:
        """Called by its timer, which alone notices what does not happen."""
        now, ready = time.monotonic(), self._ends.is_ready()
        self._seen = now if ready else self._seen
        if self._over:
            return
        if self._goal is not None:
            if ready:
                self._send(now)
            elif now > self._deadline:
                self.finish(without_answer(Result.UNAVAILABLE, f'no memory node {self._memory!r}: is it running, in this '
                                                               'namespace and ROS_DOMAIN_ID?'))
        elif now > self._deadline:
            if self._accepted:
                self._sent.append(self._ends.cancel(self.key))
            self.finish(without_answer(Result.TIMEOUT, f'no reply from {self._memory!r} within {self._timeout_s:g} s',
                                       Code.TIMEOUT))
        elif now - self._seen > _GONE_S:
            self.finish(without_answer(Result.UNAVAILABLE, f'memory node {self._memory!r} left while it was answering'))

    def _send(self, now: float) -> None:
        with self._once:
            goal, self._goal = self._goal, None
        if goal is not None:
            self._deadline = now + self._timeout_s + GRACE_S
            self._expect(self._ends.send(self.key, goal), self._note_acceptance)

    def _note_acceptance(self, response) -> None:
        if not response.accepted:
            self.finish(without_answer(Result.FAILED, f'{self._memory!r} has too many goals to take another: ask again later',
                                       Code.QUEUE_FULL))
            return
        self._expect(self._ends.result(self.key), lambda response: self.finish(reply_of(response.status, response.result)))
        with self._once:
            self._accepted, canceled = True, self._canceled
        if canceled:
            self._sent.append(self._ends.cancel(self.key))

    def _expect(self, future: Future, take: Callable) -> None:
        self._sent.append(future)
        future.add_done_callback(lambda future: None if self._over else take(future.result()))
