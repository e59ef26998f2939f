"""Plain values out of messages. What others wrote is made fit to be shown here, once, before anything keeps it."""
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped

from statekv_ros.msg import Alert, Evidence, WatchState

MOST_CHARS = 4000
_MARK = '\N{REPLACEMENT CHARACTER}'
# Terminal controls, marks that turn the direction of what follows, and halves of characters; a line's end stays.
_UNPRINTABLE = re.compile('[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


def printable(text: str, most: int = MOST_CHARS) -> str:
    """Text as it may be shown: at most so many characters, a mark in place of each that cannot be seen but does something."""
    shown = _UNPRINTABLE.sub(_MARK, text[:most])
    return shown if len(text) <= most else f'{shown} ...'


def to_ns(stamp: Time) -> int:
    """A ROS stamp in nanoseconds."""
    return stamp.sec * 10**9 + stamp.nanosec


def to_stamp(stamp_ns: int) -> Time:
    """Nanoseconds as a ROS stamp."""
    return Time(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)


@dataclass(frozen=True)
class Place:
    """Where the robot was: metres in a coordinate frame, and the direction in radians from its x axis."""
    x: float
    y: float
    yaw: float
    frame: str


@dataclass(frozen=True)
class Looked:
    """A frame step that an answer looked at: its newest header stamp, and its share of the attention."""
    camera: str
    stamp_ns: int
    share: float
    place: Place | None


@dataclass(frozen=True)
class Told:
    """An alert. `stamp_ns`: header stamp of the newest frame covered; `at_ns`: node time of the alert."""
    watch: str
    question: str
    condition: str
    camera: str
    before: str
    text: str
    stamp_ns: int
    at_ns: int
    looked: tuple[Looked, ...]


@dataclass(frozen=True)
class Watched:
    """A standing question and how it goes."""
    id: str
    question: str
    condition: str
    camera: str
    every: str
    text: str
    checks: int
    alerts: int
    keeps_up: bool
    error: str


def looked_at(evidence: Iterable[Evidence]) -> tuple[Looked, ...]:
    """Of an answer or an alert, greatest share first. A number that is none counts as 0."""
    return tuple(Looked(step.camera, to_ns(step.last_stamp), step.share if math.isfinite(step.share) else 0.0,
                        _place(step.pose) if step.has_pose else None) for step in evidence)


def told(alert: Alert) -> Told:
    """An alert as it came."""
    return Told(printable(alert.id), printable(alert.question), printable(alert.condition), alert.camera,
                printable(alert.text_before), printable(alert.text), to_ns(alert.last_stamp), to_ns(alert.header.stamp),
                looked_at(alert.evidence))


def watched(state: WatchState) -> Watched:
    """A standing question as ~/watches lists it. Its id stays as it is: ~/unwatch wants it."""
    steps, seconds = state.every_steps, state.every_s
    every = f'every {steps} steps' if steps > 1 else f'every {seconds:g} s' if seconds else 'each step'
    return Watched(state.id, printable(state.question), printable(state.condition), state.camera, every, printable(state.text),
                   state.checks, state.alerts, state.keeps_up, printable(state.error))


def _place(pose: PoseStamped) -> Place | None:
    position, turn = pose.pose.position, pose.pose.orientation
    yaw = math.atan2(2 * (turn.w * turn.z + turn.x * turn.y), 1 - 2 * (turn.y**2 + turn.z**2))
    if not all(map(math.isfinite, (position.x, position.y, yaw))):
        return None
    return Place(position.x, position.y, yaw, printable(pose.header.frame_id))
