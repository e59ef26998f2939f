"""A restart forgets nothing: a stream that goes on from the disk equals one that never stopped, to the bit."""
import numpy as np
import pytest
import torch

from conftest import SECOND, entries_at
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import StoreError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.saved.restoring import restore
from statekv_ros.memory.saved.saving import Saving, waiting
from statekv_ros.store import MemoryStore

FAMILIES = ['qwen3_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5']
MAX_POSITION = 220
QUOTA = 400 * 10**6


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    """A tiny checkpoint of each family, trained (so it says) for MAX_POSITION positions."""
    base = tmp_path_factory.mktemp('short')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family, max_position=MAX_POSITION)),
                                  device='cpu', dtype='float32') for family in FAMILIES}


@pytest.fixture
def store(tmp_path):
    with MemoryStore.open(tmp_path / 'memory', {'model': 'tiny'}, QUOTA) as store:
        yield store


def watched(backbone, policy: str, cycle: int = 4, **options) -> VideoStream:
    """A stream that is saved."""
    stream = VideoStream(backbone, policy, **options)
    stream.saving = Saving()
    stream.saving.cycle = cycle
    return stream


def see(stream: VideoStream, frames, begin: int, end: int, store: MemoryStore | None = None, step_s: float = 0.5) -> None:
    """Frames by number; saved as the node does when there is a store."""
    for index in range(begin, end):
        stream.step(frames[index % len(frames)], int((index + 1) * step_s * SECOND))
        if store is not None:
            keep(stream, store)


def keep(stream: VideoStream, store: MemoryStore) -> None:
    saved = stream.saving.take()
    if stream.pending:
        saved.append(waiting(stream.pending, stream.progress()))
    for step in saved:
        store.put('front', step.step, step.header, step.parts)


def again(like: VideoStream, store: MemoryStore, most_tokens: int | None = None, **options) -> VideoStream:
    """A new stream that goes on from the disk."""
    stream = watched(like.backbone, str(like.prefill_policy), like.saving.cycle, positions=str(like.positions), **options)
    restore(stream, store, 'front', most_tokens)
    return stream


def assert_same(ours: VideoStream, theirs: VideoStream) -> None:
    """Everything that a stream holds, to the bit."""
    assert ours.progress() == theirs.progress()
    assert ours.shift == theirs.shift
    assert vars(ours.pending).keys() == vars(theirs.pending).keys()
    for name, value in vars(ours.pending).items():
        if name not in ('frames', 'preprocess_ms'):     # the time it took is none of the memory
            assert value == getattr(theirs.pending, name), name
    for one, other in zip(ours.pending.frames, theirs.pending.frames, strict=True):
        assert np.array_equal(one, other)
    for name, one, other in zip(('key', 'value', 'ordinal'), ours.carried.copy(), theirs.carried.copy(), strict=True):
        assert torch.equal(one, other), name
    if getattr(ours.carried, '_places', None):
        live = ours.carried.tokens
        assert torch.equal(ours.carried._places.slots[..., :live], theirs.carried._places.slots[..., :live])
    assert list(ours.detailed.records()) == list(theirs.detailed.records())
    mine, others = (stream.detailed.steps(lambda record: True) for stream in (ours, theirs))
    for one, other in zip(mine, others, strict=True):
        assert torch.equal(one.positions, other.positions) and one.stretch == other.stretch and one.lengths == other.lengths
        pages = slice(one.page, one.page + len(one.lengths)), slice(other.page, other.page + len(other.lengths))
        for layer in range(ours.backbone.layout.layers):
            assert torch.equal(entries_at(ours.detailed.pages, layer, pages[0]),
                               entries_at(theirs.detailed.pages, layer, pages[1]))
        for a, b in zip(ours.detailed.views([one]), theirs.detailed.views([other]), strict=True):
            assert torch.equal(a.key, b.key) and torch.equal(a.value, b.value) and torch.equal(a.ordinal, b.ordinal)
            assert (a.position, a.shift, a.first_ordinal) == (b.position, b.shift, b.first_ordinal)


