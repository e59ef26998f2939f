"""A detailed cache in few bits: every page is quantised once, and answers read what the format made of it, wherever it is."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import FrameError, Interrupted, ParameterError
from statekv_ros.evaluation.lockstep import Lockstep, answer_together, video_of
from statekv_ros.kernels.paged_attention import Noted, Read, span_and_pages, together
from statekv_ros.memory import VideoStream, parse_answer_policy
from statekv_ros.memory.answering.decoding import Answering
from statekv_ros.memory.detailed.cache import EXACT_STEPS
from statekv_ros.memory.detailed.formats import Stored, find_format
from statekv_ros.memory.graphs import StepGraphs
from test_graphs import Rerun

FAMILIES = ['qwen3_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5']
FORMATS = ['int8', 'int4']
QUESTION = 'where?'
MAX_POSITION = 220
PAGE = 7        # steps of the tiny models then have pages of two lengths


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    """A tiny checkpoint of each family, trained (so it says) for MAX_POSITION positions, with a key bias where it has one."""
    base, made = tmp_path_factory.mktemp('packed'), {}
    for family in FAMILIES:
        folder = write_tiny_checkpoint(base / family, family=family, max_position=MAX_POSITION)
        made[family] = load_backbone(str(folder), device='cpu', dtype='float32')
        for layer in made[family]._language.layers:
            if layer.self_attn.k_proj.bias is not None:
                layer.self_attn.k_proj.bias.normal_(std=10, generator=torch.Generator().manual_seed(0))
    return made


def stamp(index: int) -> int:
    return (index + 1) * SECOND // 2


def stream_of(backbone, frames, count: int, form: str = 'int4', begin: int = 0, **options) -> VideoStream:
    options = {'page_tokens': PAGE, **options}
    stream = VideoStream(backbone, 'statekv(20)', detailed_format=form, **options)
    for index in range(begin, count):
        stream.step(frames[index % 32], stamp(index))
    return stream


def held(stream: VideoStream) -> list:
    return stream.detailed.steps(lambda record: True)


def stored_pages(stream: VideoStream) -> dict[int, list[torch.Tensor]]:
    """Codes, scales and zeros of each page in few bits, by its number."""
    packed, pages = stream.detailed._packed, {}
    for step in packed.steps:
        for number, (start, length) in enumerate(zip(step.starts, step.lengths)):
            rows = slice(start, start + length)
            pages[step.page + number] = [packed.rows.key[:, :, rows].clone(), packed.rows.value[:, :, rows].clone(),
                                         *(scale[:, :, step.slot + number].clone() for scale in packed._scales.rows)]
    return pages


def decoded(stream: VideoStream, step, pages: dict[int, list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What answers should read of a step, by the format from stored pages: keys before rotation but with bias, and values."""
    form, key, value = stream.detailed._packed._form, [], []
    for number in range(len(step.lengths)):
        codes_k, codes_v, scale_k, zero_k, scale_v, zero_v = pages[step.page + number]
        key.append(form.decode(Stored(codes_k, scale_k, zero_k)))
        value.append(form.decode(Stored(codes_v, scale_v, zero_v)))
    bias = stream.backbone.key_bias
    return torch.cat(key, dim=2) + (0 if bias is None else bias[:, :, None]), torch.cat(value, dim=2)


