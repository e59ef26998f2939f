"""The client: one memory node, asked from a program or from inside another node."""
import time
from collections.abc import Callable, Sequence

from builtin_interfaces.msg import Time
from geometry_msgs.msg import PointStamped
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.client import Client
from rclpy.executors import Executor
from rclpy.node import Node
from rclpy.task import Future
from rclpy.time import Time as ClockTime

from statekv_ros.action import Ask
from statekv_ros.client.action import DEEP, AskEnds
from statekv_ros.client.arguments import make_goal, make_request, make_watch
from statekv_ros.client.asking import Asking
from statekv_ros.client.replies import Reply, Result, without_answer
from statekv_ros.client.spinning import Spinning
from statekv_ros.client.watching import WatchEnds
from statekv_ros.errors import Code
from statekv_ros.msg import Alert, Picture
from statekv_ros.srv import Frames, Reset

_READY_EVERY_S = 0.05


class StateKVClient:
    """Asks one memory node. From any thread; docs/client.md shows it in programs, in each kind of callback and in a lifecycle node.

    Calls that wait (`ask`, `frames`, `reset`, `watch`, `unwatch`, `wait_until_ready`, `spin_for`) are for programs and threads. In a
    callback they raise `WouldBlock` where no other thread could go on; `ask_async`, `watch_async` and `unwatch_async` are for
    callbacks. A node that no executor has is spun by those who wait; one that an executor has, or is given later, is that
    executor's alone.

    Attributes:
        node: the ROS node it uses; subscriptions made on it are served while this client waits.
    """

    def __init__(self, memory: str = 'statekv', node: Node | None = None, executor: Executor | None = None):
        """
        Args:
            memory: name of the memory node, with its namespace if it has one.
            node: an existing node to use instead of one of its own.
            executor: one that will have `node` before anything is asked; not needed where it has it already.
        """
        self.node = node or Node('statekv_client')
        self._own_node = node is None
        self._memory = memory
        self._askings: dict[bytes, Asking] = {}
        self._spinning = Spinning(self.node, executor is not None)
        # A group of its own: in the node's default one, no answer could be received while one of the node's callbacks waits.
        self._group = ReentrantCallbackGroup()
        self._ends = AskEnds(self.node, memory, self._group, self._hear)
        self._reset, self._frames = (
            self.node.create_client(kind, f'{memory}/{name}', qos_profile=DEEP, callback_group=self._group)
            for kind, name in ((Reset, 'reset'), (Frames, 'frames')))
        self._watching = WatchEnds(self.node, memory, self._group, self._spinning)

    def __enter__(self) -> 'StateKVClient':
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Give back what it made; questions under way end as failed."""
        for asking in list(self._askings.values()):
            asking.cancel()
            asking.finish(without_answer(Result.CANCELED, 'the client was closed', Code.CANCELED))
        self._ends.destroy()
        self._watching.destroy()
        for client in (self._reset, self._frames):
            self.node.destroy_client(client)
        self._spinning.close()
        if self._own_node:
            self.node.destroy_node()

    def wait_until_ready(self, timeout_s: float = 60.0) -> bool:
        """Wait until the memory node is there; it may still be loading its model, and says so when asked.

        Raises:
            WouldBlock: see the class.
        """
        with self._spinning.blocking('wait_until_ready'):
            return self._find(self._ends.is_ready, timeout_s)

    def ask(self, question: str, camera: str = '', timeout_s: float = 30.0, max_tokens: int = 0, temperature: float = 0.0,
            seed: int = 0, answer_policy: str = '', from_stamp: Time | ClockTime | None = None,
            to_stamp: Time | ClockTime | None = None, on_text: Callable[[str], None] | None = None,
            near: PointStamped | None = None, within_m: float = 0.0, with_images: bool = False) -> Reply:
        """Ask, and wait for the answer until `timeout_s` seconds have passed; then the node stops answering, too.

        Args:
            camera: name of a camera; empty or 'all' asks every camera.
            max_tokens, answer_policy: the node's defaults when 0 or empty.
            temperature: 0 takes the most likely token, above 0 samples with `seed`.
            from_stamp, to_stamp: oldest and newest header stamp that the answer may use.
            near, within_m: use only frames seen from within so many metres of a point; its stamp means nothing.
            with_images: evidence carries its pictures.
            on_text: called with the answer so far, whenever there is more of it.

        Returns:
            What came of it, a value that cannot work included (`Result.FAILED`, with a sentence).

        Raises:
            WouldBlock: see the class.
        """
        with self._spinning.blocking('ask'):
            asking = self.ask_async(question, camera, timeout_s, max_tokens, temperature, seed, answer_policy, from_stamp,
                                    to_stamp, on_text, near, within_m, with_images)
            try:
                return asking.wait_here()
            except BaseException:   # Ctrl-C: nobody wants the answer any more
                asking.cancel()
                raise

    def ask_async(self, question: str, camera: str = '', timeout_s: float = 30.0, max_tokens: int = 0, temperature: float = 0.0,
                  seed: int = 0, answer_policy: str = '', from_stamp: Time | ClockTime | None = None,
                  to_stamp: Time | ClockTime | None = None, on_text: Callable[[str], None] | None = None,
                  near: PointStamped | None = None, within_m: float = 0.0, with_images: bool = False) -> Asking:
        """As `ask`, without waiting: await what it returns, or give it a callback; its `cancel` ends the answer early.

        It goes on while the node is spun, by an executor or by a call of this client that waits.
        """
        asking = Asking(self.node, self._group, self._ends, self._spinning, self._memory, on_text, self._forget)
        try:
            goal = make_goal(question, camera, timeout_s, max_tokens, temperature, seed, answer_policy, from_stamp, to_stamp,
                             near, within_m, with_images)
        except ValueError as error:
            asking.finish(without_answer(Result.FAILED, str(error), Code.INVALID_ARGUMENT))
            return asking
        self._askings[asking.key] = asking
        asking.start(goal)
        return asking

    def reset(self, camera: str = '', timeout_s: float = 10.0) -> int:
        """Make the memory forget what a camera (or all) saw; returns the number of frames forgotten.

        Raises:
            RuntimeError: the node is not there or says no; as `WouldBlock`, see the class.
        """
        with self._spinning.blocking('reset'):
            return self._call(self._reset, Reset.Request(camera=camera), timeout_s).frames_forgotten

    def frames(self, stamps: Sequence[Time | ClockTime] = (), camera: str = '', from_stamp: Time | ClockTime | None = None,
               to_stamp: Time | ClockTime | None = None, max_images: int = 0, tolerance_s: float = 0.0,
               timeout_s: float = 10.0) -> list[Picture]:
        """Pictures of what a camera saw: those nearest to some stamps, or some out of a time span, evenly spread.

        Args:
            stamps: header stamps, as evidence has them.
            camera: empty where the node has one only.
            from_stamp, to_stamp, max_images: without stamps: span, and how many pictures of it (0: 16).
            tolerance_s: how far from its stamp a picture may be; 0: as far as the nearest is.

        Returns:
            One for each stamp, with a code and a sentence where there is no picture (msg/Picture.msg).

        Raises:
            ValueError: a value that cannot work.
            RuntimeError: the node is not there or says no; as `WouldBlock`, see the class.
        """
        request = make_request(stamps, camera, from_stamp, to_stamp, max_images, tolerance_s)
        with self._spinning.blocking('frames'):
            return list(self._call(self._frames, request, timeout_s).pictures)

    def watch(self, question: str, camera: str = '', condition: str = 'changes', every_steps: int = 0, every_s: float = 0.0,
              debounce: int = 1, expires_s: float = 0.0, max_tokens: int = 0, answer_policy: str = '',
              timeout_s: float = 10.0) -> str:
        """Have a question asked again and again; alerts come to `on_alert`. Returns the watch's id.

        Args:
            camera: name of a camera; may be empty where the node has only one.
            condition: 'changes', 'equals TEXT', 'matches REGEX', 'rises above NUMBER' or 'falls below NUMBER'.
            every_steps, every_s: frame steps, or seconds of header time, between two checks; each step where both are 0.
            debounce: checks in a row in which the condition must hold.
            expires_s: seconds until it ends by itself, over restarts of the node; 0: never.
            max_tokens, answer_policy: of each answer; the node's defaults when 0 or empty.

        Raises:
            ValueError: a value that cannot work.
            WatchRefused: the node is not there or says no; as `WouldBlock`, see the class.
        """
        request = make_watch(question, camera, condition, every_steps, every_s, debounce, expires_s, max_tokens, answer_policy)
        with self._spinning.blocking('watch'):
            return self._watching.response(self._watching.watch(request, timeout_s), timeout_s).id

    def watch_async(self, question: str, camera: str = '', condition: str = 'changes', every_steps: int = 0, every_s: float = 0.0,
                    debounce: int = 1, expires_s: float = 0.0, max_tokens: int = 0, answer_policy: str = '',
                    timeout_s: float = 10.0) -> Future:
        """As `watch`, without waiting: a future of the response (srv/Watch.srv), which says why not where there is no node or no
        reply in time.

        Raises:
            ValueError: a value that cannot work.
        """
        return self._watching.watch(make_watch(question, camera, condition, every_steps, every_s, debounce, expires_s, max_tokens,
                                               answer_policy), timeout_s)

    def unwatch(self, id: str, timeout_s: float = 10.0) -> int:
        """End a watch, or 'all' of the node's; how many ended.

        Raises:
            WatchRefused: there is none of that id, or no node; as `WouldBlock`, see the class.
        """
        with self._spinning.blocking('unwatch'):
            return self._watching.response(self._watching.unwatch(id, timeout_s), timeout_s).ended

    def unwatch_async(self, id: str, timeout_s: float = 10.0) -> Future:
        """As `unwatch`, without waiting: a future of the response (srv/Unwatch.srv)."""
        return self._watching.unwatch(id, timeout_s)

    def on_alert(self, callback: Callable[[Alert], None], id: str = '') -> Callable[[], None]:
        """Have the executor call it with each alert (msg/Alert.msg) of one watch, from its first on, or of all watches, those of
        others too, from now on. Call what it returns to hear no more."""
        return self._watching.on_alert(callback, id)

    def spin_for(self, seconds: float) -> None:
        """Serve this node's callbacks for a while; for programs that have no executor of their own.

        Raises:
            WouldBlock: see the class.
        """
        with self._spinning.blocking('spin_for'):
            self._spinning.wait(lambda: False, seconds)

    def _call(self, client: Client, request, timeout_s: float):
        if not self._find(client.service_is_ready, timeout_s):
            raise RuntimeError(f'no memory node {self._memory!r}')
        future = client.call_async(request)
        future.add_done_callback(lambda _: self._spinning.notify())
        if not self._spinning.wait(future.done, timeout_s):
            client.remove_pending_request(future)
            raise RuntimeError(f'no reply from {self._memory!r} within {timeout_s:g} s')
        if not future.result().success:
            raise RuntimeError(future.result().error)
        return future.result()

    def _find(self, is_there: Callable[[], bool], timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while not is_there() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _READY_EVERY_S))
        return is_there()

    def _hear(self, key: bytes, feedback: Ask.Feedback) -> None:
        if (asking := self._askings.get(key)) is not None:
            asking.heard(feedback)

    def _forget(self, asking: Asking) -> None:
        self._askings.pop(asking.key, None)
