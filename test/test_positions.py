"""Endless streams: every position that the model is given stays in its trained context, and nothing else changes."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import FrameError, Interrupted, PolicyError, QuestionError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering.decoding import Answering
from statekv_ros.memory.answering.snapshot import take_snapshot
from statekv_ros.memory.carried.positions import POSITIONS, dense
from statekv_ros.memory.policies import parse_answer_policy

FAMILIES = ['qwen3_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5']
BOUNDED = ['contiguous', 'lazy_shift']
QUESTION = 'where?'
MAX_POSITION = 220


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    """A tiny checkpoint of each family, trained (so it says) for MAX_POSITION positions."""
    base = tmp_path_factory.mktemp('short')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family, max_position=MAX_POSITION)),
                                  device='cpu', dtype='float32') for family in FAMILIES}


@pytest.fixture
def given_positions(monkeypatch):
    """Makes a backbone write down the positions that its language model is given: [(lowest, highest)] of each call."""
    def watch(backbone) -> list[tuple[int, int]]:
        seen = []
        forward = backbone._language.forward

        def watched(*args, position_ids, **kwargs):
            seen.append((int(position_ids.min()), int(position_ids.max())))
            return forward(*args, position_ids=position_ids, **kwargs)

        monkeypatch.setattr(backbone._language, 'forward', watched)
        return seen
    return watch


def run(stream: VideoStream, frames, until: int, begin: int = 0, seconds: float = 0.5) -> int:
    """Frames until the stream's true positions pass `until`; the number of frames then."""
    index = begin
    while stream.next_position < until:
        stream.step(frames[index % len(frames)], int((index + 1) * seconds * SECOND))
        index += 1
    return index


def logits_of(stream: VideoStream, monkeypatch, answering: Answering | None = None) -> torch.Tensor:
    """Logits behind the question."""
    logits = []
    with monkeypatch.context() as patch:
        project = stream.backbone.logits
        patch.setattr(stream.backbone, 'logits', lambda hidden: logits.append(project(hidden)) or logits[-1])
        answering = answering or stream.begin_answer(QUESTION, max_tokens=1)
        while not answering.advance(64):
            pass
    return logits[0]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


class Keys:
    """An attention memory that only writes down the first layer's keys."""

    def attend(self, layer, query, key, value, scale):
        self.key = key if layer == 0 else self.key
        return query


# --- moving keys ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('shift', [1, 7, 150])
def test_a_turned_key_is_the_one_that_the_model_computes_at_the_other_place(family, shift, backbones, frames):
    backbone, here, there = backbones[family], Keys(), Keys()
    inputs = backbone.encode([backbone.prepare(frame) for frame in frames[:backbone.frames_per_step]], [90.0, 90.5], 180)
    moved = backbone.shifted(inputs, shift)
    backbone.forward(inputs, here)
    backbone.forward(moved, there)
    assert worst(here.key, there.key) > 1e-2
    assert worst(backbone.rotate(here.key, -shift), there.key) < 1e-4
    per_token = torch.full((inputs.tokens,), -shift)
    assert torch.equal(backbone.rotate(here.key, per_token), backbone.rotate(here.key, -shift))
    assert torch.equal(backbone.rotate(here.key, 0), here.key)
    assert (inputs.next_position - moved.next_position, inputs.start - moved.start) == (shift, shift)
    assert inputs.start == backbone.starts(inputs)[0] and backbone.starts(inputs).diff().ge(0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), min_size=1, max_size=12), st.randoms())
def test_closing_gaps_equals_its_definition(places, random):
    """places: (length of the stretch, tokens in it, is it kept); stretches stand one behind the other."""
    tokens, expected, begin, covered = [], {}, 0, 0
    for length, count, kept in places:
        if kept:
            tokens += [(begin, begin + length)] * count
            expected[begin, begin + length] = covered
            covered += length
        begin += length
    random.shuffle(tokens)
    stretches = torch.tensor(tokens, dtype=torch.int64).reshape(-1, 2)
    left, total = dense(stretches[:, 0], stretches[:, 1])
    assert total == covered
    for token, position in zip(tokens, left.tolist()):
        if token[1] > token[0]:
            assert position == expected[token]


# --- below the limit --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('policy', ['statekv(unlimited)', 'window(4)', 'none'])
def test_below_the_limit_all_position_policies_answer_alike(family, policy, backbones, frames, monkeypatch):
    logits = {}
    for positions in POSITIONS:
        stream = VideoStream(backbones[family], policy, positions=positions)
        run(stream, frames, until=100)
        assert stream.next_position <= stream.positions.limit and stream.shift == 0
        logits[positions] = logits_of(stream, monkeypatch)
    assert torch.equal(logits['native'], logits['lazy_shift'])
    assert worst(logits['native'], logits['contiguous']) < 1e-3