class Dense:
    """Stands in for `Reading._read`: dense attention, head by head, over decoded pages that it knows by their numbers."""

    def __init__(self, stream: VideoStream):
        self._backbone, self._pages = stream.backbone, {}
        self.read = 0       # pages in few bits, over all heads
        stored = stored_pages(stream)
        for step in held(stream):
            rows = slice(step.row, step.row + step.record.tokens)
            if step.slot is None:
                key, value, visual = stream.detailed.rows()
                key, value, visual = key[:, :, rows], value[:, :, rows], visual[rows]
                positions = torch.zeros(1, step.record.tokens)
            else:
                packed = stream.detailed._packed.rows
                (key, value), visual, positions = decoded(stream, step, stored), packed.visual[rows], packed.positions[:, rows]
            assert visual.sum() == step.record.visual_tokens and visual[step.record.visual_start]
            parts = (part.split(step.lengths, dim=2) for part in (key, value))
            others = (part.split(step.lengths, dim=-1) for part in (visual, positions))
            for number, part in enumerate(zip(*parts, *others)):
                self._pages[step.page + number] = step.slot is not None, *part

    def __call__(self, layer, query, span, chosen, scale, noting):
        read = [span_and_pages(query, span, (), scale, noting)]
        for choice in chosen:
            output, lse, page_lse = self._of_pages(layer, query, choice, scale)
            read.append(Read(output, lse, [Noted(page_lse, [choice.pages.shape[1]])] if noting else []))
        return together(read), [choice.pages for choice in chosen]

    def _of_pages(self, layer, query, choice, scale):
        output, lse = torch.zeros_like(query), query.new_full(query.shape[:2], float('-inf'))
        page_lse = query.new_full((*query.shape[:2], choice.pages.shape[1]), float('-inf'))
        for head in range(len(query)):
            keys, values = [], []
            for entry, (page, length) in enumerate(zip(choice.pages[head].tolist(), choice.lengths[head].tolist())):
                if not length:
                    continue
                packed, key, value, visual, positions = self._pages[page]
                assert packed == (choice.slots is not None) and length == key.shape[2]
                self.read += packed
                key, move = key[layer, head], 0 if choice.moves is None else int(choice.moves[head, entry])
                if packed:      # rotated once, to where it is read
                    positions = positions.clone()
                    positions[:len(self._backbone.stream_axes)] += move
                    key = self._backbone.unrotated(key, -positions)
                else:
                    key = self._backbone.rotate(key, move)
                keys.append(key)
                values.append(value[layer, head])
                page_lse[head, :, entry] = (query[head] * scale @ key[visual].T).logsumexp(-1)
            if keys:
                scores = query[head] * scale @ torch.cat(keys).T
                output[head], lse[head] = scores.softmax(-1) @ torch.cat(values), scores.logsumexp(-1)
        return output, lse, page_lse


def logits_of(answering: Answering, monkeypatch) -> torch.Tensor:
    logits = []
    backbone = answering._backbone
    with monkeypatch.context() as patch:
        project = backbone.logits
        patch.setattr(backbone, 'logits', lambda hidden: logits.append(project(hidden)) or logits[-1])
        while not answering.advance(64):
            pass
    return torch.stack(logits)


# --- what is stored ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('form', FORMATS)
def test_a_page_is_what_the_format_makes_of_the_exact_keys_and_values_once_and_for_all(form, family, backbones, frames):
    """Past the limit on positions, too, and however often the pool grows."""
    backbone, form = backbones[family], find_format(form)
    stream = VideoStream(backbone, 'statekv(20)', detailed_format=form.name, page_tokens=PAGE)
    exact, first, seen = {}, {}, set()
    for index in range(90):
        stream.step(frames[index % 32], stamp(index))
        for step in stream.detailed._exact.steps:
            rows = slice(step.row, step.row + step.record.tokens)
            key, value, _ = stream.detailed.rows()
            if step.record.step not in exact:
                exact[step.record.step] = key[:, :, rows].clone(), value[:, :, rows].clone(), step.positions.clone()
        if index % 6 == 5:      # to look at all of them takes longer than the step
            for number, parts in stored_pages(stream).items():
                first.setdefault(number, parts)
                assert all(torch.equal(a, b) for a, b in zip(parts, first[number]))
        seen.add(stream.detailed._packed._codes.capacity)
    assert len(seen) > 3, 'the pool should have grown'
    assert stream.next_position > MAX_POSITION or family == 'qwen2_5_vl'
    steps = held(stream)
    assert [step.slot is None for step in steps] == [False] * (len(steps) - EXACT_STEPS) + [True] * EXACT_STEPS
    bias = 0 if backbone.key_bias is None else backbone.key_bias[:, :, None]
    assert (backbone.key_bias is None) == (family == 'qwen3_vl')
    for step in steps[:-EXACT_STEPS]:
        key, value, positions = exact[step.record.step]
        key, begin = backbone.unrotated(key, positions) - bias, 0
        for number, length in enumerate(step.lengths):
            parts = first[step.page + number]
            for codes, scale, zero, whole in ((parts[0], *parts[2:4], key), (parts[1], *parts[4:], value)):
                right = form.encode(whole[:, :, begin:begin + length], whole[:, :, begin:begin + length])[0]
                assert torch.equal(right.codes, codes) and torch.equal(right.scale, scale) and torch.equal(right.zero, zero)
            begin += length


@pytest.mark.parametrize('family', ['qwen3_vl', 'internvl'])
@pytest.mark.parametrize('form', FORMATS)
def test_mean_keys_are_those_of_the_decoded_pages(form, family, backbones, frames):
    stream = stream_of(backbones[family], frames, 20, form)
    pages = stored_pages(stream)
    for step in held(stream)[:-EXACT_STEPS]:
        assert torch.allclose(stream.detailed.mean_key(step), decoded(stream, step, pages)[0].mean(dim=2), atol=1e-5)


