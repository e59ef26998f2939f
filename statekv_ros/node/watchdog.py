"""A small second process that ends the node when it hangs.

A thread that waits in C for the lock of a killed process may hold Python's own lock meanwhile: then no signal handler and no
other thread of the node runs any more. So the watch is kept from outside, by a fork made before anything is loaded. It hears
the node through pipes: heartbeats, and signals, whose numbers Python's handler writes there before any Python code runs. What
is known to freeze a node, a shared-memory port of a killed process, it mends before.
"""
import contextlib
import faulthandler
import os
import select
import signal
import sys
import time
from pathlib import Path

from statekv_ros.node.stop_signals import DOUBLED_S, FORCED_EXIT_S
from statekv_ros.shm_ports import Ports

# More than the node takes to end by itself.
_STOP_LIMIT_S = 2 * FORCED_EXIT_S
_TURN_S = 0.5
# For the stacks to be written. A node that hangs has the time.
_STACKS_S = 1.0
_STACKS = signal.SIGUSR2
_PARTS = {'executor': 'its executor ran no callback', 'engine': 'its engine finished no layer, step or slice of an answer'}


class Watchdog:
    """The node's side. Until `set_limit` only signals are watched.

    It ends the node by SIGKILL (exit code -9 for a launch file, 137 for a shell), after the stacks of all threads were written
    to stderr: when a part makes no progress, and when the node does not go though it was asked to, at once on a second signal.
    """

    def __init__(self):
        """Fork. Only in the main thread, before any other thread is there."""
        beats, self._beats = os.pipe()
        signals, to_signals = os.pipe()
        for end in (self._beats, to_signals):
            os.set_blocking(end, False)
        node = os.getpid()
        # Before the fork: no signal may find the node without it. Python writes nothing else there.
        faulthandler.register(_STACKS, file=2, all_threads=True)
        if os.fork() == 0:
            try:
                for end in (self._beats, to_signals):
                    os.close(end)
                _Keeper(node, beats, signals).keep()
            except Exception:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(0)
        for end in (beats, signals):
            os.close(end)
        signal.set_wakeup_fd(to_signals, warn_on_full_buffer=False)

    def set_limit(self, seconds: float) -> None:
        """From now on each part must be heard of at least this often; 0: it need not."""
        self._tell(f'limit {seconds}')

    def beat(self, part: str, age_s: float = 0.0) -> None:
        """`part`, executor or engine, made progress `age_s` ago."""
        self._tell(f'{part} {age_s}')

    def _tell(self, line: str) -> None:
        try:
            os.write(self._beats, f'{line}\n'.encode())
        except (BlockingIOError, BrokenPipeError):
            pass  # nobody keeps watch any more, or sleeps; the node itself is well


class _Keeper:
    """The other side: knows of the node what comes through the pipes."""

    def __init__(self, node: int, beats: int, signals: int):
        self._node, self._beats, self._signals = node, beats, signals
        self._limit_s = 0.0
        self._progress: dict[str, float] = {}
        self._asked = self._insisted = 0.0
        self._text = ''

    def keep(self) -> None:
        """Until the node has gone, by itself or not."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # what a terminal sends to all; the node decides
        Path('/proc/self/comm').write_text('statekv-watch')
        poll = select.poll()
        for end in (self._beats, self._signals):
            poll.register(end, select.POLLIN)
        ports, looked = Ports(), 0.0
        now = time.monotonic()
        while os.getppid() == self._node:
            for end, _ in poll.poll(_TURN_S * 1e3):
                data = os.read(end, 4096)
                if not data:
                    return
                if end == self._beats:
                    self._hear_beats(data.decode())
                else:
                    self._hear_signals(data)
            before, now = now, time.monotonic()
            if now - looked >= _TURN_S:
                looked = now
                if mended := ports.look():
                    _say(f'{mended} shared-memory port(s) of killed processes mended: writing to them would have hung', 'INFO')
            # Where the watch itself stood still, all the machine did, or the process group was stopped.
            if now - before > 4 * _TURN_S or self._is_stopped():
                self._forgive(now - before)
            elif reason := self._reason(now):
                self._end(reason)
                return

    def _hear_beats(self, text: str) -> None:
        *lines, self._text = (self._text + text).split('\n')
        now = time.monotonic()
        for line in lines:
            word, number = line.split()
            if word == 'limit':
                self._limit_s, self._progress = float(number), dict.fromkeys(_PARTS, now)
            else:
                self._progress[word] = now - float(number)

    def _hear_signals(self, numbers: bytes) -> None:
        now = time.monotonic()
        if not {signal.SIGINT, signal.SIGTERM} & set(numbers):
            return  # some library's own
        if not self._asked:
            self._asked = now
        elif now - self._asked > DOUBLED_S and not self._insisted:
            self._insisted = now

    def _forgive(self, seconds: float) -> None:
        self._progress = {part: at + seconds for part, at in self._progress.items()}
        self._asked, self._insisted = (at and at + seconds for at in (self._asked, self._insisted))

    def _reason(self, now: float) -> str:
        # A node that is well leaves on a second signal by itself, so it has a moment for it.
        if self._insisted and now - self._insisted > DOUBLED_S:
            return 'the node was asked to stop a second time and still does not react'
        if self._asked:
            return f'the node did not stop within {_STOP_LIMIT_S:g} s' if now - self._asked > _STOP_LIMIT_S else ''
        if not self._limit_s:
            return ''
        return ', '.join(f'the node hangs: {_PARTS[part]} for {now - at:.0f} s, {self._limit_s:g} are allowed (parameter '
                         '"hang_limit_s")' for part, at in self._progress.items() if now - at > self._limit_s)

    def _is_stopped(self) -> bool:
        """Whether a debugger or SIGSTOP holds the node: that is no hang.

        Asked on each turn, not when there is reason to end it: by then the node may be going on again, not yet heard of.
        """
        try:
            return Path(f'/proc/{self._node}/stat').read_text().rpartition(')')[2].split()[0] in 'Tt'
        except (FileNotFoundError, ProcessLookupError):
            return False  # gone since the turn began

    def _end(self, reason: str) -> None:
        _say(f'{reason}. The stacks of its threads:')
        with contextlib.suppress(ProcessLookupError):  # gone meanwhile
            os.kill(self._node, _STACKS)
            time.sleep(_STACKS_S)
            if os.getppid() == self._node:
                _say('ending it with SIGKILL; "respawn:=true" of the launch files starts it again')
                os.kill(self._node, signal.SIGKILL)


def _say(sentence: str, level: str = 'FATAL') -> None:
    print(f'[{level}] [{time.time():.9f}] [statekv.watchdog]: {sentence}', file=sys.stderr, flush=True)