@pytest.mark.parametrize('family', FAMILIES)
def test_where_tokens_are_evicted_lazy_is_native_to_the_bit_and_contiguous_is_not(family, backbones, frames, monkeypatch):
    """`contiguous` closes the gaps that evicted tokens left, so by its nature frames see the past at other distances."""
    logits = {}
    for positions in POSITIONS:
        stream = VideoStream(backbones[family], 'statekv(16)', positions=positions)
        run(stream, frames, until=120)
        logits[positions] = logits_of(stream, monkeypatch)
    assert torch.equal(logits['native'], logits['lazy_shift'])
    difference = worst(logits['native'], logits['contiguous'])
    print(f'{family}: logits of up to {logits["native"].abs().max():.2f} differ by up to {difference:.1e}')
    assert 1e-4 < difference


# --- past the limit ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('positions', BOUNDED)
@pytest.mark.parametrize('family,policy', [
    *((family, policy) for family in FAMILIES for policy in ('statekv(16)', 'window(4)')), ('qwen3_vl', 'statekv(100)'),
    ('internvl', 'statekv(100)'), ('qwen2_5_vl', 'none'), ('eagle2_5', 'none')])
def test_a_stream_of_four_times_the_trained_context_stays_finite_bounded_and_within_it(
        family, positions, policy, backbones, frames, given_positions, monkeypatch):
    backbone = backbones[family]
    seen = given_positions(backbone)
    bound = 8 * 40 * backbone.kv_bytes_per_token
    stream = VideoStream(backbone, policy, device_cache_bytes=bound, positions=positions)
    run(stream, frames, until=4 * MAX_POSITION, seconds=1.5)
    assert min(low for low, _ in seen) >= 0 and max(high for _, high in seen) < stream.positions.limit < MAX_POSITION
    assert max(high for _, high in seen) > 30, 'else nothing would be shown'
    assert not stream.beyond_trained_context and stream.next_position >= 4 * MAX_POSITION
    assert stream.state_tokens <= max(100, 5 * backbone.step_tokens(64, 64))
    assert stream.detailed.rows()[0].nbytes * 2 <= bound
    for view in stream.detailed.views():
        assert view.key.isfinite().all() and view.value.isfinite().all()
    for answer_policy in ('all', 'state', 'last(3)'):
        del seen[:]
        answering = stream.begin_answer(QUESTION, answer_policy, max_tokens=4)
        assert logits_of(stream, monkeypatch, answering).isfinite().all()
        assert all(0 <= low and high < MAX_POSITION for low, high in seen)


def test_native_positions_do_pass_the_trained_context(backbones, frames, given_positions):
    """Else the test above would prove nothing."""
    seen = given_positions(backbones['internvl'])
    stream = VideoStream(backbones['internvl'], 'statekv(16)', positions='native')
    run(stream, frames, until=2 * MAX_POSITION)
    assert max(high for _, high in seen) > MAX_POSITION and stream.beyond_trained_context


@pytest.mark.parametrize('positions', BOUNDED)
@pytest.mark.parametrize('policy', ['statekv(20)', 'statekv(64)'])
def test_carried_keys_stand_dense_and_right_before_the_step(positions, policy, backbones, frames):
    """Against the definition: rank among what the head kept; a key of the detailed cache turned to that place."""
    backbone = backbones['eagle2_5']        # one position per token, so the ordinal is the true position
    stream = VideoStream(backbone, policy, positions=positions)
    index, shift, compared = 0, 0, 0
    while stream.next_position < 3 * MAX_POSITION:
        kept = stream.carried.kept().clone()
        index = run(stream, frames, until=stream.next_position + 1, begin=index)
        if positions == 'lazy_shift' and stream.shift == shift or kept.shape[-1] < stream.state_tokens:
            continue
        shift, last = stream.shift, [*stream.detailed.records()][-1]
        views = stream.detailed.views(stream.detailed.steps(lambda record: record.first_ordinal < last.first_ordinal))
        true_keys = torch.cat([backbone.rotate(view.key, view.shift) for view in views], dim=2)
        now = stream.carried.kept()
        for layer in range(backbone.layout.layers):
            placed = stream.carried._placed(layer)
            for head in range(backbone.layout.kv_heads):
                ranks = {ordinal: rank for rank, ordinal in enumerate(sorted(kept[layer, head].tolist()))}
                for slot, ordinal in enumerate(now[layer, head].tolist()):
                    if ordinal >= last.first_ordinal:
                        continue
                    place = last.position - shift - len(ranks) + ranks[ordinal]
                    expected = backbone.rotate(true_keys[layer, head, ordinal], place - ordinal)
                    assert worst(placed[head, slot], expected) < 2e-3, (layer, head, ordinal)
                    compared += 1
    assert compared > 100


