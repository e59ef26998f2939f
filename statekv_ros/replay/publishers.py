"""The ROS side of the player: a node with one publisher per image topic, one per topic with poses, and one for /clock."""
import threading
import time
from collections.abc import Callable

import rclpy
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rclpy.duration import Duration
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image

from statekv_ros.errors import BagError

CLOCK_PERIOD_S = 0.02           # 50 Hz of wall time, so that timers of sim-time nodes stay smooth
DEPTH = 10                      # images held for a reliable subscriber that falls behind
# A publisher can know a subscriber before that one knows the publisher, and best-effort images are lost until then.
_SETTLE_S = 0.5
_LINGER_S = 5.0                 # at the end, for reliable subscribers to take the last images
_POSES = 200                    # poses held likewise
_LOOK_S = 0.05                  # how often waiting looks at `stop`
_TYPES = {'sensor_msgs/msg/Image': Image, 'sensor_msgs/msg/CompressedImage': CompressedImage, 'nav_msgs/msg/Odometry': Odometry,
          'geometry_msgs/msg/PoseStamped': PoseStamped, 'geometry_msgs/msg/PoseWithCovarianceStamped': PoseWithCovarianceStamped}


class Publishers:
    """A context manager around a node of its own; signals are left to the caller.

    topics: name -> message type. reliable: offered reliability. clock: whether tell_clock publishes. beside: topics with poses,
    always reliable; nobody is waited for on those.
    """

    def __init__(self, topics: dict[str, str], reliable: bool, clock: bool, beside: dict[str, str]):
        self._types, self._reliable, self._clock_wanted, self._beside_types = topics, reliable, clock, beside

    def __enter__(self) -> 'Publishers':
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        try:
            self._node = rclpy.create_node('statekv_bag', context=self._context, start_parameter_services=False,
                                           enable_rosout=False)
            reliability = ReliabilityPolicy.RELIABLE if self._reliable else ReliabilityPolicy.BEST_EFFORT
            qos = QoSProfile(depth=DEPTH, reliability=reliability)
            self._images = {name: self._node.create_publisher(_TYPES[kind], name, qos)
                            for name, kind in self._types.items()}
            self._beside = {name: self._node.create_publisher(_TYPES[kind], name, QoSProfile(depth=_POSES))
                            for name, kind in self._beside_types.items()}
            self._clock = None
            if self._clock_wanted:
                self._clock = self._node.create_publisher(Clock, '/clock', QoSProfile(depth=1))
        except BaseException:
            rclpy.shutdown(context=self._context)
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)

    def publish(self, topic: str, cdr: bytes) -> None:
        """Publish a serialised message as it is."""
        (self._images.get(topic) or self._beside[topic]).publish(cdr)

    def tell_clock(self, time_ns: int) -> None:
        """Publish /clock, if it is wanted."""
        if self._clock is not None:
            message = Clock()
            message.clock.sec, message.clock.nanosec = divmod(time_ns, 10**9)
            self._clock.publish(message)

    def wait_for_subscribers(self, count: int, seconds: float, stop: threading.Event,
                             clock_ns: Callable[[], int]) -> bool:
        """Wait until every topic has `count` subscribers, telling the clock meanwhile. False if stopped, else True.

        Raises BagError when they do not come in time.
        """
        deadline_s = time.monotonic() + seconds
        while missing := [name for name, images in self._images.items() if images.get_subscription_count() < count]:
            if time.monotonic() > deadline_s:
                raise BagError(f'fewer than {count} subscribers on {", ".join(missing)} after {seconds:g} s: start the '
                               'node first, choose topics with --topics, or use --wait-subscribers 0')
            self.tell_clock(clock_ns())
            if stop.wait(CLOCK_PERIOD_S):
                return False
        settled_s = time.monotonic() + (_SETTLE_S if count else 0.0)
        while time.monotonic() < settled_s:
            self.tell_clock(clock_ns())
            if stop.wait(CLOCK_PERIOD_S):
                return False
        return True

    def topics_without_flow_control(self) -> list[str]:
        """Topics with a subscriber whose pace cannot be followed, because it (or this player) is best-effort."""
        if not self._reliable:
            return list(self._images)
        return [name for name in self._images
                if any(subscriber.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT
                       for subscriber in self._node.get_subscriptions_info_by_topic(name))]

    def wait_until_taken(self, topic: str, stop: threading.Event, seconds: float | None = None) -> bool:
        """Wait until all reliable subscribers have all images of the topic; False if stopped or out of time."""
        deadline_s = None if seconds is None else time.monotonic() + seconds
        while not self._images[topic].wait_for_all_acked(Duration(seconds=_LOOK_S)):
            if stop.is_set() or (deadline_s is not None and time.monotonic() > deadline_s):
                return False
        return True

    def let_arrive(self, stop: threading.Event) -> None:
        """Give the last images time to arrive before this process and its shared memory go away."""
        if self._reliable:
            for topic in self._images:
                self.wait_until_taken(topic, stop, _LINGER_S)
        stop.wait(_SETTLE_S)
