"""Poses from tf2, on machines that have it."""
from rclpy.duration import Duration
from rclpy.time import Time

from statekv_ros.errors import ParameterError, PoseError
from statekv_ros.memory.pose import Pose
from statekv_ros.node.messages import to_ns
from statekv_ros.node.poses.buffer import KEPT_NS, leap, make_pose
from statekv_ros.node.poses.source import PoseSource


class TransformPoses(PoseSource):
    """Looks a stamp up in tf2's own buffer of the newest 30 s. tf2 tells no covariance."""

    def __init__(self, node, target_frame: str, source_frame: str, tolerance_s: float):
        """
        Args:
            target_frame: the frame to tell poses in, `map` say.
            source_frame: what is looked for; '': the frame of the image.
            tolerance_s: how far from a stamp the newest transform may be, where there is none at the stamp yet.

        Raises:
            ParameterError: tf2_ros cannot be imported.
        """
        super().__init__()
        try:
            import tf2_ros
        except ImportError as error:
            raise ParameterError(f'pose.target_frame is {target_frame!r} and pose.topic is empty, which asks for tf2, and '
                                 f'tf2_ros cannot be imported here ({error}): install it (ros-<distribution>-tf2-ros-py; there is no '
                                 'wheel of it), or set the parameter "pose.topic"') from error
        self._tf2, self._node, self._target, self._source = tf2_ros, node, target_frame, source_frame
        self._tolerance_ns = round(tolerance_s * 1e9)
        self._buffer = self._listener = None
        self._before: dict[str, Pose] = {}
        self.frame_id = target_frame

    @property
    def name(self) -> str:
        return f'tf2 ({self._source or "the frame of the image"} in {self._target})'

    def open(self) -> None:
        # Without the node the buffer offers no service of its own; the listener is spun with the node.
        self._buffer = self._tf2.Buffer(cache_time=Duration(nanoseconds=KEPT_NS))
        self._listener = self._tf2.TransformListener(self._buffer, self._node, spin_thread=False)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.unregister()
            self._listener = None

    def at(self, stamp_ns: int, camera_frame: str) -> Pose | None:
        source, buffer = self._source or camera_frame, self._buffer
        if buffer is None:
            return None
        try:
            if not source:
                raise PoseError('the image has an empty header.frame_id: its driver must say where the camera is, or set the '
                                'parameter "pose.source_frame"')
            pose = self._look_up(buffer, source, stamp_ns)
        except Exception as error:  # a tree that is broken or has no such frame, and whatever else tf2 finds wrong
            self.note_refusal(error)
            return None
        if pose is not None:
            self._note(source, pose)
        return pose

    def obstacle(self) -> str:
        return f'is {self._source or "the frame of the image"} connected with {self._target} in the tf2 tree, and up to date?'

    def _look_up(self, buffer, source: str, stamp_ns: int) -> Pose | None:
        # The core's own look-up: the buffer's can wait.
        try:
            found = buffer.lookup_transform_core(self._target, source, Time(nanoseconds=stamp_ns))
        except self._tf2.ExtrapolationException:
            found = buffer.lookup_transform_core(self._target, source, Time())      # the newest
            if abs(to_ns(found.header.stamp) - stamp_ns) > self._tolerance_ns:
                return None
        p, q = found.transform.translation, found.transform.rotation
        return make_pose(stamp_ns, self._target, (p.x, p.y, p.z), (q.x, q.y, q.z, q.w))

    def _note(self, source: str, pose: Pose) -> None:
        before, self._before[source] = self._before.get(source), pose
        self.received += 1
        jump = leap(before, pose) if before is not None and before.stamp_ns < pose.stamp_ns else ''
        if jump:
            self.jumps += 1
            self.newest_jump = jump