def answers(stream: VideoStream) -> list:
    """Greedy answers by every way to read, with what they say they cover."""
    return [stream.answer('is the door open?', answer_policy=policy, max_tokens=5)
            for policy in ('all', 'sparse(64)', 'state', 'last(3)', 'retrieve(2)', 'rekv(2)')]


def plain(answer) -> tuple:
    return tuple(value for name, value in vars(answer).items() if not name.endswith('_ms'))


@pytest.mark.parametrize('positions', ['native', 'lazy_shift', 'contiguous'])
@pytest.mark.parametrize('policy', ['statekv(48)', 'window(4)'])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_stream_restored_after_any_step_equals_one_that_never_stopped(family, policy, positions, backbones, frames, store):
    ours = watched(backbones[family], policy, positions=positions)
    # Enough to come past the positions there are; those of Qwen2.5-VL go with the time.
    count, step_s = {'qwen3_vl': (45, 0.5), 'qwen2_5_vl': (31, 4.0)}.get(family, (18, 0.5))
    for index in range(count):
        see(ours, frames, index, index + 1, store, step_s)
        theirs = again(ours, store)
        assert_same(theirs, ours)
        if index % 5 == 4:      # what goes on, and is saved from here on, was restored itself
            ours = theirs
    never = watched(backbones[family], policy, positions=positions)
    see(never, frames, 0, count, step_s=step_s)
    assert_same(theirs, never)
    if positions != 'native':
        assert never.next_position > MAX_POSITION and never.shift > 0
    for stream in (never, theirs):
        see(stream, frames, count, count + 5, step_s=step_s)
    assert_same(theirs, never)
    assert [plain(one) for one in answers(theirs)] == [plain(one) for one in answers(never)]


@pytest.mark.parametrize('policy', ['statekv(48)', 'window(4)', 'none'])
def test_when_the_quota_has_taken_all_steps_the_carried_context_is_in_a_snapshot(policy, backbones, frames, store):
    ours = watched(backbones['internvl'], policy)
    see(ours, frames, 0, 12, store)
    snapshot = ours.saving.snapshot(ours.carried, ours.detailed.stretch, ours.progress())
    store.save_state('front', snapshot.header, snapshot.parts)
    records = {step for step, _ in store.steps('front')}
    for step in records - {-1}:
        store._drop([('front', step)])      # as the quota does when another camera fills it
    theirs = again(ours, store)
    assert theirs.frames == 0 and theirs.forgotten_frames == 12 and theirs.detailed.forgotten_first_ns == SECOND // 2
    for one, other in zip(ours.carried.copy(), theirs.carried.copy(), strict=True):
        assert torch.equal(one, other)
    assert ours.progress() == theirs.progress()
    # Steps that came after the snapshot lead on from it.
    see(ours, frames, 12, 18, store)
    later = again(ours, store)
    see(theirs, frames, 12, 18)
    assert [record.step for record in later.detailed.records()] == list(range(12, 18))
    assert_same(later, theirs)


@pytest.mark.parametrize('policy', ['statekv(48)', 'window(4)', 'full', 'none'])
def test_steps_that_could_not_be_saved_cost_themselves_and_nothing_else(policy, backbones, frames, store):
    ours = watched(backbones['llava_onevision'], policy)
    see(ours, frames, 0, 7, store)
    see(ours, frames, 7, 9)
    ours.saving.take()
    ours.saving.whole = True
    see(ours, frames, 9, 14, store)
    theirs = again(ours, store)
    assert [record.step for record in theirs.detailed.records()] == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13]
    assert theirs.frames == 12 and theirs.forgotten_frames == 2
    assert_same_context(ours, theirs)
    assert theirs.answer('where?', max_tokens=3).token_ids      # a gap in what it holds is no trouble


def assert_same_context(ours: VideoStream, theirs: VideoStream) -> None:
    assert ours.progress() == theirs.progress()
    for one, other in zip(ours.carried.copy(), theirs.carried.copy(), strict=True):
        assert torch.equal(one, other)


