"""The page's ROS node: hears the memory node on a thread of its own, and asks it for what browsers want."""
import threading
from concurrent.futures import ThreadPoolExecutor

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, ShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from statekv_ros.client import StateKVClient
from statekv_ros.msg import Alert, Answer, FrameTiming, Picture, Watches
from statekv_ros.view.facts import to_ns, to_stamp, told
from statekv_ros.view.history import History, Record
from statekv_ros.view.state import State

ANSWER_S, REPLY_S = 120.0, 5.0
_LOOK_S, _AGAIN = 2.0, 10      # how often the graph is looked at; diagnostics between two looks at what was forgotten


class Listener:
    """Fills a `State` and a `History`. Its methods may be called from any thread but its own; those that wait say so.

    Attributes:
        state, history: what was heard.
    """

    def __init__(self, memory: str):
        """memory: the node's name, with its namespace if it has one. rclpy is initialised."""
        self.node = Node('statekv_view')
        self._memory = memory
        full = self.node.resolve_topic_name(f'{memory}/timing').removesuffix('/timing')
        self.state, self.history = State(full[1:]), History()
        self._client = StateKVClient(memory, node=self.node)
        latched = DurabilityPolicy.TRANSIENT_LOCAL
        # What is lost of timing is not sent again: no page holds the node up.
        timing = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
        self._topics = {f'{full}/timing': (FrameTiming, self.state.note_timing, timing),
                        f'{full}/answer': (Answer, self.history.hear, QoSProfile(depth=100)),
                        f'{full}/alert': (Alert, lambda alert: self.state.note_alert(told(alert)),
                                          QoSProfile(depth=20, durability=latched)),
                        f'{full}/watches': (Watches, self.state.note_watches, QoSProfile(depth=1, durability=latched))}
        for topic, (kind, callback, qos) in self._topics.items():
            self.node.create_subscription(kind, topic, callback, qos)
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._note_health, QoSProfile(depth=10))
        self.node.create_timer(_LOOK_S, self._compare_versions, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._lookups = ThreadPoolExecutor(1, 'statekv-view-lookups')
        self._spans_of: dict[str, tuple] = {}       # by camera: frames forgotten when its span was looked up, and when that was
        self._heard = 0
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, name='statekv-view-ros', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Questions under way are canceled; nothing is heard any more."""
        self._lookups.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        self._executor.shutdown(timeout_sec=1.0)
        rclpy.try_shutdown()
        self._thread.join(2.0)

    def ask(self, question: str, camera: str) -> Record:
        """A question of this page's; its record grows by itself. Does not wait."""
        record = self.history.begin(question, camera)
        record.asking = self._client.ask_async(question, camera, timeout_s=ANSWER_S,
                                               on_text=lambda text: self.history.grow(record, text))
        record.asking.add_done_callback(lambda asking: self.history.end(record, asking.result()))
        return record

    def cancel(self, record: Record) -> None:
        """Hear no more of its answer; what there was stays."""
        if (asking := record.asking) is not None:
            asking.cancel()

    def watch(self, question: str, camera: str, condition: str, every_s: float, debounce: int) -> str:
        """A new standing question's id. Waits. Raises ValueError, WatchRefused."""
        return self._client.watch(question, camera, condition, every_s=every_s, debounce=debounce, timeout_s=REPLY_S)

    def unwatch(self, id: str) -> None:
        """End a standing question. Waits. Raises WatchRefused."""
        self._client.unwatch(id, timeout_s=REPLY_S)

    def pictures(self, camera: str, stamps: list[int], within_s: float) -> list[bytes | str]:
        """See `pictures.Fetch`. Waits."""
        condition = self.state.condition()
        if not condition.here:
            raise RuntimeError(condition.sentence)
        found = self._client.frames([to_stamp(stamp) for stamp in stamps], camera, tolerance_s=within_s, timeout_s=REPLY_S)
        shown = [bytes(picture.image.data) if picture.code == Picture.FOUND else picture.error for picture in found]
        return shown + ['the node left it out'] * (len(stamps) - len(shown))

    def _note_health(self, array: DiagnosticArray) -> None:
        if self.state.note_health(array):
            self._spans_of.clear()
        self._heard += 1
        for name, status in list(self.state.health.items()):
            if status.values.get('frames_held', '0') == '0':
                continue
            forgotten, known = status.values.get('frames_forgotten'), self._spans_of.get(name)
            if known is None or known[0] != forgotten and self._heard - known[1] >= _AGAIN:
                self._spans_of[name] = forgotten, self._heard
                self._lookups.submit(self._look_up_span, name)

    def _look_up_span(self, camera: str) -> None:
        """How far back its pictures reach."""
        try:
            found = [picture for picture in self._client.frames((), camera, max_images=2, timeout_s=REPLY_S)
                     if picture.code == Picture.FOUND]
        except (RuntimeError, ValueError):      # asked again with the next diagnostics
            self._spans_of.pop(camera, None)
            return
        if found:
            self.state.note_span(camera, to_ns(found[0].image.header.stamp), to_ns(found[-1].image.header.stamp))

    def _compare_versions(self) -> None:
        """ROS connects only ends whose types are equal; of the others it says nothing."""
        own_name = self.node.get_name()

        def types(ends, own: bool) -> set[str]:
            return {f'{end.topic_type} {end.topic_type_hash}' for end in ends if (end.node_name == own_name) == own}

        theirs = [(types(self.node.get_publishers_info_by_topic(topic), False),
                   types(self.node.get_subscriptions_info_by_topic(topic), True)) for topic in self._topics]
        self.state.other_version = any(told and not told & ours for told, ours in theirs)

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except (ExternalShutdownException, ShutdownException):
            pass
