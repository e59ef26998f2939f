"""What SIGINT and SIGTERM do to a command that must tidy up."""
import contextlib
import signal
import threading


class Stopped(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt: once that passed through an exec(), Python ends itself by SIGINT."""


@contextlib.contextmanager
def stop_on_signals():
    """An event that SIGINT and SIGTERM set, so that playing ends between two images."""
    stop = threading.Event()
    with _handlers(lambda *_: stop.set()):
        yield stop


@contextlib.contextmanager
def stopped_by_signals():
    """SIGINT and SIGTERM raise, so that half-written output is removed on the way out."""
    def stop(*_):
        raise Stopped
    with _handlers(stop):
        yield


@contextlib.contextmanager
def _handlers(handler):
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
