"""A stream that goes on where another one was saved: carried context, newest steps and waiting frames, equal to the bit."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.errors import StoreError
from statekv_ros.memory.carried.positions import StepPlace
from statekv_ros.memory.detailed.pages import Stretch
from statekv_ros.memory.intake import PendingFrames
from statekv_ros.memory.pose import Pose
from statekv_ros.memory.records import StepRecord
from statekv_ros.memory.saved.saving import PREFIX, WAITING
from statekv_ros.memory.stream import VideoStream

_UNPACKED = 8       # steps that may have been in memory alone, on their way to a tier

Loaded = tuple[dict[str, Any], dict[str, Any]]


class Saved(Protocol):
    """Where saved steps lie, by camera; `statekv_ros.store.StoreReader` is one."""

    def headers(self, camera: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and header of each step, oldest first."""

    def load_step(self, camera: str, step: int, only: str | None = None) -> Loaded | None:
        """Header and parts of a step (`only` one). Raises StoreError when it is damaged, or has no such part."""

    def load_state(self, camera: str) -> Loaded | None:
        """Header and parts of the newest snapshot of the carried context. Raises StoreError when it is damaged."""


@dataclass(frozen=True)
class Restored:
    """What a stream has again.

    Attributes:
        frames: camera frames that it has seen; held_frames: those whose keys and values it holds.
        last_stamp_ns: header stamp of the newest; None where there was nothing to restore.
        damaged: a sentence per step that was left out.
    """
    frames: int = 0
    held_frames: int = 0
    last_stamp_ns: int | None = None
    damaged: tuple[str, ...] = ()


class _Known(NamedTuple):
    """What is remembered of a step's header, from the first look at all of them on."""
    tokens: int
    frames: int
    packed: bool
    oldest_ns: int | None

    @staticmethod
    def of(header: dict) -> _Known:
        record = header['record']
        return _Known(record['tokens'], record['frames'], header.get('packed', False), header['before']['oldest_ns'])


@torch.inference_mode()
def restore(stream: VideoStream, saved: Saved, camera: str, most_tokens: int | None = None) -> Restored:
    """Fill a stream that has seen nothing.

    Args:
        most_tokens: the newest steps are brought up to its detailed cache, as far as they are no more tokens than this and than
            its own bound; what is older stays in the tier that holds it, or counts as forgotten where none does.

    Raises:
        StoreError: what leads to the carried context is damaged or gone; reset the stream.
    """
    steps, has_prefix, newest, snapshot = {}, False, None, saved.load_state(camera)
    for number, header in saved.headers(camera):
        if number >= 0:
            steps[number], newest = _Known.of(header), header
        has_prefix |= number == PREFIX
    numbers = list(steps)
    if not numbers and snapshot is None:
        return _with_waiting(stream, saved, camera, Restored())
    begin, last, newest = _chain(numbers, newest, snapshot)
    chain = range(begin, last + 1)
    missing = [number for number in chain if number not in steps and not (number == PREFIX and has_prefix)]
    if missing:
        raise StoreError(f'step {missing[0]} of camera {camera!r} is gone, and what was carried after step {last} cannot be '
                         'told without it: choose another folder (parameter "memory_dir")')
    room = stream.detailed.room() if most_tokens is None else min(most_tokens, stream.detailed.room())
    near, damaged = _near(stream, steps, numbers, room), []
    chosen, far = set(numbers[near:]), {number for number in numbers[:near] if stream.holds_below(number)}
    if snapshot is not None and begin == snapshot[0]['after']['steps']:
        _put_share(stream, snapshot)
        stream.saving.needs.begin_at(begin, snapshot[0]['after']['next_ordinal'], stream.carried.tokens)
    for number in sorted({*chain, *chosen, *far, *([PREFIX] if has_prefix else [])}):
        try:
            whole = number in chain or number in chosen or number == PREFIX
            loaded = saved.load_step(camera, number, None if whole else 'index')
            if loaded is None:
                raise StoreError(f'step {number} of camera {camera!r} is gone')
            if number in chain:
                _carry_again(stream, loaded)
            if number in chosen or number in far or number == PREFIX:
                _hold_again(stream, loaded, number, number not in far)
        except StoreError as error:
            if number in chain or number == PREFIX:
                raise
            damaged.append(str(error))
    progress = newest['after']
    stream.saving.packed_already({number for number in numbers if steps[number].packed})
    stream.saving.resume(newest['share'], _oldest_ns(newest))
    stream.resume(progress)
    if newest['stretch']:
        stream.detailed.resume(Stretch(*newest['stretch']))
    frames = int(stream.detailed.steps().column('frames').sum())    # fewer where memory was full
    _count_forgotten(stream, steps, progress['frames'] - frames, _oldest_ns(newest))
    return _with_waiting(stream, saved, camera, Restored(progress['frames'], frames, stream.last_stamp_ns, tuple(damaged)))


