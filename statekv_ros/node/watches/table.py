"""All watches of a node. Callbacks add and remove, the engine's thread asks what is due; each call takes microseconds."""
import threading
import time
from collections.abc import Iterable

from statekv_ros.errors import Code, QuestionError
from statekv_ros.memory import AnswerResult
from statekv_ros.node.watches.watch import Alert, Definition, Watch


class WatchTable:
    """Watches by id, in the order in which they came.

    Attributes:
        cameras: the node's; watches of others, from a time when it had them, are kept and not checked.
        version: grows with whatever a list of them shows.
        dirty: something changed that a restart should know of.
    """

    def __init__(self, cameras: Iterable[str], most: int):
        """most: how many there may be."""
        self.cameras, self._most = tuple(cameras), most
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._number = self._moment = self._taken = 0
        self.version, self.dirty = 0, False

    def __len__(self) -> int:
        return len(self._watches)

    def add(self, definition: Definition) -> Watch:
        """A new watch, or the one that was asked for before with this definition, which then expires as late as a new one.

        Raises:
            QuestionError: there are too many.
        """
        with self._lock:
            self.version, self.dirty = self.version + 1, True
            for watch in self._watches.values():
                if watch.definition == definition and not watch.configured:     # whoever ends it must not end a configured one
                    watch.renew()
                    return watch
            if len(self._watches) >= self._most:
                raise QuestionError(f'{len(self._watches)} watches are there already, {self._most} are allowed: end one with '
                                    '~/unwatch, or raise the parameter "max_watches"', Code.TOO_MANY_WATCHES)
            self._number += 1
            watch = self._watches[str(self._number)] = Watch(str(self._number), definition)
            watch.renew()
            return watch

    def put(self, watches: Iterable[Watch], number: int = 0) -> None:
        """Have these too, whatever their number: from the configuration, or from before a restart. number: newest id given."""
        with self._lock:
            self._number = max(self._number, number)
            for watch in watches:
                self._watches[watch.id] = watch
                if watch.definition.camera not in self.cameras:
                    watch.error = f'the node has no camera {watch.definition.camera!r} now: kept, but not checked'
            self.version += 1

    def remove(self, id: str) -> int:
        """End a watch, or 'all' of them; how many these were.

        Raises:
            QuestionError: there is none of that id.
        """
        with self._lock:
            if id != 'all' and id not in self._watches:
                known = f'the ids are {", ".join(list(self._watches)[:20])}' if self._watches else 'there are none'
                raise QuestionError(f'unknown watch {id[:80]!r}: {known}', Code.UNKNOWN_WATCH)
            gone = list(self._watches) if id == 'all' else [id]
            for name in gone:
                del self._watches[name]
            self.version, self.dirty = self.version + 1, True
            return len(gone)

    def expire(self) -> list[Watch]:
        """End those whose time is over; these."""
        now = time.time()
        with self._lock:
            gone = [watch for watch in self._watches.values() if watch.ends_at <= now]
            for watch in gone:
                del self._watches[watch.id]
            if gone:
                self.version, self.dirty = self.version + 1, True
        return gone

    def all(self) -> list[Watch]:
        """As they are now, in a list of the caller's."""
        with self._lock:
            return list(self._watches.values())

    @property
    def number(self) -> int:
        """Newest id given."""
        return self._number

    def note_step(self, camera: str, stamp_ns: int) -> None:
        """A frame step of a camera is in the memory."""
        with self._lock:
            self._moment += 1
            for watch in self._watches.values():
                if watch.definition.camera == camera:
                    watch.note_step(stamp_ns, self._moment)
            self.version += bool(self._watches)

    def take_due(self) -> list[Watch]:
        """The watch that is due longest, of those the one whose check is longest ago, and all due ones that ask the same; they
        count as being checked from now on. Empty when none is due."""
        with self._lock:
            due = [watch for watch in self._watches.values() if watch.due is not None]
            if not due:
                return []
            first = min(due, key=lambda watch: (watch.due, watch.checked))
            taken = [watch for watch in due if watch.definition.asks == first.definition.asks]
            for watch in taken:
                watch.begin_check()
                self._taken += 1
                watch.checked = self._taken
            return taken

    @property
    def is_due(self) -> bool:
        """Whether any is."""
        with self._lock:
            return any(watch.due is not None for watch in self._watches.values())

    def has(self, watches: Iterable[Watch]) -> bool:
        """Whether any of these is still wanted."""
        with self._lock:
            return any(self._watches.get(watch.id) is watch for watch in watches)

    def take(self, watches: Iterable[Watch], result: AnswerResult) -> list[Alert]:
        """The answer of a check of these; what is to be told. In the engine's thread, which alone changes what a watch holds."""
        held = [_whether_holds(watch, result.text) for watch in watches]     # may take milliseconds: not under the lock
        alerts = []
        with self._lock:
            for watch, holds in zip(watches, held):
                if self._watches.get(watch.id) is not watch:
                    continue
                if isinstance(holds, QuestionError):
                    watch.fail(str(holds))
                    continue
                alert, counts = watch.take(result, holds)
                alerts += filter(None, [alert])
                self.dirty |= counts
            self.version += 1
        return alerts

    def fail(self, watches: Iterable[Watch], reason: str) -> None:
        """A check of these ended without an answer."""
        with self._lock:
            for watch in watches:
                watch.fail(reason)
            self.version += 1

    def forget_answers(self, cameras: Iterable[str]) -> None:
        """What these cameras saw is forgotten."""
        with self._lock:
            for watch in self._watches.values():
                if watch.definition.camera in cameras:
                    watch.forget_answers()
            self.version, self.dirty = self.version + 1, True


def _whether_holds(watch: Watch, text: str) -> bool | QuestionError:
    """The error where it cannot be said, which is no matter of the other watches that share the answer."""
    try:
        return watch.holds(text)
    except QuestionError as error:
        return error
