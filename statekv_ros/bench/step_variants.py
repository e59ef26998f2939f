"""The steps that are measured against each other: over a compressed state of some budget, and over all frames so far."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from statekv_ros.backbones.base import StagedStep, TokenInputs
from statekv_ros.backbones.family import Family
from statekv_ros.bench.grown_cache import GrownCache
from statekv_ros.memory import VideoStream
from statekv_ros.memory.capacity import available_memory, gigabytes
from statekv_ros.memory.carried.positions import StepPlace
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.recorded import CudaRecorder, RecordedStep
from statekv_ros.memory.records import StepRecord

_HELD_TOKENS = 1024
_FOR_THE_CACHE = .6  # of what is free; the rest is for the steps' own memory


@dataclass
class Variant:
    """One point of the figure.

    Attributes:
        frame: frame steps already seen.
        carried: tokens in the past of the step.
        run: one step, marking the clock after the vision tower, the language model and the selection.
        replayed: whether `run` replays a recording by now.
    """
    policy: str
    budget: int
    frame: int
    carried: int
    run: Callable[[PhaseClock], None]
    replayed: Callable[[], bool]


class Step:
    """One frame step of a backbone, as it would be after any number of frames, a step a second."""

    def __init__(self, backbone: Family, frames: list[np.ndarray], cuda_graph: str):
        self.backbone, self._frames, self._cuda_graph = backbone, frames, cuda_graph

    def staged(self, frame: int, position: int = 0) -> StagedStep:
        """The step after `frame` others: its text counts them."""
        return self.backbone.stage(*self._arguments(frame, position))

    def seen_tokens(self, frame: int) -> int:
        """Tokens of the first `frame` steps."""
        return frame * self.staged(frame).tokens

    def statekv(self, budget: int, frame: int) -> Variant:
        """A step over the state as it would be: at most `budget` tokens, and full where this step would fill it."""
        stream = VideoStream(self.backbone, f'statekv({budget})', cuda_graph=self._cuda_graph,
                             device_cache_bytes=2 * _HELD_TOKENS * self.backbone.kv_bytes_per_token)
        runner = stream.graphs or self.backbone
        carried = self.seen_tokens(frame)
        full = carried + self.staged(frame).tokens > budget
        carried = budget if full else carried
        _fill(stream, carried)

        def run(clock: PhaseClock) -> None:
            inputs = runner.encode(*self._arguments(frame, carried))
            clock.mark()
            place = _place(inputs.tokens, carried, self.backbone.starts(inputs), inputs.next_position)
            stream.carried.begin(place)
            stream.detailed.begin(place, stream.shift)
            runner.forward(self.backbone.shifted(inputs, stream.shift), stream)
            clock.mark()
            stream.detailed.commit(_record(inputs, carried), inputs)
            if full:  # else nothing is selected, and what was not committed leaves the state as it was
                stream.commit_carried()
            clock.mark()

        return Variant(str(stream.prefill_policy), budget, frame, carried, run,
                       lambda: stream.graphs is not None and stream.graphs.replays > 0)

    def full(self, frames: list[int]) -> tuple[list[Variant], list[dict]]:
        """A step over all frames so far, where their cache fits well into the memory that is left; and where it does not."""
        layout = self.backbone.layout
        free, where = available_memory(layout.device)
        needed = {frame: self.seen_tokens(frame) + 2 * self.staged(frame).tokens for frame in frames}
        room = free * _FOR_THE_CACHE
        fitting = [frame for frame in frames if needed[frame] * layout.bytes_per_token <= room]
        left_out = [{'policy': 'full', 'frame': frame, 'reason': 'its cache needs '
                     f'{gigabytes(needed[frame] * layout.bytes_per_token)}, and of {where} {gigabytes(room)} are left for it'}
                    for frame in frames if frame not in fitting]
        if not fitting:
            return [], left_out
        cache = GrownCache(layout, max(needed[frame] for frame in fitting))
        return [self._full(cache, frame) for frame in fitting], left_out

    def _full(self, cache: GrownCache, frame: int) -> Variant:
        """Replayed like the others, so that what differs is the attention."""
        carried, backbone = self.seen_tokens(frame), self.backbone
        record = CudaRecorder(backbone.device) if backbone.device.type == 'cuda' and self._cuda_graph == 'auto' else None
        runs: list[RecordedStep] = []
        done = 0

        def run(clock: PhaseClock) -> None:
            nonlocal done
            cache.tokens, step = carried, self.staged(frame, carried)
            if done == 1 and record is not None:
                runs.append(RecordedStep(backbone, record, step.on(backbone.device), cache))
            inputs = runs[0].encode(step) if runs else backbone.embed_step(step.on(backbone.device))
            clock.mark()
            if runs:
                runs[0].forward(inputs)
            else:
                backbone.forward(inputs, cache)
            clock.mark()
            clock.mark()
            done += 1

        return Variant('full', 0, frame, carried, run, lambda: bool(runs))

    def _arguments(self, frame: int, position: int) -> tuple[list[np.ndarray], list[float], int, int]:
        each = self.backbone.frames_per_step
        return self._frames, [frame + index / each for index in range(each)], position, frame * each


def _place(tokens: int, position: int, starts: torch.Tensor, next_position: int) -> StepPlace:
    return StepPlace(tokens, 1, position, position, next_position, position, starts, lambda: 0)


def _record(inputs: TokenInputs, ordinal: int) -> StepRecord:
    return StepRecord(0, 0, 1, 1, 1, ordinal, inputs.tokens, inputs.visual_start, inputs.visual_tokens, inputs.start,
                      inputs.next_position)


def _fill(stream: VideoStream, tokens: int) -> None:
    """Carry `tokens` tokens of noise, by the state's own life; what they attend to is beside the point, so one query does."""
    layout, carried = stream.backbone.layout, stream.carried
    carried.begin(_place(tokens, 0, torch.arange(tokens, device=layout.device), tokens))
    noise = torch.randn(1, layout.kv_heads, tokens, layout.head_dim, dtype=layout.dtype, device=layout.device)
    for layer in range(layout.layers):
        carried.attend(layer, noise[:, :, -1:], noise, noise, layout.head_dim ** -0.5)
    carried.commit()