def _chain(numbers: list[int], newest: dict | None, snapshot: Loaded | None) -> tuple[int, int, dict]:
    """First and last of the steps that lead to the newest carried context, and the header of what was saved last, with that of
    the `newest` step."""
    last = numbers[-1] if numbers else PREFIX - 1
    if snapshot is None:
        return newest['needs'], last, newest
    behind = snapshot[0]['after']['steps']
    if behind > last:
        return behind, behind - 1, snapshot[0]
    return max(behind, newest['needs']), last, newest


def _near(stream: VideoStream, steps: dict[int, _Known], numbers: list[int], tokens: int) -> int:
    """Index of the first of the newest steps that are no more than so many tokens, and those right before them that no tier below
    holds yet."""
    begin = len(numbers)
    while begin and (tokens := tokens - steps[numbers[begin - 1]].tokens) >= 0:
        begin -= 1
    if stream.detailed.far is not None:
        for _ in range(min(begin, _UNPACKED)):
            if stream.holds_below(numbers[begin - 1]):
                break
            begin -= 1
    return begin


def _record(header: dict) -> StepRecord:
    return StepRecord(**header['record'], pose=Pose.restored(header.get('pose')))


def _place(stream: VideoStream, loaded: Loaded) -> tuple[StepRecord, TokenInputs, StepPlace]:
    header, parts = loaded
    record, backbone = _record(header), stream.backbone
    positions = parts['positions'].to(backbone.device)
    inputs = TokenInputs(torch.empty(1, record.tokens, 0), positions, record.next_position, record.position)
    return record, inputs, StepPlace(
        record.tokens, record.frames, record.first_ordinal, header['position'], record.next_position, inputs.start,
        backbone.starts(inputs), lambda: backbone.largest_shift(inputs))


def _carry_again(stream: VideoStream, loaded: Loaded) -> None:
    """What a step made of the carried context."""
    header, parts = loaded
    record, _, place = _place(stream, loaded)
    stream.saving.needs.note(record.step, record.first_ordinal, header['carried'], header['share'])
    if header['share'] is None or header['share']['share'] != [0, header['carried']['tokens']]:
        stream.carried.follow(place, header['shift'], parts['key'], parts['value'], header['carried'], parts)
    if header['share'] is not None:
        _put_share(stream, loaded)


def _hold_again(stream: VideoStream, loaded: Loaded, number: int, near: bool) -> None:
    """A step in the detailed cache; `near`: on the device."""
    header, parts = loaded
    detailed = stream.detailed
    if near and not header.get('packed'):
        record, inputs, place = _place(stream, loaded)
        if number != PREFIX:
            detailed.resume(Stretch(*header['stretch']))
        detailed.begin(place, header['shift'], prefix=number == PREFIX)
        detailed.write_all(parts['key'].to(stream.backbone.device), parts['value'].to(stream.backbone.device))
        detailed.commit(record, inputs)
        return
    record, stretch = _record(header), Stretch(*header['stretch'])
    shape = detailed.index_shape(record)
    if parts['index'].shape != shape:
        raise StoreError(f'the index of step {number} is {tuple(parts["index"].shape)} rather than {shape}: another version of this '
                         'package made it')
    if near:
        detailed.take_packed(record, stretch, parts)
    else:
        detailed.take_far(record, stretch, header['shift'] - stretch.shift, parts['index'])


def _put_share(stream: VideoStream, loaded: Loaded) -> None:
    stream.carried.put_share(loaded[0]['shift'], loaded[0]['share'], loaded[1])


def _oldest_ns(header: dict) -> int:
    """Oldest header stamp that a stream has seen until a step or snapshot was saved."""
    if 'before' not in header:
        return header['oldest_ns']
    before = header['before']['oldest_ns']
    return min(before or header['first_stamp_ns'], header['first_stamp_ns'])


def _count_forgotten(stream: VideoStream, steps: dict[int, _Known], frames: int, oldest_ns: int) -> None:
    """frames: that are not held any more."""
    stream.detailed.forgotten_frames = frames
    if frames:
        first = next(stream.detailed.records(), None)
        before = steps[first.step].oldest_ns if first else oldest_ns
        # Where only steps in between are missing, the first one held is as old.
        stream.detailed.forgotten_first_ns = before or first.first_stamp_ns


def _with_waiting(stream: VideoStream, saved: Saved, camera: str, restored: Restored) -> Restored:
    loaded = saved.load_step(camera, WAITING)
    if loaded is None or loaded[0]['after']['steps'] != stream.steps:
        return restored
    header, parts = loaded
    stream.resume(header['after'], PendingFrames(
        list(parts['frames'].numpy()), **header['waiting'], pose=Pose.restored(header.get('pose'))))
    count = len(stream.pending)
    return Restored(restored.frames + count, restored.held_frames + count, stream.last_stamp_ns, restored.damaged)
