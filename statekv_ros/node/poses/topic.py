"""Poses from a topic: odometry, or what a localisation tells."""
import threading
from functools import partial

from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message

from statekv_ros.errors import PoseError
from statekv_ros.memory.pose import Found, Pose
from statekv_ros.node.messages import to_ns
from statekv_ros.node.poses.buffer import PoseBuffer, make_pose
from statekv_ros.node.poses.source import PoseSource

KINDS = {'odometry': Odometry, 'pose': PoseStamped, 'pose_with_covariance': PoseWithCovarianceStamped}
_NAMES = {'nav_msgs/msg/Odometry': 'odometry', 'geometry_msgs/msg/PoseStamped': 'pose',
          'geometry_msgs/msg/PoseWithCovarianceStamped': 'pose_with_covariance'}
_LOOK_S = 0.2           # how often it is looked for a publisher, where its type decides
# Small and many: a busy process may take a while to come round to them. Best-effort receives from any publisher.
_QOS = QoSProfile(depth=200, reliability=ReliabilityPolicy.BEST_EFFORT)


class TopicPoses(PoseSource):
    """Keeps the newest 30 s of a topic, and tells the pose at a stamp from the two around it."""

    def __init__(self, node, topic: str, kind: str, frame_id: str, tolerance_s: float):
        """
        Args:
            kind: one of KINDS, or 'auto': as its publisher has it.
            frame_id: poses in another frame are refused; '': none is.
            tolerance_s: as of `PoseBuffer`.
        """
        super().__init__()
        self._node, self._topic, self._wanted, self._frame = node, topic, kind, frame_id
        self._kind = '' if kind == 'auto' else kind     # '': not known yet
        self._buffer = PoseBuffer(tolerance_s)
        self._group = MutuallyExclusiveCallbackGroup()
        self._lock = threading.Lock()       # transitions run in a thread of their own
        self._subscription = self._timer = None

    @property
    def name(self) -> str:
        return self._node.resolve_topic_name(self._topic) + (f' ({self._kind})' if self._kind else '')

    def open(self) -> None:
        with self._lock:
            if self._kind:
                self._subscribe()
            else:
                self._timer = self._node.create_timer(_LOOK_S, self._look, self._group, Clock(clock_type=ClockType.STEADY_TIME))

    def close(self) -> None:
        with self._lock:
            self._stop_looking()
            if self._subscription is not None:
                self._node.destroy_subscription(self._subscription)
                self._subscription = None
            self._kind = '' if self._wanted == 'auto' else self._wanted

    def at(self, stamp_ns: int, camera_frame: str, again: bool) -> Found:
        settled = self._buffer.has_passed(stamp_ns)     # looked at first: a pose may come in between
        return Found(self._buffer.at(stamp_ns), settled)

    def obstacle(self) -> str:
        sent = {p.topic_type for p in self._node.get_publishers_info_by_topic(self._topic)}
        if not sent:
            return f'nobody publishes {self._node.resolve_topic_name(self._topic)}'
        if not any(self._kind in ('', _NAMES.get(kind)) and kind in _NAMES for kind in sent):
            return (f'{" and ".join(sorted(sent))} is published on {self._node.resolve_topic_name(self._topic)}, '
                    f'{self._kind or " or ".join(_NAMES)} was expected: set the parameter "pose.topic" or "pose.type"')
        newest = self._buffer.newest
        return '' if newest is None else f'the newest pose is of stamp {newest.stamp_ns / 1e9:.3f} s'

    def _look(self) -> None:
        """For a publisher whose type can be read."""
        with self._lock:
            if self._timer is None:     # closed meanwhile
                return
            sent = {p.topic_type for p in self._node.get_publishers_info_by_topic(self._topic)}
            if kinds := sent & _NAMES.keys():
                self._kind = _NAMES[min(kinds)]
                self._stop_looking()
                self._subscribe()

    def _stop_looking(self) -> None:
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
            self._timer = None

    def _subscribe(self) -> None:
        kind = KINDS[self._kind]
        self._subscription = self._node.create_subscription(kind, self._topic, partial(self._receive, kind), _QOS, raw=True,
                                                            callback_group=self._group)

    def _receive(self, kind: type, raw: bytes) -> None:
        try:
            self._buffer.add(self._read(kind, raw))
        except PoseError as error:
            self.note_refusal(error)
            return
        self.received += 1
        self.jumps, self.newest_jump = self._buffer.jumps, self._buffer.newest_jump
        self.on_pose()

    def _read(self, kind: type, raw: bytes) -> Pose:
        try:
            message = deserialize_message(raw, kind)
        except Exception as error:  # whatever the middleware raises: these bytes are no such message
            raise PoseError(f'a message of {len(raw)} bytes is no {kind.__name__}: {error}') from error
        told, covariance = (message.pose, None) if kind is PoseStamped else (message.pose.pose, message.pose.covariance)
        frame, p, q = message.header.frame_id, told.position, told.orientation
        if self._frame and frame != self._frame:
            raise PoseError(f'a pose is in frame {frame!r}, {self._frame!r} was expected: set the parameter "pose.target_frame", '
                            'or "pose.topic" to one with poses in that frame')
        self.frame_id = frame
        return make_pose(to_ns(message.header.stamp), frame, (p.x, p.y, p.z), (q.x, q.y, q.z, q.w), covariance)
