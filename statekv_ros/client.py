"""A planner's way to the memory: ask a question, get an answer with stamps, in a few lines.

    rclpy.init()
    with StateKVClient() as memory:
        memory.wait_until_ready()
        reply = memory.ask('where did you last see the red toolbox?', timeout_s=5.0)
        if reply.result is Result.SUCCEEDED:
            print(reply.answer.text, reply.answer.last_stamp)
        else:
            print(reply.error)
"""
import enum
import threading
import time
from dataclasses import dataclass

from builtin_interfaces.msg import Time
from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future

from statekv_ros.msg import Answer
from statekv_ros.srv import Query, Reset

_GRACE_S = 1.0      # beyond the question's own time limit, for the reply's way back


class Result(enum.Enum):
    """How asking ended."""
    SUCCEEDED = 'succeeded'
    FAILED = 'failed'               # the node said no; see `error`
    TIMEOUT = 'timeout'             # the time limit passed; `answer` holds what there was, if anything
    UNAVAILABLE = 'unavailable'     # there is no such node


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        answer: the answer (of several cameras: a line of text each); empty unless something was answered.
        answers: one per camera.
        error: why not, and what to do; empty on success.
    """
    result: Result
    answer: Answer
    answers: tuple[Answer, ...]
    error: str


class StateKVClient:
    """Asks one memory node. Blocks its caller, not its node: give it no executor that the caller itself is spinning.

    Attributes:
        node: the ROS node it uses; subscriptions made on it are served while this client waits.
    """

    def __init__(self, memory: str = 'statekv', node: Node | None = None, executor: Executor | None = None):
        """
        Args:
            memory: name of the memory node, with its namespace if it has one.
            node: an existing node to use instead of one of its own; with `executor`, somebody else spins it.
            executor: an executor that another thread spins and that holds `node`.
        """
        self.node = node or Node('statekv_client')
        self._own_node = node is None
        self._spun_elsewhere = executor is not None
        self._executor = executor or SingleThreadedExecutor(context=self.node.context)
        if not self._spun_elsewhere:
            self._executor.add_node(self.node)
        self._query = self.node.create_client(Query, f'{memory}/query')
        self._reset = self.node.create_client(Reset, f'{memory}/reset')
        self._memory = memory

    def __enter__(self) -> 'StateKVClient':
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Give back what it made."""
        self.node.destroy_client(self._query)
        self.node.destroy_client(self._reset)
        if not self._spun_elsewhere:
            self._executor.remove_node(self.node)
            self._executor.shutdown(timeout_sec=0)
        if self._own_node:
            self.node.destroy_node()

    def wait_until_ready(self, timeout_s: float = 60.0) -> bool:
        """Wait until the memory node is there; it may still be loading its model, and says so when asked."""
        return self._query.wait_for_service(timeout_s)

    def ask(self, question: str, camera: str = '', timeout_s: float = 30.0, max_tokens: int = 0, temperature: float = 0.0,
            seed: int = 0, answer_policy: str = '', from_stamp: Time | None = None, to_stamp: Time | None = None) -> Reply:
        """Ask, and wait for the answer until `timeout_s` seconds have passed; then the node stops answering, too.

        Args:
            camera: name of a camera; empty or 'all' asks every camera.
            max_tokens, answer_policy: the node's defaults when 0 or empty.
            temperature: 0 takes the most likely token, above 0 samples with `seed`.
            from_stamp, to_stamp: oldest and newest header stamp that the answer may use.
        """
        if not 0 < timeout_s < float('inf'):
            return Reply(Result.FAILED, Answer(), (), f'timeout_s must be a positive number of seconds, got {timeout_s}')
        if not self._query.wait_for_service(min(timeout_s, 5.0)):
            return Reply(Result.UNAVAILABLE, Answer(), (), f'no memory node {self._memory!r}: is it running, in this '
                                                           'namespace and ROS_DOMAIN_ID?')
        request = Query.Request(question=question, camera=camera, timeout_s=float(timeout_s), max_tokens=max_tokens,
                                temperature=float(temperature), seed=seed, answer_policy=answer_policy,
                                from_stamp=from_stamp or Time(), to_stamp=to_stamp or Time())
        response = self._wait(self._query, request, timeout_s + _GRACE_S)
        if response is None:
            return Reply(Result.TIMEOUT, Answer(), (), f'no reply from {self._memory!r} within {timeout_s:g} s')
        result = Result.SUCCEEDED if response.success else \
            Result.TIMEOUT if any(answer.finish_reason == 'timeout' for answer in response.answers) else Result.FAILED
        return Reply(result, response.answer, tuple(response.answers), response.error)

    def reset(self, camera: str = '', timeout_s: float = 10.0) -> int:
        """Make the memory forget what a camera (or all) saw; returns the number of frames forgotten.

        Raises:
            RuntimeError: the node is not there or says no.
        """
        if not self._reset.wait_for_service(timeout_s):
            raise RuntimeError(f'no memory node {self._memory!r}')
        response = self._wait(self._reset, Reset.Request(camera=camera), timeout_s)
        if response is None or not response.success:
            raise RuntimeError(response.error if response else f'no reply from {self._memory!r} within {timeout_s:g} s')
        return response.frames_forgotten

    def spin_for(self, seconds: float) -> None:
        """Serve this node's subscriptions for a while; for programs that have no executor of their own."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(left)

    def _wait(self, client, request, seconds: float):
        future: Future = client.call_async(request)
        if self._spun_elsewhere:
            arrived = threading.Event()
            future.add_done_callback(lambda _: arrived.set())
            arrived.wait(seconds)
        else:
            self._executor.spin_until_future_complete(future, seconds)
        if not future.done():
            client.remove_pending_request(future)
            return None
        return future.result()
