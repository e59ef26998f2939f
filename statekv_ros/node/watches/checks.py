"""Checks of watches between frame steps, in the engine's thread, within their share of the time."""
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from statekv_ros.errors import Interrupted, StateKVError
from statekv_ros.memory import Answering, VideoStream
from statekv_ros.node.watches.table import WatchTable
from statekv_ros.node.watches.watch import Alert, Watch

_TELL_EVERY_S = 10.0    # a check that always fails must not fill the log
_SAVE_EVERY_S = 1.0


@dataclass
class _Check:
    watches: list[Watch]
    answering: Answering


class Checks:
    """Answers what is due, one question at a time, slice by slice. Watches of one camera that ask the same share an answer; all
    read keys and values that the frame steps have computed, none looks at a frame again.

    Attributes:
        table: the watches.
        spent_s: time that checks took so far.
    """

    def __init__(self, table: WatchTable, streams: dict[str, VideoStream], share: Callable[[], float],
                 evidence: Callable[[], int], on_alert: Callable[[Alert], None], save: Callable[[], None],
                 log: Callable[[str], None]):
        """
        Args:
            share: of the engine's time that checks may take; asked each time, so it can change.
            evidence: how many steps an answer names.
            on_alert: called in the engine's thread.
            save: keeps the table for a restart; called in the engine's thread, at most once a second, when something changed.
            log: takes what went wrong.
        """
        self.table, self.spent_s = table, 0.0
        self._streams, self._share, self._evidence = streams, share, evidence
        self._on_alert, self._save, self._log = on_alert, save, log
        self._check: _Check | None = None
        self._next = self._tell_at = self._save_at = 0.0      # of `time.monotonic`

    def note_step(self, camera: str, stamp_ns: int) -> None:
        """A frame step of a camera is in the memory: its watches may be due."""
        self.table.note_step(camera, stamp_ns)
        self.save_changes()

    def forget_answers(self, cameras: list[str]) -> None:
        """What these cameras saw was forgotten."""
        if self._check is not None and self._check.watches[0].definition.camera in cameras:
            self._check = None
        self.table.forget_answers(cameras)

    def wait_s(self) -> float | None:
        """Seconds until there is something to do; None: not before the next frame step."""
        return max(0.0, self._next - time.monotonic()) if self._check is not None or self.table.is_due else None

    def advance(self, tokens: int) -> bool:
        """One slice, if any is due and its time has come; whether there was one."""
        begun = time.monotonic()
        if begun < self._next or not self._begin():
            return False
        check = self._check
        try:
            if check.answering.advance(tokens):
                self._check = None
                self._finish(check)
        except Interrupted:
            raise
        except Exception as error:  # a watch's trouble is its own
            self._check = None
            self._fail(check.watches, error)
        ended = time.monotonic()
        self.spent_s += ended - begun
        self._next = ended + (ended - begun) * (1 / self._share() - 1)
        return True

    def save_changes(self, at_once: bool = False) -> None:
        """Keep what changed for a restart, unless that was done within the last second."""
        now = time.monotonic()
        if self.table.dirty and (at_once or now >= self._save_at):
            self._save_at, self.table.dirty = now + _SAVE_EVERY_S, False
            self._save()

    def _begin(self) -> bool:
        if self._check is not None and not self.table.has(self._check.watches):
            self._check = None      # nobody wants it any more
        if self._check is None and (watches := self.table.take_due()):
            definition = watches[0].definition
            try:
                answering = self._streams[definition.camera].begin_answer(
                    definition.question, answer_policy=definition.answer_policy, max_tokens=definition.max_tokens,
                    evidence=self._evidence(), half_step=False)
            except Exception as error:  # a question too long for the model, say
                self._fail(watches, error)
            else:
                self._check = _Check(watches, answering)
        return self._check is not None

    def _finish(self, check: _Check) -> None:
        for alert in self.table.take(check.watches, check.answering.result()):
            self._on_alert(alert)
        self.save_changes()

    def _fail(self, watches: list[Watch], error: Exception) -> None:
        known, now = isinstance(error, StateKVError), time.monotonic()
        self.table.fail(watches, str(error) if known else f'{type(error).__name__}: {error}')
        if now >= self._tell_at:
            self._tell_at = now + _TELL_EVERY_S
            self._log(f'checking {watches[0].definition.question[:80]!r} failed: {error if known else traceback.format_exc()}')