def test_keys_without_bias_and_rotation_lose_less(backbones, frames):
    """Else taking them off would prove nothing."""
    backbone = backbones['internvl']
    stream, exact = stream_of(backbone, frames, 20), stream_of(backbone, frames, 20, 'bf16')
    pages, ours, theirs = stored_pages(stream), [], []
    for step, right in zip(held(stream)[:-EXACT_STEPS], held(exact)):
        rows = slice(right.row, right.row + right.record.tokens)
        rotated = exact.detailed.rows().key[:, :, rows]
        keys = backbone.unrotated(rotated, right.positions)
        ours.append((decoded(stream, step, pages)[0] - keys).norm())
        form = find_format('int4')
        theirs.append((form.decode(form.encode(rotated, rotated)[0]) - rotated).norm())
    assert sum(ours) < 0.5 * sum(theirs)


# --- what is read -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('positions, form, family', [
    *(('lazy_shift', form, family) for form in FORMATS for family in FAMILIES), ('native', 'int4', 'qwen3_vl'),
    ('native', 'int4', 'internvl'), ('contiguous', 'int4', 'qwen2_5_vl'), ('contiguous', 'int4', 'eagle2_5')])
def test_every_policy_reads_the_decoded_pages_as_a_dense_reference_does(positions, form, family, backbones, frames,
                                                                        monkeypatch):
    """Past the limit on positions, too; tokens, logits and evidence."""
    stream = stream_of(backbones[family], frames, 60, form, positions=positions)
    assert (stream.shift > 0) == (positions != 'native') or family == 'qwen2_5_vl'
    for policy in ('all', 'sparse(45)', 'sparse(10)', 'last(12)', 'retrieve(3)'):
        ours, right = (stream.begin_answer(QUESTION, policy, max_tokens=4, evidence=99) for _ in range(2))
        right._reading._read = dense = Dense(stream)
        difference = (logits_of(ours, monkeypatch) - logits_of(right, monkeypatch)).abs().max()
        assert difference < 1e-4, (policy, difference)
        assert dense.read > 0, policy
        assert ours.token_ids == right.token_ids
        shares = [{e.first_stamp_ns: e.share for e in answering.result().evidence} for answering in (ours, right)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4) and sum(shares[0].values()) == pytest.approx(1)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('positions', ['native', 'lazy_shift'])
def test_eight_bits_answer_as_the_exact_cache_does(positions, family, backbones, frames, monkeypatch):
    """Wherever pages stand: what is far is read from where `bf16` reads it."""
    logits = {}
    for form in ('bf16', 'int8'):
        stream = stream_of(backbones[family], frames, 60, form, positions=positions)
        for policy in ('all', 'last(20)', 'retrieve(99)'):
            logits[form, policy] = logits_of(stream.begin_answer(QUESTION, policy, max_tokens=1), monkeypatch)
    for policy in ('all', 'last(20)', 'retrieve(99)'):
        right = logits['bf16', policy]
        assert (logits['int8', policy] - right).norm() < 0.05 * right.norm(), policy
        assert not torch.equal(logits['int8', policy], right)


def test_a_time_span_cuts_pages(backbones, frames):
    stream = stream_of(backbones['qwen3_vl'], frames, 40)
    for policy in ('all', 'sparse(20)', 'retrieve(2)'):
        answer = stream.answer(QUESTION, answer_policy=policy, span=(stamp(4), stamp(9)), max_tokens=3, evidence=99)
        assert (answer.frames_covered, answer.first_stamp_ns, answer.last_stamp_ns) == (6, stamp(4), stamp(9))
        assert sum(e.share for e in answer.evidence) == pytest.approx(1)


def test_sparse_with_room_for_all_is_all(backbones, frames, monkeypatch):
    stream = stream_of(backbones['internvl'], frames, 30)
    logits = [logits_of(stream.begin_answer(QUESTION, policy, max_tokens=2), monkeypatch)
              for policy in ('all', 'sparse(99999)')]
    assert torch.equal(*logits)


@pytest.mark.parametrize('policy', ['all', 'last(9)', 'retrieve(2)'])
def test_pages_that_are_packed_while_an_answer_is_decoded_are_read_where_they_are(policy, backbones, frames):
    """Eight bits: what was exact when the question was asked is nearly so afterwards, and keeps its evidence."""
    def stream():
        return stream_of(backbones['qwen3_vl'], frames, 41, 'int8')

    at_once = stream().answer(QUESTION, answer_policy=policy, max_tokens=6, evidence=99)
    busy, index = stream(), 41
    answering = busy.begin_answer(QUESTION, policy, max_tokens=6, evidence=99)
    while not answering.advance(1):
        for _ in range(6):
            busy.step(frames[index % 32], stamp(index))
            index += 1
    result = answering.result()
    assert result.token_ids == at_once.token_ids
    assert {e.first_stamp_ns: e.share for e in result.evidence} == \
        pytest.approx({e.first_stamp_ns: e.share for e in at_once.evidence}, abs=0.02)