def test_only_the_newest_steps_that_fit_are_brought_up_and_the_others_are_counted(backbones, frames, store):
    ours = watched(backbones['qwen3_vl'], 'statekv(48)')
    see(ours, frames, 0, 21, store)
    tokens = [record.tokens for record in ours.detailed.records()]
    theirs = again(ours, store, most_tokens=sum(tokens[-3:]) + 1)
    assert [record.step for record in theirs.detailed.records()] == [7, 8, 9]
    assert (theirs.frames, theirs.forgotten_frames) == (3 * 2 + 1, 7 * 2)
    assert theirs.detailed.forgotten_first_ns == ours.first_stamp_ns
    assert_same_context(ours, theirs)
    bounded = again(ours, store, device_cache_bytes=sum(tokens[-6:]) * (ours.backbone.kv_bytes_per_token + 1))
    assert [record.step for record in bounded.detailed.records()] == [4, 5, 6, 7, 8, 9]
    see(bounded, frames, 21, 40)
    assert bounded.frames + bounded.forgotten_frames == 40


def test_stamps_that_went_back_before_or_after_the_restart_open_a_segment(backbones, frames, store):
    ours = watched(backbones['qwen2_5_vl'], 'statekv(48)')
    see(ours, frames, 10, 17, store)
    see(ours, frames, 2, 7, store)
    theirs = again(ours, store)
    assert theirs.segment == 1
    for stream in (ours, theirs):
        see(stream, frames, 0, 6)
    assert theirs.segment == 2
    assert_same(theirs, ours)


def test_a_context_with_a_step_missing_is_refused_and_a_damaged_step_elsewhere_is_left_out(backbones, frames, store):
    ours = watched(backbones['internvl'], 'statekv(48)', positions='native')
    see(ours, frames, 0, 20, store)
    needs = ours.saving.needs.first
    assert 3 < needs < 18
    store._drop([('front', 2)])
    theirs = again(ours, store)
    assert theirs.frames == 19 and theirs.forgotten_frames == 1
    assert_same_context(ours, theirs)
    store._drop([('front', needs + 1)])
    with pytest.raises(StoreError, match=f'step {needs + 1} of camera .front. is gone.*memory_dir'):
        again(ours, store)


@pytest.mark.parametrize('cycle', [1, 3, 8])
def test_a_restart_needs_no_more_steps_than_a_cycle_and_what_a_step_writes_stays_level(cycle, backbones, frames, store):
    ours = watched(backbones['internvl'], 'statekv(48)', cycle, positions='native')
    sizes = []
    for index in range(40):
        see(ours, frames, index, index + 1)
        saved, = (step for step in ours.saving.take() if step.step >= 0)
        sizes.append(saved.bytes)
        if index > 2 * cycle:       # and has filled up
            assert saved.step - saved.header['needs'] < cycle
    assert max(sizes[10:]) <= min(sizes[10:]) + -(-48 // cycle) * (ours.backbone.kv_bytes_per_token + 1000)


def test_a_reset_stream_is_saved_from_its_beginning(backbones, frames, store):
    ours = watched(backbones['internvl'], 'statekv(48)')
    see(ours, frames, 0, 9, store)
    ours.reset()
    store.clear('front')
    see(ours, frames, 9, 14, store)
    theirs = again(ours, store)
    assert theirs.frames == 5
    assert_same(theirs, ours)


def test_a_camera_that_saw_nothing_or_only_half_a_step_goes_on_too(backbones, frames, store):
    ours = watched(backbones['qwen3_vl'], 'statekv(48)')
    assert again(ours, store).frames == 0
    see(ours, frames, 0, 1, store)
    theirs = again(ours, store)
    assert theirs.frames == 1 and theirs.first_stamp_ns == SECOND // 2
    for stream in (ours, theirs):
        see(stream, frames, 1, 4)
    assert_same(theirs, ours)
