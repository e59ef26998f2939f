"""Frame steps as recorded graphs, once states are full: same shapes, same places, no Python between kernels."""
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import numpy as np
import torch

from statekv_ros.backbones.base import AttentionMemory, StagedStep, TokenInputs
from statekv_ros.backbones.family import Family
from statekv_ros.errors import ParameterError
from statekv_ros.memory.pauses import Pauses
from statekv_ros.memory.recorded import CudaRecorder, RecordedStep, Recorder, require_same
from statekv_ros.memory.recorded_commit import CommitGraphs
from statekv_ros.memory.recorded_decode import DecodeGraphs

CUDA_GRAPH = ('auto', 'off')


class Carried(AttentionMemory, Protocol):
    """What a recording attends to; see `CompressedState` and `side_by_side.States`."""

    def place(self) -> tuple | None: ...

    def frame(self) -> tuple[torch.Tensor, ...]: ...

    def for_recording(self) -> 'Carried': ...

    def standing_for(self, other: 'Carried') -> AbstractContextManager: ...


class Recordable(AttentionMemory, Protocol):
    """A stream (`VideoStream`) or several as one batch (`side_by_side.AtOnce`): a step is recorded over `carried`."""
    carried: Carried

    def check_cancelled(self) -> None: ...

    def replayed(self) -> None: ...


class StepGraphs:
    """Runs steps in place of the backbone: replays what is recorded, else runs eagerly and records what comes twice in a row.

    A shape is the frames' number and size and that of tokens: a step's text grows by a token as it counts frames or seconds. Each
    recording is replayed once on the frame it was recorded with and compared with the eager step. When that differs, or
    nothing can be recorded, a warning says why, and the stream stays eager for a while (`Pauses`).

    Attributes:
        replays: steps that were replayed.
    """

    def __init__(self, backbone: Family, make_recorder: Callable[[], Recorder], most: int = 4,
                 now: Callable[[], float] = time.monotonic):
        """
        Args:
            make_recorder: asked for a new one after all recordings of the one before were let go.
            most: recordings kept; the one that was not used for longest goes.
            now: seconds.
        """
        self._backbone, self._make_recorder, self._most = backbone, make_recorder, most
        self._pauses = Pauses('frame steps', now)
        self.replays = 0
        self.clear()

    @property
    def recorded(self) -> int:
        """Recordings held."""
        return len(self._recorded)

    @property
    def off(self) -> str:
        """Why the stream stays eager for now; '' while it does not."""
        return self._pauses.off

    @property
    def problem(self) -> str:
        """As `off`, as a sentence that says when recording is tried again; from any thread."""
        return self._pauses.problem

    def clear(self) -> None:
        """Forget all recordings."""
        self._recorder: Recorder | None = None
        # By shape: where the state lay, the recording, and what it was made over.
        self._recorded: OrderedDict[tuple, tuple[tuple, RecordedStep, Carried]] = OrderedDict()
        self._step: StagedStep | None = None
        self._shape = self._last_shape = ()

    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int,
               first_frame: int = 0) -> TokenInputs:
        """As `Backbone.encode`; the next step may overwrite the result."""
        return self.encode_step(self._backbone.stage(frames, seconds, position, first_frame))

    def encode_step(self, step: StagedStep) -> TokenInputs:
        """As `Family.encode_step`; the next step may overwrite the result."""
        self._last_shape, self._shape = self._shape, (step.frames.shape, step.tokens, step.visual_start)
        self._step = step
        if self._shape in self._recorded:
            return self._recorded[self._shape][1].encode(step)
        return self._backbone.encode_step(step)

    def forward(self, inputs: TokenInputs, stream: Recordable) -> torch.Tensor:
        """As `Backbone.forward` with the stream as its memory; `inputs` from `encode`, or other tokens (the prefix).

        Raises:
            Interrupted: `stream.cancelled` said so; a replayed step looks once, before it begins.
        """
        step, self._step = self._step, None
        place = stream.carried.place() if step is not None and not self.off else None
        recorded_place, recorded, held = self._recorded.get(self._shape, (None, None, None))
        if place is None or place != recorded_place:
            hidden = self._backbone.forward(inputs, stream)
            if place is not None and (recorded or self._shape == self._last_shape):
                self._record(step, inputs, stream.carried, hidden, place)
            return hidden
        stream.check_cancelled()
        self._recorded.move_to_end(self._shape)
        with held.standing_for(stream.carried):
            hidden = recorded.forward(inputs)
        stream.replayed()
        self.replays += 1
        return hidden

    def _record(self, step: StagedStep, inputs: TokenInputs, state: Carried, hidden: torch.Tensor, place: tuple) -> None:
        """Record a step that has just been run eagerly; whatever happens, the state stays as that left it."""
        written = [hidden, *state.frame()]
        right = [tensor.clone() for tensor in written]
        try:
            self._recorder, held = self._recorder or self._make_recorder(), state.for_recording()
            with held.standing_for(state):
                recorded = RecordedStep(self._backbone, self._recorder, step.on(self._backbone.device), held)
                recorded.encode(step)
                replayed = [recorded.forward(inputs), *state.frame()]
            if state.place() != place:
                raise RuntimeError('what a step attends to moved while it was recorded')
            require_same('step', replayed, right, 'output, keys, values, importance')
        except Exception as error:  # CUDA and the library raise many kinds; eager steps go on after any of them
            self.clear()
            self._pauses.failed(error)
        else:
            self._recorded[self._shape] = place, recorded, held
            if len(self._recorded) > self._most:
                self._recorded.popitem(last=False)
        for tensor, eager in zip(written, right):
            tensor.copy_(eager)


def make_graphs(cuda_graph: str, backbone, prefill_kind: str, most: int = 4) -> StepGraphs | None:
    """Graphs of a stream; None where its steps run eagerly: on a CPU, when switched off, with a policy that carries another
    length from step to step, or over a backbone that is no single model. most: recordings kept.

    Raises:
        ParameterError: `cuda_graph` is unknown.
    """
    if cuda_graph not in CUDA_GRAPH:
        raise ParameterError(f'cuda_graph must be {" or ".join(CUDA_GRAPH)}, got {cuda_graph!r}')
    if cuda_graph == 'off' or backbone.device.type != 'cuda' or prefill_kind != 'statekv' or not isinstance(backbone, Family):
        return None
    return StepGraphs(backbone, partial(CudaRecorder, backbone.device), most)


def make_decodes(cuda_graph: str, backbone) -> DecodeGraphs | None:
    """Graphs of the tokens of a stream's answers; None where these are decoded eagerly: on a CPU, when switched off, or by a
    backbone that is no single model."""
    if cuda_graph == 'off' or backbone.device.type != 'cuda' or not isinstance(backbone, Family):
        return None
    return DecodeGraphs(partial(CudaRecorder, backbone.device, tidy=False))


def make_commits(graphs: StepGraphs | None, device: torch.device) -> CommitGraphs | None:
    """What commits the steps of a stream with these graphs; None where it has none."""
    return None if graphs is None else CommitGraphs(partial(CudaRecorder, device))