# --- videos side by side, recorded steps, interruptions --------------------------------------------------------------

@pytest.mark.parametrize('family', ['qwen3_vl', 'internvl'])
def test_lockstep_is_each_video_alone(family, backbones, frames):
    backbone, videos = backbones[family], 3
    rows = [frames[3 * row:] + frames[:3 * row] for row in range(videos)]
    together = stream_of(Lockstep(backbone, videos), [np.concatenate(parts) for parts in zip(*rows)], 20)
    alone = [stream_of(backbone, row, 20) for row in rows]
    for policy in ('all', 'sparse(30)', 'last(14)', 'retrieve(2)'):
        answers = [stream.answer(QUESTION, answer_policy=policy, max_tokens=4, evidence=99) for stream in alone]
        for row, answer in enumerate(answers):
            part = video_of(together, row).answer(QUESTION, answer_policy=policy, max_tokens=4, evidence=99)
            assert part.token_ids == answer.token_ids
            assert {e.first_stamp_ns: e.share for e in part.evidence} == \
                pytest.approx({e.first_stamp_ns: e.share for e in answer.evidence}, abs=1e-4)
        if policy in ('all', 'last(14)'):   # asked together, a question is one pass, for which `sparse` chooses by all of it
            told = answer_together(together, [QUESTION] * videos, parse_answer_policy(policy), max_tokens=4)
            assert told == ([answer.text for answer in answers], answers[0].context_tokens)


@pytest.mark.parametrize('family', FAMILIES)
def test_replayed_steps_are_packed_as_eager_ones(family, backbones, frames):
    """A recorded graph has each step's positions in the same place."""
    ours, right = (VideoStream(backbones[family], 'statekv(20)', detailed_format='int4', page_tokens=PAGE) for _ in range(2))
    ours.graphs = StepGraphs(backbones[family], Rerun)
    for stream in (ours, right):
        for index in range(60):
            stream.step(frames[index % 32], stamp(index))
    assert ours.graphs.replays > 5 and ours.graphs.off == ''
    theirs = stored_pages(right)
    assert all(torch.equal(a, b) for page, parts in stored_pages(ours).items() for a, b in zip(parts, theirs[page]))
    assert torch.equal(ours.detailed._packed.rows.positions, right.detailed._packed.rows.positions)


def test_an_interrupted_step_leaves_no_trace(backbones, frames):
    calls, stop_at = iter(range(10**6)), [10**9]
    stream = stream_of(backbones['internvl'], frames, 12, cancelled=lambda: next(calls) >= stop_at[0])
    before, steps, size = stored_pages(stream), [replace(step) for step in held(stream)], stream.detailed.bytes
    stop_at[0] = next(calls) + 2    # in the second layer of the next step
    with pytest.raises(Interrupted):
        stream.step(frames[12], stamp(12))
    stop_at[0] = 10**9
    after = stored_pages(stream)
    assert before.keys() == after.keys()
    assert all(torch.equal(a, b) for page in before for a, b in zip(before[page], after[page]))
    assert [(step.row, step.slot, step.page) for step in held(stream)] == [(step.row, step.slot, step.page) for step in steps]
    assert stream.detailed.bytes == size
    stream.step(frames[13], stamp(13))
    assert len(stored_pages(stream)) > len(before)


def test_memory_that_is_full_while_a_step_is_packed_costs_that_frame_alone(backbones, frames, monkeypatch):
    stream = stream_of(backbones['internvl'], frames, 12)
    before, tokens = stored_pages(stream), stream.detailed_tokens
    with monkeypatch.context() as patch:
        def full(*_):
            raise torch.OutOfMemoryError('full')
        patch.setattr(type(stream.detailed._packed._form), 'encode', full)
        with pytest.raises(torch.OutOfMemoryError):
            stream.step(frames[12], stamp(12))
    assert stored_pages(stream).keys() == before.keys() and stream.detailed_tokens == tokens
    stream.step(frames[13], stamp(13))
    assert stream.answer(QUESTION, max_tokens=2).frames_covered == 13


