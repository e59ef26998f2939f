"""Large libraries imported at less cost."""
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Imports within do not stop again and again to look for garbage in what they have just made: of torch's and Transformers'
    thousands of modules that is a fifth of the time. What is there afterwards stays, and is not looked at later either, when a
    frame or an answer would wait for it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.enable()
