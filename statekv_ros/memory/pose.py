"""Where a camera was: what a step keeps of it, and what a question can be cut by. Plain numbers, no ROS."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

# From header stamps in ns, the newest first, to where the camera was at the first of them that is known. The flag: whether that
# was asked before, so that what goes wrong counts once.
Locate = Callable[[Sequence[int], bool], 'Found']


@dataclass(frozen=True, slots=True)
class Pose:
    """Where something was at a moment.

    Attributes:
        stamp_ns: the moment, a frame's header stamp in ns.
        frame_id: the coordinate frame that it is told in.
        position: x, y, z in metres.
        orientation: unit quaternion x, y, z, w.
        covariance: of x, y, z and the turns about them, 6 x 6 row by row; None where nobody told it.
    """
    stamp_ns: int
    frame_id: str
    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float]
    covariance: tuple[float, ...] | None = None

    def saved(self) -> dict:
        """Itself as plain values, for `restored`."""
        return asdict(self)

    @staticmethod
    def restored(values: dict | None) -> Pose | None:
        """What `saved` told; None of None."""
        if values is None:
            return None
        covariance = values['covariance']
        return Pose(values['stamp_ns'], values['frame_id'], tuple(values['position']), tuple(values['orientation']),
                    None if covariance is None else shared(tuple(covariance)))


class Found(NamedTuple):
    """Where a camera was at a moment, as far as is known now, None where it is not; `settled`: whatever is told later is of later
    moments, and changes nothing."""
    pose: Pose | None
    settled: bool


NOT_TOLD = Found(None, True)    # by nobody, ever


@dataclass(frozen=True, slots=True)
class Place:
    """All that is within `radius_m` metres of a point, in three dimensions."""
    frame_id: str
    position: tuple[float, float, float]
    radius_m: float

    def holds(self, pose: Pose | None) -> bool:
        """Whether it was taken here; false for None, and in another coordinate frame."""
        return pose is not None and pose.frame_id == self.frame_id and self.distance_m(pose) <= self.radius_m

    def distance_m(self, pose: Pose) -> float:
        """From the point, in metres."""
        return math.dist(pose.position, self.position)

    def __str__(self) -> str:
        x, y, z = self.position
        return f'{self.radius_m:g} m of ({x:g}, {y:g}, {z:g}) in frame {self.frame_id!r}'


@lru_cache(maxsize=64)
def shared(covariance: tuple[float, ...]) -> tuple[float, ...]:
    """The same numbers; one tuple for all that are equal, since most publishers send the same ones for hours."""
    return covariance