# --- bounds -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('form', FORMATS)
def test_a_bound_covers_exact_and_packed_steps_and_holds_more_of_them(form, backbones, frames):
    backbone = backbones['internvl']
    bound = 20 * backbone.step_tokens(64, 64) * backbone.kv_bytes_per_token
    stream, exact = (VideoStream(backbone, 'statekv(20)', device_cache_bytes=bound, detailed_format=each)
                     for each in (form, 'bf16'))
    for index in range(150):
        for each in (stream, exact):
            each.step(frames[index % 32], stamp(index))
        assert stream.detailed._exact.bytes + stream.detailed._packed.bytes <= bound
    assert stream.forgotten_frames > 0 and stream.frames == 150 - stream.forgotten_frames
    assert stream.frames > (1.8 if form == 'int8' else 2.5) * exact.frames
    for policy in ('all', 'sparse(60)', 'retrieve(3)', 'last(9)'):
        answer = stream.answer(QUESTION, answer_policy=policy, max_tokens=3, evidence=99)
        assert sum(e.share for e in answer.evidence) == pytest.approx(1)
    assert stream.answer(QUESTION, max_tokens=1).first_stamp_ns == stream.first_stamp_ns > stamp(0)


def test_frames_of_any_size_stay_within_the_bound(backbones):
    random, backbone = np.random.default_rng(0), backbones['qwen3_vl']
    bound = 700 * backbone.kv_bytes_per_token
    stream = VideoStream(backbone, 'statekv(30)', device_cache_bytes=bound, detailed_format='int4', page_tokens=16)
    sizes = [(64, 64), (480, 640), (96, 128), (32, 200), (256, 256)]
    for index in range(120):
        frame = random.integers(0, 256, (*sizes[index // 8 % len(sizes)], 3), dtype=np.uint8)
        try:
            stream.step(frame, stamp(index))
        except FrameError as error:
            assert 'max_frame_pixels' in str(error)
        assert stream.detailed._exact.bytes + stream.detailed._packed.bytes <= bound
    assert stream.forgotten_frames > 0 and len(held(stream)) > 8
    assert stream.answer(QUESTION, max_tokens=3).frames_covered == stream.frames


@pytest.mark.parametrize('policy', ['all', 'sparse(30)', 'last(30)', 'retrieve(2)'])
def test_what_is_forgotten_meanwhile_is_not_read_any_more(policy, backbones, frames):
    backbone = backbones['internvl']
    bound = 20 * backbone.step_tokens(64, 64) * backbone.kv_bytes_per_token
    stream = stream_of(backbone, frames, 40, device_cache_bytes=bound)
    answering = stream.begin_answer(QUESTION, policy, max_tokens=6, evidence=99)
    for index in range(40, 200):
        stream.step(frames[index % 32], stamp(index))
        if index % 12 == 0:
            answering.advance(2)
    assert stream.detailed.overwritten > answering._seen.ordinal
    with torch.inference_mode():
        for rows in (*stream.detailed.rows()[:2], *stream.detailed._packed._scales.rows):
            rows.fill_(float('nan'))
    while not answering.advance(2):
        pass
    assert torch.isfinite(torch.tensor([evidence.share for evidence in answering.result().evidence])).all()


def test_memory_that_is_full_counts_as_a_bound(backbones, frames, monkeypatch):
    stream = stream_of(backbones['internvl'], frames, 30)

    def full(*_):
        raise torch.OutOfMemoryError('full')

    monkeypatch.setattr(stream.detailed._packed._codes, 'resize', full)
    size = stream.detailed._packed.bytes
    for index in range(30, 150):
        stream.step(frames[index % 32], stamp(index))
    assert stream.forgotten_frames > 0 and stream.detailed._packed.bytes == size
    assert stream.answer(QUESTION, max_tokens=2).frames_covered == stream.frames


def test_reset_forgets_what_was_packed(backbones, frames):
    stream = stream_of(backbones['internvl'], frames, 20)
    stream.reset()
    assert (stream.detailed_tokens, stream.frames, stream.detailed._packed.bytes) == (0, 0, 0)
    for index in range(20):
        stream.step(frames[index], stamp(index))
    fresh = stored_pages(stream_of(backbones['internvl'], frames, 20))
    assert all(torch.equal(a, b) for page, parts in stored_pages(stream).items() for a, b in zip(parts, fresh[page]))


def test_bad_formats_are_named(backbones):
    with pytest.raises(ParameterError, match="detailed_format.*'int3'"):
        VideoStream(backbones['internvl'], detailed_format='int3')
    with pytest.raises(ParameterError, match='device_cache_mb'):
        bound = 100 * backbones['internvl'].kv_bytes_per_token
        VideoStream(backbones['internvl'], detailed_format='int4', device_cache_bytes=bound)
