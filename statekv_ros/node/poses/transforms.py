"""Poses from tf2, on machines that have it."""
from collections.abc import Callable

from geometry_msgs.msg import TransformStamped
from rclpy.duration import Duration
from rclpy.time import Time

from statekv_ros.errors import ParameterError, PoseError
from statekv_ros.memory.pose import Found, Pose
from statekv_ros.node.messages import to_ns
from statekv_ros.node.poses.buffer import BACK_NS, KEPT_NS, leap, make_pose
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
                                 f'tf2_ros cannot be imported here ({error}): install it (ros-<distribution>-tf2-ros-py; there '
                                 'is no wheel of it), or set the parameter "pose.topic"') from error
        self._tf2, self._node, self._target, self._source = tf2_ros, node, target_frame, source_frame
        self._tolerance_ns = round(tolerance_s * 1e9)
        self._buffer = self._listener = None
        self._before: dict[str, Pose] = {}
        self._away = ''         # how far the newest transform was from the newest image that it could not serve
        self.frame_id = target_frame

    @property
    def name(self) -> str:
        return f'tf2 ({self._source or "the frame of the image"} in {self._target})'

    def open(self) -> None:
        # Without the node the buffer offers no service of its own; the listener is spun with the node.
        self._buffer = self._tf2.Buffer(cache_time=Duration(nanoseconds=KEPT_NS))
        self._listener = self._tf2.TransformListener(_Filling(self._buffer, lambda: self.on_pose()), self._node, spin_thread=False)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.unregister()
            self._listener = None

    def at(self, stamp_ns: int, camera_frame: str, again: bool) -> Found:
        source, buffer = self._source or camera_frame, self._buffer
        if buffer is None:
            return Found(None, False)
        try:
            if not source:
                raise PoseError('the image has an empty header.frame_id: its driver must say where the camera is, or set the '
                                'parameter "pose.source_frame"')
            found = self._look_up(buffer, source, stamp_ns)
        except PoseError as error:
            self._refuse(error, again)
            return Found(None, False)
        except Exception as error:  # a tree that is broken or has no such frame, and whatever else tf2 finds wrong
            # Its first line: below it tf2 lists every frame of the tree.
            words = str(error).strip() or repr(error)
            self._refuse(PoseError(f'no pose of {source!r} in {self._target!r}, says tf2: {words.splitlines()[0]}'), again)
            return Found(None, False)
        if found.pose is not None:
            self._note(source, found.pose, again)
        return found

    def obstacle(self) -> str:
        return self._away or (f'is {self._source or "the frame of the image"} connected with {self._target} in the tf2 tree, and '
                              'up to date?')

    def _look_up(self, buffer, source: str, stamp_ns: int) -> Found:
        # The core's own look-up: the buffer's can wait. The newest first: a transform may come in between.
        newest, settled = buffer.lookup_transform_core(self._target, source, Time()), True
        try:
            found = buffer.lookup_transform_core(self._target, source, Time(nanoseconds=stamp_ns))
        except self._tf2.ExtrapolationException:
            found, ahead_ns = newest, to_ns(newest.header.stamp) - stamp_ns
            settled = ahead_ns > 0
            if abs(ahead_ns) > self._tolerance_ns:
                self._away = (f'the newest transform from {source} to {self._target} is {abs(ahead_ns) / 1e9:.2f} s '
                              f'{"newer" if ahead_ns > 0 else "older"} than the image, "pose.tolerance_s" is '
                              f'{self._tolerance_ns / 1e9:g}: is its publisher late, or on another clock than the camera?')
                return Found(None, settled)
        p, q = found.transform.translation, found.transform.rotation
        return Found(make_pose(stamp_ns, self._target, (p.x, p.y, p.z), (q.x, q.y, q.z, q.w)), settled)

    def _refuse(self, error: PoseError, again: bool) -> None:
        if not again:
            self.note_refusal(error)

    def _note(self, source: str, pose: Pose, again: bool) -> None:
        before = self._before.get(source)
        if again and before is not None and pose.stamp_ns <= before.stamp_ns:
            return
        self._before[source] = pose
        self.received += 1
        jump = leap(before, pose) if before is not None and before.stamp_ns < pose.stamp_ns else ''
        if jump:
            self.jumps += 1
            self.newest_jump = jump


class _Filling:
    """What tf2's listener fills: a buffer that begins anew when the stamps of a frame go back by more than a second. tf2 itself
    would mix both runs of a bag, or ignore the second one until its stamps have caught up."""

    def __init__(self, buffer, told: Callable[[], None]):
        """told: called after each transform."""
        self._buffer, self._told = buffer, told
        self._newest_ns: dict[str, int] = {}        # of each child frame

    def set_transform(self, transform: TransformStamped, authority: str) -> None:
        frame, stamp_ns = transform.child_frame_id, to_ns(transform.header.stamp)
        if stamp_ns < self._newest_ns.get(frame, 0) - BACK_NS:
            self._buffer.clear()
            self._newest_ns.clear()
        self._newest_ns[frame] = max(stamp_ns, self._newest_ns.get(frame, 0))
        self._buffer.set_transform(transform, authority)
        self._told()

    def set_transform_static(self, transform: TransformStamped, authority: str) -> None:
        self._buffer.set_transform_static(transform, authority)
        self._told()
