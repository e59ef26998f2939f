"""The newest poses of one source: checked, kept for a while, and looked up at a frame's stamp. No ROS in here."""
import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from statekv_ros.errors import PoseError
from statekv_ros.memory.pose import Pose, shared

KEPT_NS = 30 * 10**9
_MOST = 30_000          # poses, whatever their stamps: 30 s at 1 kHz
BACK_NS = 10**9         # further back than this is a clock that was set back, or a bag that begins again
# Faster than this it did not move: its frame was set anew. Less than the least of both is how a source trembles.
_FASTEST_M_S, _LEAST_M = 10.0, 0.2
_FASTEST_RAD_S, _LEAST_RAD = 10.0, 0.2
_ALONG = 0.9995         # cosine from which on two orientations are too close for a slerp's division


def make_pose(stamp_ns: int, frame_id: str, position: Sequence[float], orientation: Sequence[float],
              covariance: Sequence[float] | None = None) -> Pose:
    """A pose of numbers that anybody may have sent: its quaternion becomes a unit one, a covariance of zeros or of what is no
    number counts as unknown.

    Raises:
        PoseError: no stamp, no frame, numbers that are not finite, or a quaternion that is no turn.
    """
    if stamp_ns <= 0:
        raise PoseError(f'a pose has header stamp {stamp_ns} ns: its publisher must set it')
    if not frame_id:
        raise PoseError('a pose has an empty header.frame_id: its publisher must say in which frame it is')
    position, orientation = tuple(map(float, position)), tuple(map(float, orientation))
    if not all(map(math.isfinite, (*position, *orientation))):
        raise PoseError(f'a pose in frame {frame_id!r} is not finite: position {position}, orientation {orientation}')
    length = math.hypot(*orientation)
    if not 0.1 < length < 10:
        raise PoseError(f'a pose in frame {frame_id!r} has the quaternion {orientation}, which is no orientation: its publisher '
                        'must set it (w = 1 is no turn)')
    if covariance is not None:
        covariance = tuple(map(float, covariance))
        covariance = shared(covariance) if any(covariance) and all(map(math.isfinite, covariance)) else None
    return Pose(stamp_ns, frame_id, position, tuple(part / length for part in orientation), covariance)


def leap(before: Pose, after: Pose) -> str:
    """How far it is from one pose to the next, in words, where nothing can have moved like that; else ''."""
    if before.frame_id != after.frame_id:
        return f'from frame {before.frame_id!r} to frame {after.frame_id!r}'
    seconds = (after.stamp_ns - before.stamp_ns) / 1e9
    metres, turn = math.dist(before.position, after.position), _angle(before.orientation, after.orientation)
    if metres > max(_LEAST_M, _FASTEST_M_S * seconds) or turn > max(_LEAST_RAD, _FASTEST_RAD_S * seconds):
        return f'by {metres:.2f} m and {math.degrees(turn):.0f} degrees within {seconds:.3f} s'
    return ''


def between(before: Pose, after: Pose, stamp_ns: int) -> Pose:
    """The pose at a stamp between two of one frame: position on the line, orientation on the arc, covariance of the nearer."""
    part = (stamp_ns - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
    position = tuple(a + part * (b - a) for a, b in zip(before.position, after.position))
    nearer = before if part < 0.5 else after
    return Pose(stamp_ns, before.frame_id, position, _slerp(before.orientation, after.orientation, part), nearer.covariance)


class PoseBuffer:
    """Poses of the newest 30 s, of one source. One thread adds, another asks; neither waits for more than a look.

    Attributes:
        jumps: how often the next pose was where nothing can have moved to; newest_jump: in words.
        newest: the pose that was added last.
    """

    def __init__(self, tolerance_s: float):
        """tolerance_s: how far from a stamp the nearest pose may be."""
        self.jumps, self.newest_jump = 0, ''
        self._tolerance_ns = round(tolerance_s * 1e9)
        self._poses: deque[tuple[int, Pose, bool]] = deque(maxlen=_MOST)     # stamp, pose, whether it came by a jump
        self._lock = threading.Lock()

    @property
    def newest(self) -> Pose | None:
        with self._lock:
            return self._poses[-1][1] if self._poses else None

    def add(self, pose: Pose) -> None:
        """Take the next pose. A stamp that goes back by more than a second begins anew.

        Raises:
            PoseError: its stamp is not behind that of the pose before.
        """
        before = self.newest
        if before is not None and before.stamp_ns - BACK_NS <= pose.stamp_ns <= before.stamp_ns:
            raise PoseError(f'a pose of stamp {pose.stamp_ns} ns came after one of {before.stamp_ns} ns: do two nodes publish on '
                            'this topic?')
        anew = before is not None and pose.stamp_ns < before.stamp_ns
        jump = '' if before is None or anew else leap(before, pose)
        if jump:
            self.jumps += 1
            self.newest_jump = jump
        with self._lock:
            if anew:
                self._poses.clear()
            self._poses.append((pose.stamp_ns, pose, bool(jump)))
            while self._poses[0][0] < pose.stamp_ns - KEPT_NS:
                self._poses.popleft()

    def has_passed(self, stamp_ns: int) -> bool:
        """Whether a pose at this stamp or behind it came: what follows does not change what `at` then says of it."""
        newest = self.newest
        return newest is not None and newest.stamp_ns >= stamp_ns

    def at(self, stamp_ns: int) -> Pose | None:
        """Where it was: between the two poses around the stamp, or, where there is none on one side or a jump between them, the
        nearer one. None where the nearer one is further away than `tolerance_s`."""
        with self._lock:
            index = bisect_left(self._poses, stamp_ns, key=lambda entry: entry[0])
            around = [self._poses[place] for place in (index - 1, index) if 0 <= place < len(self._poses)]
        nearest = min(around, key=lambda entry: abs(entry[0] - stamp_ns), default=None)
        if nearest is None or abs(nearest[0] - stamp_ns) > self._tolerance_ns:
            return None
        if len(around) == 2 and not around[1][2]:
            return between(around[0][1], around[1][1], stamp_ns)
        return replace(nearest[1], stamp_ns=stamp_ns)


def _angle(a: Sequence[float], b: Sequence[float]) -> float:
    return 2 * math.acos(min(1.0, abs(sum(map(float.__mul__, a, b)))))


def _slerp(a: tuple[float, ...], b: tuple[float, ...], part: float) -> tuple[float, float, float, float]:
    cosine = sum(map(float.__mul__, a, b))
    if cosine < 0:      # q and -q are one orientation: take the shorter way
        b, cosine = tuple(-value for value in b), -cosine
    of_a, of_b = 1 - part, part
    if cosine < _ALONG:
        angle = math.acos(cosine)
        of_a, of_b = math.sin(of_a * angle) / math.sin(angle), math.sin(of_b * angle) / math.sin(angle)
    found = tuple(of_a * x + of_b * y for x, y in zip(a, b))
    length = math.hypot(*found)
    return tuple(value / length for value in found)
