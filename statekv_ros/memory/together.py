"""Frame steps of several streams as one batch: the model's weights are read once for all of them.

A stream takes its frame, begins, attends and commits as in a step of its own; what lies between, the vision tower and the
language model, sees all of them at once. Nobody waits for anybody: a batch is what a caller has at hand.
"""
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.beside import Beside
from statekv_ros.backbones.family import Family
from statekv_ros.errors import Interrupted
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.graphs import StepGraphs, make_graphs
from statekv_ros.memory.records import StepRecord, StepReport
from statekv_ros.memory.side_by_side import AtOnce, side_by_side
from statekv_ros.memory.stream import VideoStream

_MOST_RECORDED = 8      # batches: of each number of streams there may be one or two shapes
PAUSE_S = 60.0      # after batches have failed whose steps do not fail alone
# What came of a frame: the report of the step that it completed, None while it waits for its partner, or what went wrong.
Outcome = StepReport | Exception | None


class Given(NamedTuple):
    """A stream's next frame; see `VideoStream.step`."""
    stream: VideoStream
    frame: np.ndarray
    stamp_ns: int
    preprocess_ms: float = 0.0


class Together:
    """Steps of streams over one backbone. What came of a frame, its stream's memory included, is what it would have been alone.

    Attributes:
        graphs: batches as recorded graphs, by their number of streams and shapes; None where streams have none either.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        """now: seconds."""
        self.graphs: StepGraphs | None = None
        self._now = now
        self._failing: WeakSet[VideoStream] = WeakSet()
        self._reason, self._paused_until = '', float('-inf')

    @property
    def problem(self) -> str:
        """What makes batches slower than they could be, as a sentence; '' while nothing does. From any thread."""
        left_s = self._paused_until - self._now()
        paused = '' if left_s <= 0 else (f'cameras are stepped one by one, which is slower: {self._reason} (tried again in '
                                         f'{left_s:.0f} s)')
        return '; '.join(filter(None, (paused, self.graphs.problem if self.graphs is not None else '')))

    def step(self, given: Sequence[Given]) -> list[Outcome]:
        """Each of these streams, all of them different ones, takes a frame.

        Raises:
            Interrupted: a stream's `cancelled` said so; what was not committed by then is as after `VideoStream.step`.
        """
        outcomes: list[Outcome] = [None] * len(given)
        try:
            for numbers in self._take_in(given, outcomes):
                for number, outcome in zip(numbers, self._run([given[number].stream for number in numbers])):
                    outcomes[number] = outcome
        except Interrupted:
            for stream, *_ in given:
                if stream.is_ready:
                    stream.give_up()
            raise
        return outcomes

    def _take_in(self, given: Sequence[Given], outcomes: list[Outcome]) -> list[list[int]]:
        """Numbers of the frames that complete a step, by batch; what came of the others is among `outcomes`."""
        batches: dict[object, list[int]] = {}
        for number, (stream, *frame) in enumerate(given):
            try:
                outcomes[number] = stream.take_in(*frame)
            except Interrupted:
                raise
            except Exception as error:  # one stream's trouble is its own
                outcomes[number] = error
            if stream.is_ready:
                batches.setdefault(self._batch_of(stream), []).append(number)
        return list(batches.values())

    def _batch_of(self, stream: VideoStream) -> object:
        """Streams with an equal one are stepped in one pass. What goes alone has one to itself: this is where that is decided."""
        alone = (not isinstance(stream.backbone, Family)    # knows no rows
                 or stream in self._failing                 # would fail the others' batch too
                 or self._now() < self._paused_until)       # there is no room, say
        return id(stream) if alone else (id(stream.backbone), stream.pending.frames[0].shape)

    def _run(self, streams: list[VideoStream]) -> list[Outcome]:
        if len(streams) == 1:
            return [self._step_alone(streams[0])]
        clock = PhaseClock(streams[0].backbone.device)
        try:
            begun = _forward(streams, self._graphs_for(streams), clock)
        except Interrupted:
            raise
        except Exception as error:  # whosever fault it was: alone, it has no others to fail
            outcomes = [self._step_alone(stream) for stream in streams]
            if not any(isinstance(outcome, Exception) for outcome in outcomes):
                self._pause(f'{type(error).__name__}: {error}')
            return outcomes
        outcomes = [_commit(stream, *step, clock) for stream, step in zip(streams, begun)]
        try:
            vision_ms, prefill_ms, *select_ms = clock.phases_ms()
        except Exception as error:  # this is where a GPU's errors come to light
            return [error] * len(streams)
        return [outcome.timed(vision_ms, prefill_ms, ms, len(streams)) if isinstance(outcome, StepReport) else outcome
                for outcome, ms in zip(outcomes, select_ms)]

    def _graphs_for(self, streams: list[VideoStream]) -> StepGraphs | None:
        if any(stream.graphs is None for stream in streams):
            return None
        if self.graphs is None:
            self.graphs = make_graphs('auto', streams[0].backbone, 'statekv', _MOST_RECORDED)
        return self.graphs

    def _step_alone(self, stream: VideoStream) -> Outcome:
        try:
            report = stream.flush()
        except Interrupted:
            raise
        except Exception as error:
            self._failing.add(stream)
            return error
        self._failing.discard(stream)
        return report

    def _pause(self, reason: str) -> None:
        self._reason, self._paused_until = reason, self._now() + PAUSE_S
        warnings.warn(self.problem, RuntimeWarning, stacklevel=2)


@torch.inference_mode()
def _forward(streams: list[VideoStream], graphs: StepGraphs | None, clock: PhaseClock) -> list[tuple[StepRecord, TokenInputs]]:
    """Run the waiting frames of streams through the model; nothing is committed. What each has begun."""
    backbone: Family = streams[0].backbone
    model = graphs or backbone
    for stream in streams:
        stream.remember_prefix()
    beside = Beside([backbone.stage(*stream.next_step()) for stream in streams])
    inputs = model.encode_step(beside.step)
    clock.mark()
    begun = [(stream.begin(row), row) for stream, row in zip(streams, beside.rows(inputs))]
    if any(stream.shift for stream in streams):
        inputs = beside.moved(inputs, [backbone.shifted(row, stream.shift) for stream, (_, row) in zip(streams, begun)])
    memory = side_by_side(streams, beside.columns)
    (model if isinstance(memory, AtOnce) else backbone).forward(inputs, memory)
    memory.finish()
    clock.mark()
    return begun


@torch.inference_mode()
def _commit(stream: VideoStream, record: StepRecord, inputs: TokenInputs, clock: PhaseClock) -> Outcome:
    try:
        return stream.commit(record, inputs)
    except Exception as error:
        stream.give_up()
        return error
    finally:
        clock.mark()
