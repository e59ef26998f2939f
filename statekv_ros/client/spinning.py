"""Who runs a client's callbacks while somebody waits for them, and who must not wait."""
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from rclpy.executors import Executor, MultiThreadedExecutor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Task

_LOOK_S = 0.1       # how often it is looked whether an executor has taken the node
_ONLY_THREAD = ('waits, and was called from a callback of an executor with a single thread: no timer, no subscription and no answer '
                'would be served meanwhile. In an async callback use "await memory.ask_async(...)"; in any other, '
                '"memory.ask_async(...).add_done_callback(...)"; or spin the node with a MultiThreadedExecutor, or call it from a '
                'thread of your own')

_blocked: Counter[int] = Counter()      # callbacks that wait, by the executor that runs them
_blocked_lock = threading.Lock()


class WouldBlock(RuntimeError):
    """A call that waits, from a callback whose executor has no other thread."""


@dataclass
class _Turns:
    """What all clients of a node share: who of those that wait spins it."""
    turn: threading.Condition = field(default_factory=threading.Condition)
    executor: SingleThreadedExecutor | None = None
    is_spun: bool = False
    clients: int = 0


_turns: WeakKeyDictionary[Node, _Turns] = WeakKeyDictionary()


class Spinning:
    """Waits for a node's callbacks, in any number of threads. Where no executor has the node, those who wait spin it in turn."""

    def __init__(self, node: Node, spun_elsewhere: bool):
        """spun_elsewhere: an executor has the node, or will have it before anybody waits."""
        self._node, self._spun_elsewhere = node, spun_elsewhere
        self._turns = _turns.setdefault(node, _Turns())
        self._turns.clients += 1
        self._turn = self._turns.turn
        self._closed = False

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Until `done()`, at most so long; whether it is. Whatever makes it so calls `notify`."""
        end = time.monotonic() + seconds
        while not done() and (left := end - time.monotonic()) > 0:
            if self._has_executor():
                with self._turn:
                    self._turn.wait_for(done, min(left, _LOOK_S))
                continue
            with self._turn:
                if self._turns.is_spun:       # by another thread, until it has what it waits for
                    self._turn.wait_for(lambda: done() or not self._turns.is_spun, left)
                    continue
                self._turns.is_spun = True
            try:
                self._spin_once(left)
            finally:
                with self._turn:
                    self._turns.is_spun = False
                    self._turn.notify_all()
        return done()

    def notify(self) -> None:
        """Something that may be waited for has happened. From any thread."""
        with self._turn:
            self._turn.notify_all()
        executor = self._node.executor
        if executor is not None:
            executor.wake()

    def close(self) -> None:
        """Leave the node as it was found."""
        self._turns.clients -= not self._closed
        self._closed = True
        executor = self._turns.executor
        if executor is not None and not self._turns.clients:
            if self._node.executor is executor:
                self._node.executor = None
            executor.shutdown(timeout_sec=0)
            self._turns.executor = None

    @contextmanager
    def blocking(self, call: str) -> Iterator[None]:
        """Around a call that waits.

        Raises:
            WouldBlock: it would hold the last thread that could run what it waits for.
        """
        executor = _executor_of_this_callback()
        if executor is None:
            yield
            return
        with _blocked_lock:
            threads = _threads(executor)
            if threads == 1:
                raise WouldBlock(f'{call} {_ONLY_THREAD}')
            if _blocked[id(executor)] + 1 >= threads and self._node.executor is executor:
                raise WouldBlock(f'{call} waits, and {threads - 1} callbacks wait already in the {threads} threads of this '
                                 'executor: none would be left to receive an answer. Use "await memory.ask_async(...)" in async '
                                 'callbacks, or give the MultiThreadedExecutor more threads')
            _blocked[id(executor)] += 1
        try:
            yield
        finally:
            with _blocked_lock:
                _blocked[id(executor)] -= 1
                if not _blocked[id(executor)]:
                    del _blocked[id(executor)]

    def _has_executor(self) -> bool:
        executor = self._node.executor
        return self._spun_elsewhere or executor not in (None, self._turns.executor) and self._node in executor.get_nodes()

    def _spin_once(self, seconds: float) -> None:
        if self._turns.executor is None:
            self._turns.executor = SingleThreadedExecutor(context=self._node.context)
        # It stays there: an executor that is given the node later takes it from this one.
        self._turns.executor.add_node(self._node)
        self._turns.executor.spin_once(min(seconds, _LOOK_S))


def _executor_of_this_callback() -> Executor | None:
    """The executor whose callback this thread is in; rclpy has no way to ask but to look at who called."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is Task.__call__.__code__:
            return frame.f_locals['self']._executor()
        frame = frame.f_back
    return None


def _threads(executor: Executor) -> int:
    return executor._executor._max_workers if isinstance(executor, MultiThreadedExecutor) else 1
