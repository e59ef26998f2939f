"""What a question is limited to: a span of time and a place."""
from dataclasses import dataclass

from statekv_ros.memory.pose import Place, Pose


@dataclass(frozen=True)
class Cut:
    """A step belongs to every span that it touches; one without a pose is nowhere.

    Attributes:
        first_ns, last_ns: oldest and newest header stamp; None: unbounded.
        place: None: everywhere.
    """
    first_ns: int | None = None
    last_ns: int | None = None
    place: Place | None = None

    @property
    def whole(self) -> bool:
        """Whether it takes everything."""
        return self == Cut()

    def takes(self, first_ns: int, last_ns: int, pose: Pose | None) -> bool:
        """Whether frames belong to it, by the header stamps of the first and the last."""
        return (self.first_ns is None or last_ns >= self.first_ns) and (self.last_ns is None or first_ns <= self.last_ns) and (
            self.place is None or self.place.holds(pose))
