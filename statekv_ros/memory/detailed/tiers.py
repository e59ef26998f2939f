"""Where steps lie that have left the device: in main memory, or wherever else a tier takes them from (the disk, for one).

A step's parts are `key_positions` [axes, tokens] int32 and, where the format is of few bits, `packed` (see `blobs`), else
`key` and `value` [layers, kv_heads, tokens, head_dim].
"""
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch


class Extent(NamedTuple):
    """What is read of a part of a step.

    Attributes:
        size: of the whole part in bytes.
        runs: of its bytes, one behind the other.
    """
    size: int
    runs: Sequence[slice]


class Tier(Protocol):
    """Below the device. All calls come from the thread that owns the memory.

    Attributes:
        as_computed: its raw keys are as the model computed them, rather than as the detailed cache has them.
    """
    as_computed: bool

    def holds(self, step: int) -> bool:
        """Whether a step can be read here, by its number."""

    def runs(self, part: str, steps: Sequence[int], extents: Sequence[Extent]) -> Sequence[bytes | memoryview | None]:
        """Bytes of one part of each of some steps that are held, on the host; None of one that cannot be had, or whose part is of
        another size."""

    def gone(self) -> Iterable[int]:
        """Steps that were here and no longer are, since the last call."""

    def clear(self) -> None:
        """The memory has forgotten everything."""


class HostTier:
    """Main memory, pinned where there is a GPU. Also the waiting room of steps that have left the device before the tier below
    has them.

    Attributes:
        bytes: of all that is held.
        max_bytes: past it the oldest steps leave.
    """
    as_computed = False

    def __init__(self, max_bytes: int, device: torch.device):
        """device: where the steps come from."""
        self.max_bytes, self.bytes = max_bytes, 0
        self._device, self._pinned = device, device.type == 'cuda'
        self._steps: OrderedDict[int, dict[str, torch.Tensor]] = OrderedDict()
        self._arriving: dict[int, torch.cuda.Event] = {}    # by step; who writes does not wait for the device, who reads does

    def put(self, step: int, parts: dict[str, torch.Tensor]) -> None:
        """Hold a step, newer than all that are here."""
        held = self._steps[step] = {name: self._on_host(part) for name, part in parts.items()}
        self.bytes += _bytes(held)
        if self._pinned:
            self._arriving[step] = event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))    # the present device may be another one

    def crowded_out(self, elsewhere: Callable[[int], bool], most_waiting: int) -> list[int]:
        """Let the oldest go until the bound is kept. Those that are not `elsewhere` may wait, `most_waiting` of them at most;
        returns the others, which nobody has now."""
        lost = []
        while self.bytes > self.max_bytes:
            step = next(iter(self._steps))
            if not elsewhere(step):
                if len(self._steps) <= most_waiting:
                    break
                lost.append(step)
            self.drop(step)
        return lost

    def drop(self, step: int) -> None:
        """Let go of a step, if it is here."""
        self._wait_for(step)
        parts = self._steps.pop(step, None)
        if parts is not None:
            self.bytes -= _bytes(parts)

    def holds(self, step: int) -> bool:
        return step in self._steps

    def runs(self, part: str, steps: Sequence[int], extents: Sequence[Extent]) -> list[bytes | memoryview]:
        found = []
        for step, extent in zip(steps, extents):
            self._wait_for(step)
            found.append(side_by_side(memoryview(self._steps[step][part].view(torch.uint8).numpy()).cast('B'), extent.runs))
        return found

    def _wait_for(self, step: int) -> None:
        event = self._arriving.pop(step, None)
        if event is not None:
            event.synchronize()

    def _on_host(self, part: torch.Tensor) -> torch.Tensor:
        # Both are copies: what is given may be rows of a pool.
        if self._pinned:
            return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
        return part.to('cpu', copy=True, memory_format=torch.contiguous_format)


def side_by_side(data: memoryview, runs: Sequence[slice]) -> bytes | memoryview:
    """Runs of bytes, one behind the other; of a single one no copy."""
    return data[runs[0]] if len(runs) == 1 else b''.join([data[run] for run in runs])


def _bytes(parts: dict[str, torch.Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())
