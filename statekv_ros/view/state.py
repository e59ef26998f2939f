"""What the page knows of a memory node. One thread writes it, those of the pages read it; knows neither browser nor DDS."""
import threading
import time
from collections import deque
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticArray

from statekv_ros.msg import FrameTiming, Watches
from statekv_ros.view.camera import SECONDS, CameraSeen
from statekv_ros.view.facts import Told, Watched, printable, watched

MOST_CAMERAS, MOST_ALERTS = 32, 200
_SILENT_S = 3.5             # at /diagnostics' usual period of a second
_TIER = '_mb'


@dataclass(frozen=True)
class Health:
    """One status of /diagnostics; level: 0 ok, 1 warning, 2 error, 3 stale."""
    level: int
    message: str
    values: dict[str, str]


@dataclass(frozen=True)
class Condition:
    """How the node is: 'absent', 'other version', or its lifecycle state; what to say of it; whether it can be asked."""
    name: str
    sentence: str
    level: int = 0

    @property
    def here(self) -> bool:
        return self.name not in ('absent', 'other version')


class State:
    """See the module.

    Attributes:
        memory: the node's full name, without the first slash.
        version: another number after each change.
        lives: how often the node began anew, or lost what it held, while this page listened.
        other_version: set where the node's messages are of another version than ours.
    """

    def __init__(self, memory: str):
        self.memory, self.version, self.lives, self.other_version = memory, 0, 0, False
        self.cameras: dict[str, CameraSeen] = {}
        self.health: dict[str, Health] = {}
        self.alerts: deque[Told] = deque(maxlen=MOST_ALERTS)
        self.watches: tuple[Watched, ...] = ()
        self.tiers: deque[tuple[int, dict[str, float]]] = deque(maxlen=SECONDS)     # (the machine's time, MB by tier)
        self.lock = threading.RLock()
        self._begun, self._heard_at, self._period_s, self._steps, self._held = time.monotonic(), None, 1.0, 0, 0

    def note_timing(self, timing: FrameTiming) -> None:
        with self.lock:
            seen = self._camera(timing.camera)
            if seen is not None:
                seen.note(timing)
                self.version += 1

    def note_health(self, array: DiagnosticArray) -> bool:
        """Whether the node began anew, or forgot, since the last one. Statuses of others on the topic are passed by."""
        prefix = f'{self.memory}: '
        statuses = {printable(status.name.removeprefix(prefix), 200): Health(
            _level(status.level), printable(status.message),
            {printable(value.key, 100): printable(value.value) for value in status.values[:200]})
            for status in array.status[:200] if status.name.startswith(prefix)}
        if not statuses:
            return False
        with self.lock:
            now = time.monotonic()
            if self._heard_at is not None:
                self._period_s = min(60.0, max(1.0, now - self._heard_at))
            self._heard_at, self.health = now, statuses
            self.version += 1
            cameras = [status for status in statuses.values() if 'frames_held' in status.values]
            self._note_tiers(cameras)
            steps = _number(statuses.get('engine'), 'steps')
            held = sum(_number(status, key) for status in cameras for key in ('frames_held', 'frames_forgotten'))
            began, self._steps, self._held = steps < self._steps or held < self._held, steps, held
            if began:
                self.lives += 1
                for seen in self.cameras.values():
                    self.cameras[seen.name] = CameraSeen(seen.name)
            return began

    def note_watches(self, watches: Watches) -> None:
        with self.lock:
            self.watches = tuple(map(watched, watches.watches[:500]))
            self.version += 1

    def note_alert(self, alert: Told) -> None:
        with self.lock:
            if alert not in self.alerts:        # told again to who came late
                self.alerts.append(alert)
                self.version += 1

    def note_span(self, camera: str, first_ns: int, last_ns: int) -> None:
        """Pictures of a camera reach so far back."""
        with self.lock:
            if (seen := self._camera(camera)) is not None:
                seen.span(first_ns, last_ns)
                self.version += 1

    def live_ns(self, camera: str) -> int:
        """See `CameraSeen.live_ns`; 0 where nothing was seen."""
        with self.lock:
            seen = self.cameras.get(camera)
            return seen.live_ns() if seen is not None else 0

    def camera_names(self) -> list[str]:
        """Of those that frame steps or /diagnostics told of."""
        with self.lock:
            told = [name for name, status in self.health.items() if 'frames_in' in status.values]
            return list(dict.fromkeys([*told, *self.cameras]))[:MOST_CAMERAS]

    def condition(self) -> Condition:
        """How the node is, in words that say what to do."""
        with self.lock:
            now, heard_at, engine = time.monotonic(), self._heard_at, self.health.get('engine')
            if self.other_version:
                return Condition('other version', f'The messages of {self.memory} are of another version than this page\'s: '
                                                  'install the same statekv_ros on both sides, then start this page again.', 2)
            if heard_at is None:
                return Condition('absent', f'No memory node {self.memory} yet: is it running, in this ROS_DOMAIN_ID and namespace? '
                                           f'Looking for {now - self._begun:.0f} s.', 1)
            if now - heard_at > _SILENT_S * self._period_s:
                return Condition('absent', f'Nothing heard of {self.memory} for {now - heard_at:.0f} s: it ended, hangs or cannot '
                                           'be reached. This page goes on when it is back.', 2)
            if engine is None:
                return Condition('starting', 'The node is there and says nothing of its engine yet.', 1)
            return Condition(engine.values.get('state', 'unknown'), engine.message, engine.level)

    def _camera(self, name: str) -> CameraSeen | None:
        if name not in self.cameras and len(self.cameras) >= MOST_CAMERAS:
            return None
        return self.cameras.setdefault(name, CameraSeen(name))

    def _note_tiers(self, cameras: list[Health]) -> None:
        sizes: dict[str, float] = {}
        for status in cameras:
            for key in status.values:
                if key.endswith(_TIER) and key != f'detailed{_TIER}':
                    tier = key.removesuffix(_TIER)
                    sizes[tier] = sizes.get(tier, 0.0) + _number(status, key)
        if cameras:
            self.tiers.append((int(time.time()), sizes))


def _level(level) -> int:
    return level[0] if isinstance(level, bytes) else int(level)


def _number(status: Health | None, key: str) -> float:
    try:
        number = float(status.values.get(key, 0)) if status is not None else 0.0
    except ValueError:
        return 0.0
    return number if abs(number) < 1e15 else 0.0
