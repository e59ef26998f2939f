"""What an answer may read: the memory as it stood when the question was asked, cut by answer policy and time span."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from statekv_ros.errors import QuestionError
from statekv_ros.memory.chunks import Block, MemoryView
from statekv_ros.memory.policies import AnswerPolicy
from statekv_ros.memory.records import StepRecord

if TYPE_CHECKING:
    from statekv_ros.memory.stream import VideoStream


@dataclass
class PendingFrames:
    """Prepared frames that wait until there are enough of them for a step; `failed`: one with them in it failed."""
    frames: list[np.ndarray] = field(default_factory=list)
    stamps_ns: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    preprocess_ms: float = 0.0
    segment: int = 0
    failed: bool = False

    def __len__(self) -> int:
        return len(self.frames)

    def add(self, frame: np.ndarray, stamp_ns: int, seconds: float, preprocess_ms: float) -> None:
        self.frames.append(frame)
        self.stamps_ns.append(stamp_ns)
        self.seconds.append(seconds)
        self.preprocess_ms += preprocess_ms

    def copy(self) -> PendingFrames:
        return PendingFrames([*self.frames], [*self.stamps_ns], [*self.seconds], self.preprocess_ms, self.segment, self.failed)

    def after_failure(self) -> PendingFrames:
        """What waits again when their step failed: all but the newest, once. Were they at fault, every later step would fail too."""
        if self.failed or len(self) < 2:
            return PendingFrames()
        return PendingFrames(self.frames[:-1], self.stamps_ns[:-1], self.seconds[:-1], self.preprocess_ms, self.segment, True)


@dataclass(frozen=True)
class Snapshot:
    """The readable part of a stream's memory at one moment; later frames do not change it.

    Attributes:
        views: keys and values of the memory; none for `retrieve`.
        blocks: for `retrieve`, the prefix and the steps that it chooses from.
        records: the steps in them, for coverage and evidence (every step that the state may stem from, for `state`).
        pending: frames without a partner that are readable too, or None.
        position, ordinal: virtual position and stream index of the first token that follows.
        shift: how far left of that position the model is given it.
        frame_number: number in the stream, from 0, of the first frame that follows.
        generation: of the stream; it differs once the stream was reset.
    """
    views: list[MemoryView]
    blocks: list[Block]
    records: list[StepRecord]
    pending: PendingFrames | None
    position: int
    shift: int
    ordinal: int
    frame_number: int
    policy: AnswerPolicy
    prefill_policy: str
    generation: int

    @property
    def frames(self) -> int:
        return sum(record.frames for record in self.records) + (len(self.pending) if self.pending else 0)

    @property
    def first_stamp_ns(self) -> int:
        return self.records[0].first_stamp_ns if self.records else self.pending.stamps_ns[0]

    @property
    def last_stamp_ns(self) -> int:
        return self.pending.stamps_ns[-1] if self.pending else self.records[-1].last_stamp_ns

    def turns(self, limit: int) -> list[int]:
        """By how many positions a query has to be turned for each view, so that the view's first token is as far from the
        token that follows as it truly is, or `limit` positions where that is less."""
        return [0 if view.shift is None else
                self.shift - view.shift - max(0, self.position - view.position - limit) for view in self.views]


def take_snapshot(stream: VideoStream, policy: AnswerPolicy, span: tuple[int | None, int | None]) -> Snapshot:
    """Cut the memory by policy and time span (header stamps in ns, None unbounded); copies nothing but a `state`.

    Raises:
        QuestionError: nothing seen yet, a span that ends before it begins, or one without a frame.
    """
    if stream.first_stamp_ns is None:
        raise QuestionError('nothing has been seen yet: ask again after the first frame')
    begin, end = span
    if begin is not None and end is not None and end < begin:
        raise QuestionError(f'time span ends at {end} ns, before it begins at {begin} ns')
    if policy.kind == 'state' and (begin is not None or end is not None):
        raise QuestionError('answer policy "state" cannot be cut to a time span: use "all" or "last(n)"')

    def in_span(first_ns: int, last_ns: int) -> bool:
        return (begin is None or first_ns >= begin) and (end is None or last_ns <= end)

    pending = stream.pending if stream.pending and in_span(stream.pending.stamps_ns[0],
                                                           stream.pending.stamps_ns[-1]) else None
    views, blocks = [], []
    if policy.kind == 'state':
        views, records = [MemoryView(*stream.carried.copy())], list(stream.detailed.records())
    elif policy.kind == 'retrieve':
        blocks = stream.detailed.blocks(lambda record: in_span(record.first_stamp_ns, record.last_stamp_ns))
        records = [block.record for block in blocks if block.record.step >= 0]
    else:
        newest = _newest(stream, policy, lambda record: in_span(record.first_stamp_ns, record.last_stamp_ns),
                         len(pending) if pending else 0)
        views, records = stream.detailed.view(newest)
    if not records and pending is None:
        raise QuestionError(f'no frame between {begin} and {end} ns: the memory covers header stamps '
                            f'{stream.first_stamp_ns} to {stream.last_stamp_ns} ns')
    return Snapshot(views, blocks, records, pending.copy() if pending else None, stream.next_position, stream.shift,
                    stream.next_ordinal, stream.next_frame, policy, str(stream.prefill_policy), stream.generation)


def _newest(stream: VideoStream, policy: AnswerPolicy, in_span: Callable[[StepRecord], bool],
            pending_frames: int) -> Callable[[StepRecord], bool]:
    if policy.kind != 'last':
        return in_span
    # Whole steps, as few as hold the newest n frames.
    missing, wanted = policy.last_frames - pending_frames, set()
    for record in reversed([record for record in stream.detailed.records() if in_span(record)]):
        if missing <= 0:
            break
        wanted.add(record.step)
        missing -= record.frames
    return lambda record: record.step in wanted
