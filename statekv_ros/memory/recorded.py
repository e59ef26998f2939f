"""One frame step as recorded work on fixed memory: replayed by the device alone, without Python between its kernels."""
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from statekv_ros.backbones.base import AttentionMemory, StagedStep, TokenInputs
from statekv_ros.backbones.family import Family
from statekv_ros.backbones.upload import copy_to_device

Result = TypeVar('Result')
# Records what a function does on the device; gives a way to do it again and the result, whose tensors each replay fills anew.
Recorder = Callable[[Callable[[], Result]], tuple[Callable[[], None], Result]]

# A recording may choose other kernels than the eager work; relative errors by norm that this explains.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Graphs whose capture could not be ended. The allocator goes on asking them which memory is theirs, so none may be destroyed.
_half_captured: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they are replayed one at a time, and nobody reads an older one's
    result by then. The pool dies with the last of them, and older versions of torch record none in it afterwards: who lets go
    of all of them takes a new recorder."""

    def __init__(self, device: torch.device, tidy: bool = True):
        """tidy: before a recording, give all memory that is not in use back to the driver, as `torch.cuda.graph` does, which
        then has to be asked for it anew. Too dear for what is recorded again and again."""
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._capture = torch.cuda.graph if tidy else _capture
        self._pool = None

    def __call__(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        # torch keeps the workspace of matrix products per stream, in the pool of the graph that asked for it first. A later graph
        # on the same stream would use it on after that one and its pool are gone. So each begins without, and leaves none behind.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # `graph` does not come back to this thread's stream when the capture cannot be ended; the `stream` around it does.
            # Other threads may use the GPU meanwhile; only this one's mistakes shall break the recording.
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream), \
                    self._capture(graph, self._pool, self._stream, 'thread_local'):
                result = function()
        except BaseException:
            if not _has_ended(graph):
                _half_captured.append(graph)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        self._pool = graph.pool()
        return graph.replay, result


@contextlib.contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool, stream: torch.cuda.Stream, capture_error_mode: str) -> Iterator[None]:
    """As `torch.cuda.graph`, on a stream that is the present one already, but that the allocator's memory stays as it is."""
    torch.cuda.synchronize()
    graph.capture_begin(*([] if pool is None else [pool]), capture_error_mode=capture_error_mode)
    try:
        yield
    finally:
        graph.capture_end()


def require_same(what: str, replayed: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], names: str) -> None:
    """Raise ArithmeticError where what a replay gave is not what was computed eagerly; the first of them tells by its dtype what
    rounding explains. The host waits."""
    errors = [float((ours.float() - right.float()).norm() / right.float().norm().clamp_min(1e-30))
              for ours, right in zip(replayed, eager, strict=True)]
    if not all(error <= _TOLERANCE[eager[0].dtype] for error in errors):    # NaN is no match either
        raise ArithmeticError(f'a replayed {what} differs from the eager one by '
                              f'{", ".join(f"{error:.1e}" for error in errors)} of its norm ({names})')


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:    # which only a graph whose capture has ended can tell
        return False
    return True


class RecordedStep:
    """Vision tower and language model of steps of one shape.

    Two recordings, so that the time of each can be told, and so that what the host decides between them (where the step
    stands) stays with the host. What is selected afterwards, once keys and values are in the detailed cache, is recorded by itself:
    see `recorded_commit`.
    """

    def __init__(self, backbone: Family, record: Recorder, step: StagedStep, memory: AttentionMemory):
        """
        Args:
            step: one of the shape, on the device, that has been run before; it stays as it is.
            memory: must attend in the same places at every replay.
        """
        self._step = replace(step, frames=step.frames.clone(), token_ids=step.token_ids.clone(),
                             positions=step.positions.clone())
        self._placed = step.positions.clone()
        self._see, self._inputs = record(lambda: backbone.embed_step(self._step))
        self._read, self._hidden = record(
            lambda: backbone.forward(replace(self._inputs, positions=self._placed), memory))

    def encode(self, step: StagedStep) -> TokenInputs:
        """As `Backbone.encode`, of a step on the host; the next replay overwrites the result."""
        copy_to_device(step.frames, self._step.frames)
        copy_to_device(step.token_ids, self._step.token_ids)
        copy_to_device(step.positions, self._step.positions)
        self._see()
        return replace(self._inputs, next_position=step.next_position, start=step.start)

    def forward(self, inputs: TokenInputs) -> torch.Tensor:
        """As `Backbone.forward`, of what `encode` returned, shifted or not; the next replay overwrites the result."""
        self._placed.copy_(inputs.positions)
        self._read()
        return self._hidden
