"""A memory most of which lies in a store: answers read it there, and a stream that goes on from it equals one that never
stopped."""
from statistics import median

import pytest
import torch

from conftest import entries_at
from statekv_ros.memory import VideoStream
from statekv_ros.memory.detailed.cache import EXACT_STEPS
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.saved.restoring import restore
from statekv_ros.memory.saved.saving import Saving
from statekv_ros.store import MemoryStore
from statekv_ros.store.kept import KeptCamera
from statekv_ros.store.retention import cost_of
from statekv_ros.store.sizes import disk_step
from statekv_ros.store.tier import PACKED_PARTS, DiskTier
from test_packed_memory import PAGE, QUESTION, backbones, stamp  # noqa: F401

FORMATS = ['bf16', 'int4']
QUOTA = 400 * 10**6
CYCLE = 12
POLICIES = ('all', 'sparse(45)', 'sparse(10)', 'last(12)', 'retrieve(3)', 'rekv(3)')


@pytest.fixture
def store(tmp_path):
    with MemoryStore.open(tmp_path / 'memory', {'model': 'tiny'}, QUOTA) as store:
        yield store


class Watched:
    """A camera's stream and what is kept of it."""

    def __init__(self, backbone, store: MemoryStore, form: str, policy: str = 'statekv(20)', positions: str = '', **options):
        tier = DiskTier(packed=form != 'bf16')
        step = 30 * backbone.layout.bytes_per_token
        self.stream = VideoStream(backbone, policy, detailed_format=form, positions=positions, page_tokens=PAGE, below=[tier],
                                  **{'device_cache_bytes': (EXACT_STEPS + 2) * 4 * step * 4 // 6, **options})
        self.stream.saving = Saving()
        self.stream.saving.cycle = CYCLE
        self.store, self.kept = store, KeptCamera(store, 'front', tier)
        restore(self.stream, store, 'front')

    def see(self, frames, begin: int, end: int) -> None:
        for index in range(begin, end):
            self.stream.step(frames[index % len(frames)], stamp(index))
            saving = self.stream.saving
            for _, step in self.kept.save(saving.take(), saving.take_packed(), saving.needs.first):
                self.kept.left(step)


def everything(stream: VideoStream) -> list:
    """What answers read of every step held, page by page as numbers, and where the stream stands."""
    detailed, held = stream.detailed, []
    pages = torch.tensor([[page for step in detailed.steps() for page in range(step.page, step.page + len(step.lengths))]])
    lengths = torch.tensor([[length for step in detailed.steps() for length in step.lengths]], dtype=torch.int32)
    heads = stream.backbone.layout.kv_heads
    for layer in range(stream.backbone.layout.layers):
        near = pages >= detailed.pages.near
        for each in detailed.far.rounds(layer, pages.expand(heads, -1), lengths.masked_fill(near, 0).expand(heads, -1)):
            key, value, visual, rope = detailed.staged(layer)
            parts = (key, value, visual) if value is not None else (key.key_codes, key.value_codes, visual, rope.positions)
            for number, start, length in zip(each.columns[0].tolist(), each.starts[0].tolist(), each.lengths[0].tolist()):
                rows = slice(start, start + length)
                held.append((layer, number, [part[..., rows].clone() if part.ndim < 3 else part[:, rows].clone()
                                             for part in parts]))
        held.append((layer, -1, [entries_at(detailed.pages, layer, slice(detailed.pages.first, detailed.pages.stop)).clone()]))
    held.sort(key=lambda entry: entry[:2])
    return held


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize('family, positions, policy', [
    ('internvl', 'lazy_shift', 'statekv(20)'), ('qwen3_vl', 'native', 'statekv(20)'), ('eagle2_5', 'contiguous', 'statekv(20)'),
    ('qwen2_5_vl', 'lazy_shift', 'window(6)')])
def test_a_restart_reads_the_same_pages_to_the_bit_and_answers_alike(family, positions, policy, form, backbones, frames,  # noqa: F811
                                                                     store):
    backbone = backbones[family]
    count = {'bf16': 60, 'int4': 130}[form] * backbone.frames_per_step
    ours = Watched(backbone, store, form, policy, positions)
    ours.see(frames, 0, count)
    assert len(ours.stream.detailed.far.steps) > 10 and not ours.stream.forgotten_frames
    theirs = Watched(backbone, store, form, policy, positions)
    for stream in (ours.stream, theirs.stream):
        stream.detailed.far._staging_bytes = 2**24
    assert list(theirs.stream.detailed.records()) == list(ours.stream.detailed.records())
    assert theirs.stream.progress() == ours.stream.progress()
    mine, others = everything(ours.stream), everything(theirs.stream)
    far = min(len(stream.detailed.far.steps) for stream in (ours.stream, theirs.stream))
    assert far > 10
    for one, other in zip([entry for entry in mine if entry[1] < far], [entry for entry in others if entry[1] < far]):
        assert one[:2] == other[:2]
        for part, right in zip(one[2], other[2], strict=True):
            assert torch.equal(part, right)
    for policy in POLICIES:
        one, other = (stream.answer(QUESTION, answer_policy=policy, max_tokens=5, evidence=999)
                      for stream in (ours.stream, theirs.stream))
        assert one.token_ids == other.token_ids and one.frames_covered == other.frames_covered
        shares = [{each.first_stamp_ns: each.share for each in answer.evidence} for answer in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    for watched in (ours, theirs):      # both go on alike; only one of them is kept
        watched.stream.step(frames[1], stamp(count))
        watched.stream.step(frames[2], stamp(count + 1))
    for one, other in zip(ours.stream.carried.copy(), theirs.stream.carried.copy()):
        assert torch.equal(one, other)


def test_a_restart_after_any_step_holds_what_was_there(backbones, frames, store):  # noqa: F811
    """Steps may have been on their way: exact in memory, not yet in few bits on disk."""
    watched = Watched(backbones['internvl'], store, 'int4', device_cache_bytes=200_000)
    for index in range(60):
        watched.see(frames, index, index + 1)
        again = Watched(backbones['internvl'], store, 'int4', device_cache_bytes=200_000)
        assert list(again.stream.detailed.records()) == list(watched.stream.detailed.records())
        assert again.stream.forgotten_frames == 0
        if index % 7 == 6:
            watched = again
    assert len(watched.stream.detailed.far.steps) > 10


def test_old_steps_are_in_few_bits_on_disk_and_nothing_else_is_kept_of_them(backbones, frames, store):  # noqa: F811
    watched = Watched(backbones['internvl'], store, 'int4')
    watched.see(frames, 0, 80)
    raw = [step for step, header in store.steps('front') if step >= 0 and header.get('raw', True)]
    assert len(raw) <= 2 * CYCLE + EXACT_STEPS and raw[-1] == 79
    for step, record in store.records('front').items():
        if 0 <= step < raw[0]:
            assert set(record.parts) == set(PACKED_PARTS)
    assert store.check() == []


def test_records_of_old_steps_share_pages_of_their_tree(backbones, frames, store):  # noqa: F811
    watched = Watched(backbones['internvl'], store, 'int4')
    watched.see(frames, 0, 100)
    with store._environment.begin() as transaction:
        tree = transaction.stat(store._records)
    assert tree['leaf_pages'] <= tree['entries'] / 4


@pytest.mark.parametrize('form', FORMATS)
def test_a_step_takes_of_the_disk_what_is_planned(form, backbones, frames, store):  # noqa: F811
    backbone = backbones['internvl']
    watched = Watched(backbone, store, form)
    watched.see(frames, 0, 80)
    layout, tokens = backbone.layout, watched.stream.detailed.steps()[-1].record.tokens
    planned = disk_step(layout, find_format(form), backbone.position_axes, tokens, 20, PAGE, CYCLE)
    old, new = range(1, 80 - 2 * CYCLE - EXACT_STEPS), range(76, 80)
    # The median: after keys were re-indexed a step has the whole state with it.
    kept, newest = (median(store._retention._leaving['front', step].cost for step in steps) for steps in (old, new))
    assert planned.kept == pytest.approx(kept, rel=0.03)
    assert planned.new == pytest.approx(newest + (0 if form == 'bf16' else cost_of([packed_bytes(store)])), rel=0.03)


def packed_bytes(store: MemoryStore) -> int:
    return store.record('front', 0).parts['packed'].bytes


def test_what_the_quota_takes_is_forgotten_and_the_answer_says_so(backbones, frames, tmp_path):  # noqa: F811
    with MemoryStore.open(tmp_path / 'small', {'model': 'tiny'}, 1_500_000) as store:
        watched = Watched(backbones['internvl'], store, 'int4')
        watched.see(frames, 0, 300)
        stream = watched.stream
        assert stream.forgotten_frames > 0
        held = list(stream.detailed.records())
        on_disk = {step for step, _ in store.steps('front')}
        assert {record.step for record in held if record.step < held[-1].step - 60} <= on_disk
        answer = stream.answer(QUESTION, answer_policy='all', max_tokens=2)
        assert answer.first_stamp_ns == held[0].first_stamp_ns
        assert answer.frames_covered + stream.forgotten_frames == 300


def test_a_damaged_index_costs_its_step_alone(backbones, frames, store):  # noqa: F811
    watched = Watched(backbones['internvl'], store, 'int4')
    watched.see(frames, 0, 130)
    spoilt = watched.stream.detailed.far.steps[4].record.step
    index = store.load_part('front', spoilt, 'index')
    store.amend('front', spoilt, {}, {'index': index[..., :-1]})
    again = Watched(backbones['internvl'], store, 'int4').stream
    assert spoilt not in {record.step for record in again.detailed.records()}
    assert again.forgotten_frames == 1
    assert again.answer(QUESTION, answer_policy='sparse(45)', max_tokens=3).token_ids


def test_a_reset_forgets_every_tier(backbones, frames, store):  # noqa: F811
    watched = Watched(backbones['internvl'], store, 'int4', host_cache_bytes=80_000)
    watched.see(frames, 0, 130)
    assert watched.stream.detailed.far.host.bytes
    watched.stream.reset()
    watched.kept.clear()
    assert watched.stream.detailed.far.host.bytes == 0 and not watched.kept.tier.holds(0)
    watched.see(frames, 0, 130)
    assert watched.stream.answer(QUESTION, answer_policy='all', max_tokens=3).frames_covered == 130