@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'qwen2_5_vl'])
@pytest.mark.parametrize('policy', ['none', 'window(2)'])
def test_where_nothing_far_is_read_shifted_streams_answer_like_native_ones(family, policy, backbones, frames, monkeypatch):
    """Frames that see only near ones do not depend on where they stand, so neither may an answer that reads near ones.

    Qwen2.5-VL is another function by design: its grids keep their heights and widths, from which native text drifts away.
    """
    logits = {}
    for positions in POSITIONS:
        stream = VideoStream(backbones[family], policy, positions=positions)
        run(stream, frames, until=5 * MAX_POSITION // 2)
        snapshot = take_snapshot(stream.seen(), parse_answer_policy('last(4)'), (None, None))
        near = replace(snapshot, views=snapshot.views[1:])     # the prefix is far
        logits[positions] = logits_of(stream, monkeypatch, Answering(near, QUESTION, 1, 0.0, 0, 0))
    for positions in BOUNDED:
        assert worst(logits[positions], logits['native']) < 1e-3


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('positions', BOUNDED)
def test_an_answer_sees_every_part_at_its_true_distance_up_to_the_limit(family, positions, backbones, frames):
    stream = VideoStream(backbones[family], 'statekv(16)', positions=positions)
    run(stream, frames, until=3 * MAX_POSITION, seconds=1.5)
    snapshot, limit = take_snapshot(stream.seen(), parse_answer_policy('all'), (None, None)), stream.positions.limit
    true = [snapshot.seen.position - view.position for view in snapshot.views]
    seen = [snapshot.position + snapshot.turn(view.position, view.shift) - (view.position - view.shift)
            for view in snapshot.views]
    assert seen == [min(distance, limit) for distance in true] and min(true) < limit < max(true)


@pytest.mark.parametrize('positions', BOUNDED)
@pytest.mark.parametrize('answer_policy', ['all', 'state', 'last(3)'])
def test_an_answer_reads_the_moment_of_asking_through_later_shifts(positions, answer_policy, backbones, frames):
    def stream():
        stream = VideoStream(backbones['qwen3_vl'], 'statekv(20)', positions=positions)
        return stream, run(stream, frames, until=MAX_POSITION + 40)

    quiet, _ = stream()
    at_once = quiet.answer(QUESTION, answer_policy=answer_policy, max_tokens=6)
    busy, index = stream()
    answering = busy.begin_answer(QUESTION, answer_policy, max_tokens=6)
    shift = busy.shift
    while not answering.advance(1):
        index = run(busy, frames, until=busy.next_position + 40, begin=index)
    assert busy.shift > shift
    result = answering.result()
    assert result.token_ids == at_once.token_ids
    assert [e.first_stamp_ns for e in result.evidence] == [e.first_stamp_ns for e in at_once.evidence]
    assert [e.share for e in result.evidence] == pytest.approx([e.share for e in at_once.evidence], abs=1e-5)


@pytest.mark.parametrize('positions', BOUNDED)
def test_streams_that_interleave_equal_streams_alone_bit_for_bit(positions, backbones, frames):
    def streams():
        return [VideoStream(backbones['internvl'], f'statekv({budget})', positions=positions)
                for budget in (20, 30)]

    together, alone = streams(), streams()
    for index in range(24):
        for start, stream in enumerate(together):
            stream.step(frames[start + index % 24], (index + 1) * SECOND)
    for start, stream in enumerate(alone):
        for index in range(24):
            stream.step(frames[start + index % 24], (index + 1) * SECOND)
    for one, other in zip(together, alone):
        assert one.shift == other.shift > 0
        for a, b in zip(one.detailed.views(), other.detailed.views()):
            assert torch.equal(a.key, b.key) and torch.equal(a.value, b.value)
        assert one.answer(QUESTION, max_tokens=4).token_ids == other.answer(QUESTION, max_tokens=4).token_ids


@pytest.mark.parametrize('positions', BOUNDED)
def test_a_step_interrupted_after_keys_were_moved_leaves_a_sound_memory(positions, backbones, frames):
    """As if its frame had never come, although what is carried has made room for it already."""
    def stream(missing: set[int]):
        calls, stop_in = 0, 10**9

        def cancelled() -> bool:
            nonlocal calls
            calls += 1
            return calls > stop_in

        stream, dropped = VideoStream(backbones['llava_onevision'], 'statekv(20)', cancelled=cancelled,
                                      positions=positions), set()
        for index in range(40):
            if index in missing:
                continue
            before = stream.shift
            stop_in = calls + 1 if not missing and 10 <= index < 20 else 10**9  # in the second layer
            try:
                stream.step(frames[index % 32], (index + 1) * SECOND)
            except Interrupted:
                dropped.add(index)
                moved.append(stream.shift - before)
        return stream, dropped

    moved: list[int] = []
    interrupted, dropped = stream(set())
    spared, _ = stream(dropped)
    assert len(dropped) == 10 and any(moved) and interrupted.shift == spared.shift > 0
    assert torch.equal(interrupted.carried.kept(), spared.carried.kept())
    keys = [stream.carried.copy()[0] for stream in (interrupted, spared)]
    assert worst(*keys) < 1e-4


@pytest.mark.parametrize('positions', BOUNDED)
@pytest.mark.parametrize('pause_s', [5.0, 60.0, 5000.0])
def test_a_pause_longer_than_the_context_is_survived(positions, pause_s, backbones, frames, given_positions, monkeypatch):
    """Qwen2.5-VL counts seconds, so a camera that was away comes back at a far position."""
    backbone = backbones['qwen2_5_vl']
    seen = given_positions(backbone)
    stream = VideoStream(backbone, 'statekv(16)', positions=positions)
    for index in range(40):
        stream.step(frames[index % 32], int(((index + 1) * 0.5 + (index // 20) * pause_s) * SECOND))
    assert all(0 <= low and high < stream.positions.limit for low, high in seen)
    assert logits_of(stream, monkeypatch).isfinite().all()


# --- bf16 and bad values ----------------------------------------------------------------------------------------------

def test_keys_in_bf16_are_rounded_no_further_however_long_they_are_carried(tmp_path, frames):
    """A key that is turned anew with every step must not wear off."""
    folder = write_tiny_checkpoint(tmp_path / 'tiny', family='eagle2_5', max_position=MAX_POSITION)
    backbone = load_backbone(str(folder), device='cpu', dtype='bfloat16')
    stream, index, written = VideoStream(backbone, 'statekv(20)', positions='contiguous'), 0, {}
    while stream.next_position < 4 * MAX_POSITION:
        index = run(stream, frames, until=stream.next_position + 1, begin=index)
        key, kept = stream.carried._key, stream.carried.kept()
        now = {(layer, head, ordinal): key[layer, head, slot].clone() for layer, heads in enumerate(kept.tolist())
               for head, ordinals in enumerate(heads) for slot, ordinal in enumerate(ordinals)}
        assert all(torch.equal(now[token], written[token]) for token in now.keys() & written.keys())
        written = {token: written.get(token, key) for token, key in now.items()}
    oldest = min(ordinal for _, _, ordinal in written)
    assert oldest < stream.seen().ordinal - 200, 'some token should have been turned many times'


def test_bad_position_policies_are_named(backbones, frames):
    backbone = backbones['qwen3_vl']
    for policy, positions, word in (('statekv(16)', 'magic', 'magic'), ('full', 'lazy_shift', 'full'),
                                    ('full', 'contiguous', 'full')):
        with pytest.raises(PolicyError, match=word):
            VideoStream(backbone, policy, positions=positions)
    assert VideoStream(backbone, 'full').positions.kind == 'native'
    assert VideoStream(backbone, 'statekv(16)').positions.kind == 'lazy_shift'


def test_what_does_not_fit_is_named(backbones, frames):
    stream = VideoStream(backbones['qwen3_vl'], 'statekv(16)')
    index = run(stream, frames, until=2 * MAX_POSITION)
    with pytest.raises(QuestionError, match='positions are left'):
        stream.answer('word ' * MAX_POSITION)
    answer = stream.answer(QUESTION, max_tokens=10 * MAX_POSITION)
    assert answer.finish_reason in ('stop', 'length') and answer.answer_tokens < MAX_POSITION
    before = stream.detailed_tokens
    wide = np.zeros((40, 7000, 3), np.uint8)
    stream.flush()
    with pytest.raises(FrameError, match='max_frame_pixels'):
        for later in (1, 2):
            stream.step(wide, (index + later) * SECOND)
    assert stream.detailed_tokens == before
