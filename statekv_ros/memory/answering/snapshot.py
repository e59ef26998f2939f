"""What an answer may read: the memory as it stood when the question was asked, cut by answer policy, time span and place."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import attrgetter

import numpy as np

from statekv_ros.backbones.base import Backbone
from statekv_ros.errors import Code, QuestionError
from statekv_ros.memory.carried.positions import PositionPolicy
from statekv_ros.memory.cut import Cut
from statekv_ros.memory.detailed.cache import DetailedCache
from statekv_ros.memory.detailed.held import HeldSteps, Records
from statekv_ros.memory.detailed.pages import MemoryView
from statekv_ros.memory.intake import PendingFrames
from statekv_ros.memory.policies import AnswerPolicy
from statekv_ros.memory.pose import Place
from statekv_ros.memory.recorded_decode import DecodeGraphs
from statekv_ros.memory.records import StepRecord


@dataclass(frozen=True)
class Seen:
    """A memory at one moment, as far as an answer is concerned.

    Attributes:
        carried: copies of the compressed state: keys, values, ordinals; called only for the answer policy `state`.
        pending: frames that wait for their partner.
        position, ordinal: virtual position and stream index of the first token that follows.
        shift: how far left of that position the model is given it.
        frame_number, step_number: numbers in the stream, from 0, of the first frame and of the step that follow.
        cancelled: true when work should end; is_current: false once the memory was reset.
        decodes: what the stream's answers have recorded; None where all of their passes are eager.
    """
    backbone: Backbone
    detailed: DetailedCache
    carried: Callable[[], tuple]
    positions: PositionPolicy
    pending: PendingFrames
    position: int
    ordinal: int
    shift: int
    frame_number: int
    step_number: int
    prefill_policy: str
    cancelled: Callable[[], bool]
    is_current: Callable[[], bool]
    decodes: DecodeGraphs | None = None


@dataclass(frozen=True)
class Snapshot:
    """The readable part of a memory at one moment; later frames do not change it. What the memory forgets meanwhile to make room
    for them is not read any more.

    Attributes:
        seen: with `pending` only if those frames are readable too.
        views: keys and values to read, the prefix first; without `steps`, where those are chosen from.
        steps: for `retrieve`, `rekv` and `sparse`, the steps to choose from; where the cache is in few bits, for `all` and `last(n)`
            those to read.
        records: the steps that can be read, for coverage and evidence (every step that the state may stem from, for `state`).
        record_frames: camera frames of all records.
        earlier_frames, earlier_ns: camera frames before those that the state may stem from too, and the first one's stamp.
    """
    seen: Seen
    policy: AnswerPolicy
    views: list[MemoryView]
    steps: HeldSteps
    records: Records
    record_frames: int
    earlier_frames: int = 0
    earlier_ns: int | None = None

    @property
    def pending(self) -> PendingFrames:
        return self.seen.pending

    @property
    def position(self) -> int:
        """Where the model is given the first token that follows."""
        return self.seen.position - self.seen.shift

    @property
    def frames(self) -> int:
        return self.earlier_frames + self.record_frames + len(self.pending)

    @property
    def first_stamp_ns(self) -> int:
        stamps = [*(first.first_stamp_ns for first, _ in self._segments()), *self.pending.stamps_ns]
        return min(stamps if self.earlier_ns is None else [self.earlier_ns, *stamps])

    @property
    def last_stamp_ns(self) -> int:
        return max([*(last.last_stamp_ns for _, last in self._segments()), *self.pending.stamps_ns])

    @property
    def chooses_pages(self) -> bool:
        """Whether there is more to read than `sparse(n)` reads in a pass."""
        # Counted only as far as it matters: over hours there are many steps.
        return self.policy.kind == 'sparse' and any(
            tokens > self.policy.loaded_tokens for tokens in accumulate(record.tokens for record in self.records))

    def _segments(self) -> Iterator[tuple[StepRecord, StepRecord]]:
        """First and last record of each segment, within which stamps grow: there are many records, and few segments."""
        begin = 0
        while begin < len(self.records):
            first = self.records[begin]
            begin = bisect_right(self.records, first.segment, begin, key=attrgetter('segment'))
            yield first, self.records[begin - 1]

    def turn(self, position: int, shift: int | None) -> int:
        """By how many positions a query has to be turned for keys that stand at their true positions less `shift`, so that the
        token at true `position` is as far from the token that follows as it truly is, or as many positions as there are where
        that is less; 0 where the keys stand in the carried context (`shift` None)."""
        if shift is None:
            return 0
        return self.seen.shift - shift - max(0, self.seen.position - position - self.seen.positions.limit)

    def turns(self, positions: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """`turn` of several, int64 each."""
        beyond = (self.seen.position - self.seen.positions.limit) - positions   # the limit may be no limit at all
        return self.seen.shift - shifts - beyond.clip(min=0)


def take_snapshot(seen: Seen, policy: AnswerPolicy, span: tuple[int | None, int | None], place: Place | None = None) -> Snapshot:
    """Cut the memory by policy, time span (header stamps in ns, None unbounded; a step belongs to every span that it
    touches) and place (None: everywhere; a step without a pose is nowhere); copies nothing but a `state`.

    Raises:
        QuestionError: nothing seen yet, a span that ends before it begins, a coordinate frame that no step has a pose in, or
            no camera frame in the span and at the place.
    """
    detailed = seen.detailed
    if next(detailed.records(), None) is None and not seen.pending:
        raise QuestionError('nothing has been seen yet: ask again after the first frame', Code.NOTHING_SEEN)
    begin, end = span
    if begin is not None and end is not None and end < begin:
        raise QuestionError(f'time span ends at {end} ns, before it begins at {begin} ns')
    cut = Cut(begin, end, place)
    if policy.kind == 'state' and not cut.whole:
        raise QuestionError('answer policy "state" cannot be cut to a time span or a place: use "all" or "last(n)"')
    pending = PendingFrames()
    if seen.pending and cut.takes(seen.pending.stamps_ns[0], seen.pending.stamps_ns[-1], seen.pending.pose):
        pending = seen.pending.copy()
    asked, seen = seen, replace(seen, pending=pending)
    held_frames = seen.frame_number - detailed.forgotten_frames
    if policy.kind == 'state':
        return Snapshot(seen, policy, [MemoryView(*seen.carried())], HeldSteps(), Records(detailed.steps()), held_frames,
                        detailed.forgotten_frames, detailed.forgotten_first_ns)
    everything = cut.whole and policy.kind != 'last'
    steps = detailed.steps() if cut.whole else detailed.steps().within(cut)
    if policy.kind == 'last':
        steps = _newest(steps, policy.last_frames - len(pending))
    if not steps and not pending:
        raise _nothing(asked, detailed.steps(), cut)
    records = Records(steps)
    frames = held_frames if everything else int(records.column('frames').sum())
    by_pages = Snapshot(seen, policy, detailed.prefix(), steps, records, frames)
    if policy.retrieves or by_pages.chooses_pages or detailed.by_pages:
        return by_pages
    return Snapshot(seen, policy, detailed.views(steps, seen.position - seen.positions.limit), HeldSteps(), records, frames)


def _newest(steps: HeldSteps, frames: int) -> HeldSteps:
    """Whole steps, as few as hold the newest `frames` frames."""
    count = 0
    while count < len(steps) and frames > 0:
        count += 1
        frames -= steps[-count].record.frames
    return steps[len(steps) - count:]


def _nothing(seen: Seen, held: HeldSteps, cut: Cut) -> QuestionError:
    """What to say where no frame is within a cut; `held`: all steps, `seen` with the frames that wait."""
    waiting, place = seen.pending.stamps_ns, cut.place
    first = min([*held.column('first_stamp_ns').tolist(), *waiting], default=0)
    last = max([*held.column('last_stamp_ns').tolist(), *waiting], default=0)
    of_span = f'no frame between {cut.first_ns} and {cut.last_ns} ns: the memory covers header stamps {first} to {last} ns'
    if place is None:
        return QuestionError(of_span, Code.NOTHING_SEEN)
    poses = [*held.poses(), *filter(None, [seen.pending.pose])]
    frames = sorted({pose.frame_id for pose in poses})
    if not frames:
        return QuestionError(f'no frame can be told to be within {place}: no step has a pose (parameters "pose.topic" and '
                             '"pose.target_frame")', Code.UNKNOWN_FRAME)
    if place.frame_id not in frames:
        return QuestionError(f'no step has a pose in frame {place.frame_id!r}: there are poses in {", ".join(frames)}',
                             Code.UNKNOWN_FRAME)
    nearest = min(place.distance_m(pose) for pose in poses if pose.frame_id == place.frame_id)
    if nearest <= place.radius_m:
        return QuestionError(f'no frame between {cut.first_ns} and {cut.last_ns} ns within {place}, but at other times',
                             Code.NOTHING_SEEN)
    return QuestionError(f'no frame within {place}: the nearest was seen {nearest:.2f} m away', Code.NOTHING_SEEN)
