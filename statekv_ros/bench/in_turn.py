"""Two ways of doing the same: their times, and what each reads of the model's weights."""
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statekv_ros.backbones.weights import weight_parts


def in_turn(ways: Sequence[Callable[[], None]], warm_up: int, rounds: int, count: int, what: str, quiet: bool,
            before: Callable[[int, int], None] = lambda turn, number: None) -> list[float]:
    """Median ms of each way over `rounds`, divided by `count`; in turn, so that a machine that slows down slows all.

    Args:
        warm_up: rounds before, which do not count.
        what: to say while it goes on.
        before: called with the round and the number of the way before each, untimed.
    """
    times: list[list[float]] = [[] for _ in ways]
    for turn in track(range(warm_up + rounds), what, console=Console(stderr=True), disable=quiet):
        for number, (way, kept) in enumerate(zip(ways, times)):
            before(turn, number)
            begun = time.perf_counter()
            way()
            if turn >= warm_up:
                kept.append((time.perf_counter() - begun) * 1e3 / count)
    return [statistics.median(kept) for kept in times]


class WeightReads(TorchDispatchMode):
    """Counts what is queued with a matrix of the model's among its arguments.

    Attributes:
        launches: operations; bytes: of the matrices, each time anew.
        operations: all that is queued, whatever it reads.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.launches = self.bytes = self.operations = 0
        self._weights = {part.data_ptr(): part.nbytes for _, part in weight_parts(model) if part.ndim > 1}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not (function.is_view or 'empty' in str(function))
        if not function.is_view and 'embedding' not in str(function):      # which reads the rows that it needs
            read = [self._weights.get(leaf.data_ptr(), 0) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
            self.launches += any(read)
            self.bytes += sum(read)
        return function(*args, **kwargs or {})
