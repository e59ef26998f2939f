"""Where a patrol's robot is at any time: it walks on along x and sways from side to side, so that no place is passed twice."""
import math
from collections.abc import Iterator

from statekv_ros.memory.pose import Pose

FRAME = 'odom'
ODOMETRY_NS = 20_000_000        # 50 Hz
ODOMETRY_PHASE_NS = 7_000_000   # never at the stamp of an image
_ALONG_M_S, _SWAY_M, _SWAY_S = 0.5, 1.0, 20.0
_TURN = math.tau / _SWAY_S
STEP_M = math.hypot(_ALONG_M_S, _SWAY_M * _TURN)    # at most so far in a step of one second
# Of x, y and the turn about z, as a good odometry tells it; the rest stays on the floor.
_COVARIANCE = tuple({0: 1e-4, 7: 1e-4, 35: 1e-3}.get(index, 0.0) for index in range(36))


def pose_at(time_ns: int) -> Pose:
    """Of the robot, so long after the start; its stamp is that time."""
    seconds = time_ns / 1e9
    position = _ALONG_M_S * seconds, _SWAY_M * math.sin(_TURN * seconds), 0.0
    heading = math.atan2(_SWAY_M * _TURN * math.cos(_TURN * seconds), _ALONG_M_S)
    return Pose(time_ns, FRAME, position, (0.0, 0.0, math.sin(heading / 2), math.cos(heading / 2)), _COVARIANCE)


def odometry(until_ns: int) -> Iterator[Pose]:
    """Poses at 50 Hz, from right after the start until right behind that time."""
    return map(pose_at, range(ODOMETRY_PHASE_NS, until_ns + ODOMETRY_NS, ODOMETRY_NS))
