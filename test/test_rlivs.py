"""rLiVS: captions, selection and the tokens kept, against plain definitions; bounded, private, the same every time."""
import math

import numpy as np
import pytest
import torch

from conftest import SECOND
from rlivs_definition import (PROMPT, QUESTION, SMALL, TEXTS, backbone, contents, definitions, frames,  # noqa: F401
                              memory_of, stamp, written)
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import FrameError, Interrupted, PolicyError, QuestionError
from statekv_ros.evaluation.rlivs import CaptionMemory, parse_rlivs
from statekv_ros.evaluation.rlivs.options import pick_layers


@pytest.mark.parametrize('model, score_layers, layers', [
    ('tiny', 4, (0, 1, 2)), ('tiny', 2, (0, 2)), ('patrol', 4, (0, 1, 3, 4)), ('patrol', (1,), (1,))])
@pytest.mark.parametrize('positions', ['native', 'contiguous'])
@torch.inference_mode()
def test_captions_and_selection_equal_the_definition_clip_after_clip(positions, model, score_layers, layers, definitions,
                                                                      frames):
    definition = definitions[model]
    backbone = definition.backbone
    memory = CaptionMemory(backbone, 6, .25, 2, max_caption_tokens=8, score_layers=score_layers, positions=positions)
    past: list[dict] = []
    for clip in range(4):
        for index in range(6 * clip, 6 * clip + 6):
            memory.step(frames[index], stamp(index))
        told, kept = definition.clip(frames[6 * clip:6 * clip + 6], [i / 2 for i in range(6 * clip, 6 * clip + 6)],
                                     past[-2:], positions, .25, layers, 8)
        past.append(kept)
        assert memory.captions[-1].text == backbone.decode(told).strip(), f'caption of clip {clip}'
        selected = memory.selected[-1].inputs
        assert selected.tokens == len(kept['rows']) == 3
        for got, expected in ((selected.embeds[0], [row for row, _, _ in kept['rows']]),
                              *zip((level[0] for level in selected.extra['deepstack']),
                                   zip(*(deep for _, _, deep in kept['rows'])))):
            assert (got - torch.stack([*expected])).abs().max() < 1e-4, f'tokens kept of clip {clip}'


def test_a_caption_without_a_word_selects_by_the_request_and_is_kept(backbone, frames, monkeypatch):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset(range(10**5)))
    memory = memory_of(backbone, frames, 8)
    assert [(c.text, len(c.token_ids)) for c in memory.captions] == [('', 0)] * 2
    assert [kept.tokens for kept in memory.selected] == [2, 2]
    assert memory.answer(QUESTION).frames_covered == 8


@pytest.mark.parametrize('wanted, layers, expected', [
    (4, 28, {3, 10, 17, 24}), (4, 3, {0, 1, 2}), (1, 5, {2}), (2, 4, {1, 3}), ((4, 8, 13, 19), 28, {4, 8, 13, 19})])
def test_scored_layers_are_evenly_spaced_or_as_listed(wanted, layers, expected):
    assert pick_layers(wanted, layers) == expected


@pytest.mark.parametrize('keep, kept', [(1 / 16, 1), (.25, 2), (.5, 4), (1.0, 8)])
def test_the_fifo_holds_a_share_of_the_newest_clips(keep, kept, backbone, frames):
    memory = memory_of(backbone, frames, 0, keep=keep)
    for index in range(28):
        memory.step(frames[index], stamp(index))
        assert memory.state_tokens == kept * min(3, (index + 1) // 4)
    newest = memory.selected[-1]
    memory.step(frames[28], stamp(28))
    for index in range(29, 36):
        memory.step(frames[index % 32], stamp(index))
    assert memory.selected[0] is newest, 'two clips later it is the oldest of three'
    if keep == 1.0:
        told = memory_of(backbone, frames, 4, keep=keep)
        step = backbone.encode([backbone.prepare(frame) for frame in frames[:2]], [0., .5], 0)
        seen = slice(step.visual_start, step.visual_start + 4)
        assert torch.equal(told.selected[0].inputs.embeds[:, :4], step.embeds[:, seen]), 'all of them, in time order'


def read_of(backbone, frames, monkeypatch, **options) -> list[list]:
    """What each of eight clips had the model read: prefix, past, steps, request."""
    read, clips = [], []
    forward = backbone.forward
    monkeypatch.setattr(backbone, 'forward', lambda inputs, memory: read.append(inputs) or forward(inputs, memory))
    memory = memory_of(backbone, frames, 0, **options)
    for index in range(32):
        if memory.step(frames[index], stamp(index)):
            clips.append([*read])
            read.clear()
    return clips


def test_contiguous_positions_put_a_clip_right_behind_the_tokens_kept(backbone, definitions, frames, monkeypatch):
    prefix = backbone.prefix().next_position
    for clip, (_, *read) in enumerate(read_of(backbone, frames, monkeypatch, positions='contiguous')):
        carried = 2 * min(clip, 3)
        if clip:
            assert torch.equal(read[0].positions, torch.arange(prefix, prefix + carried).expand(3, 1, -1))
        step = read[bool(clip)]
        assert step.start == prefix + carried, 'as if the video began here'
        time = backbone.embed(definitions['patrol'].ids(f'<{2 * clip + .25:.1f} seconds><|vision_start|>'), 0).embeds
        assert torch.equal(step.embeds[:, :step.visual_start], time), 'but at its true time'


def test_native_positions_keep_the_distances_that_tokens_had(backbone, frames, monkeypatch):
    clips = read_of(backbone, frames, monkeypatch)
    prefix = backbone.prefix().next_position
    steps = [clip[1 + bool(number):3 + bool(number)] for number, clip in enumerate(clips)]
    for number in range(1, 8):
        past, first = clips[number][1], max(0, number - 3)
        assert past.tokens == 2 * (number - first)
        # The past clips and this one laid out whole from the prefix on: each kept token is one of theirs, where it was.
        shift = steps[first][0].start - prefix
        whole = [step for clip in steps[first:number] for step in clip]
        place = prefix
        for kept in range(past.tokens):
            at = past.positions[:, 0, kept]
            assert any(torch.equal(past.embeds[0, kept], step.embeds[0, token]) for step in whole
                       for token in range(step.visual_start, step.visual_start + step.visual_tokens))
            assert at[0] >= place
            place = int(at[0])
        assert steps[number][0].start == prefix + sum(s[-1].next_position - s[0].start for s in steps[first:number])
        assert shift >= 0 and clips[number][-1].next_position < prefix + 4 * 60 + 50


def test_without_recurrence_what_came_before_has_no_bearing(backbone, frames):
    def told(first: list, recurrent: bool) -> list[str]:
        memory = CaptionMemory(backbone, **{**SMALL, 'keep': 1.0}, recurrent=recurrent)
        for index, frame in enumerate([*first, *frames[4:12]]):
            memory.step(frame, stamp(index))
        assert memory.state_tokens == (24 if recurrent else 0)
        return [caption.text for caption in memory.captions][1:]

    black = [np.zeros_like(frames[0])] * 4
    assert told(frames[:4], False) == told(black, False)
    assert told(frames[:4], True) != told(black, True), 'else the test above would prove nothing'


def test_the_same_frames_give_the_same_memory_and_answer(backbone, frames):
    one, other = (memory_of(backbone, frames, 26) for _ in range(2))
    assert contents(one) == contents(other)
    assert one.answer(QUESTION, max_tokens=6).token_ids == other.answer(QUESTION, max_tokens=6).token_ids
    assert one.reset() == 26 and (one.frames, one.steps, one.state_tokens, one.detailed_bytes) == (0, 0, 0, 0)
    for index in range(26):
        one.step(frames[index], stamp(index))
    assert contents(one) == contents(other), 'a reset forgets all'


def test_memory_is_bounded_and_the_report_tells_what_it_holds(backbone, frames):
    memory = memory_of(backbone, frames, 0, max_captions=5)
    hidden = memory.backbone._language.config.hidden_size
    for index in range(48):
        report = memory.step(frames[index % 32], stamp(index))
        if report is None:
            continue
        assert (report.step, report.frames, report.first_stamp_ns) == (index // 4, 4, stamp(index - 3))
        assert report.total_ms > 0 and report.vision_ms > 0 and report.prefill_ms > 0
        assert len(memory.captions) <= 5 and memory.state_tokens <= 6
        # Text of at most five tokens, of at most a few bytes each.
        assert report.detailed_bytes == memory.detailed_bytes <= 5 * (4 * hidden + 4 * 5 + 200)
        assert memory.frames + memory.forgotten_frames == index + 1
    assert memory.forgotten_frames == report.forgotten_frames == 28 and memory.first_stamp_ns == stamp(28)
    assert memory.answer(QUESTION, max_tokens=2).first_stamp_ns == stamp(28)


def test_a_change_of_size_or_a_stamp_that_goes_back_ends_the_clip(backbone, frames):
    memory = memory_of(backbone, frames, 3)
    report = memory.step(np.zeros((48, 144, 3), np.uint8), stamp(3))
    assert (report.frames, report.segment) == (3, 0)
    report = memory.step(np.zeros((48, 144, 3), np.uint8), stamp(0))
    assert (report.frames, report.segment, memory.frames) == (1, 0, 5)
    assert memory.flush().segment == 1


def test_an_interrupted_clip_leaves_the_memory_as_it_was(backbone, frames):
    stop = []
    memory = memory_of(backbone, frames, 11, cancelled=lambda: bool(stop))
    before = contents(memory)
    stop.append(True)
    for work in (lambda: memory.answer(QUESTION), lambda: memory.step(frames[11], stamp(11))):
        with pytest.raises(Interrupted):
            work()
    stop.clear()
    assert contents(memory) == before and memory.frames == 8
    for index in range(12, 16):
        report = memory.step(frames[index], stamp(index))
    assert report.step == 2


@pytest.mark.parametrize('family', ['qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5'])
def test_every_family_can_tell_clips(family, frames, tmp_path, monkeypatch):
    backbone = load_backbone(str(write_tiny_checkpoint(tmp_path / family, family=family)), device='cpu', dtype='float32')
    numbers, read, encode, forward = [], [], backbone.encode, backbone.forward
    monkeypatch.setattr(backbone, 'forward', lambda inputs, memory: read.append(inputs) or forward(inputs, memory))
    monkeypatch.setattr(backbone, 'encode', lambda *step: numbers.append(step[3]) or encode(*step))
    memory = memory_of(backbone, frames, 16, max_caption_tokens=3, positions='contiguous')
    past, prefix = max((r for r in read if r.visual_tokens == r.tokens), key=lambda r: r.tokens), backbone.prefix().tokens
    assert torch.equal(past.positions, torch.arange(prefix, prefix + past.tokens).expand(past.positions.shape))
    assert past.tokens == sum(kept.tokens for kept in memory.selected)
    numbers.clear()
    memory = memory_of(backbone, frames, 9, max_caption_tokens=3)
    a_step = encode([backbone.prepare(frames[0])], [0.], 0).visual_tokens
    if family == 'internvl':
        assert numbers == [*range(8)], 'frames are numbered through'
    assert [kept.tokens for kept in memory.selected] == [round(.25 * a_step * 4 / backbone.frames_per_step)] * 2
    answer = memory.answer(QUESTION, max_tokens=3)
    assert answer.frames_covered == 9 and sum(e.share for e in answer.evidence) == pytest.approx(1)


@pytest.mark.parametrize('options, word', [
    ({'clip_frames': 0}, 'clip_frames'), ({'clip_frames': 2.5}, 'clip_frames'), ({'keep': 0}, 'keep'), ({'keep': 1.01}, 'keep'),
    ({'keep': math.nan}, 'keep'), ({'fifo_clips': 0}, 'recurrent=False'), ({'mmr_lambda': -.1}, 'mmr_lambda'),
    ({'mmr_lambda': math.nan}, 'mmr_lambda'), ({'context_tokens': 0}, 'context_tokens'),
    ({'context_tokens': 4}, 'lower max_caption_tokens'), ({'caption_prompt': ' '}, 'caption_prompt'),
    ({'max_caption_tokens': 0}, 'max_caption_tokens'), ({'max_captions': -1}, 'max_captions'),
    ({'score_layers': 0}, 'score_layers'),
    ({'positions': 'lazy_shift'}, 'native, contiguous'),
    ({'score_layers': (0, 5)}, 'between 0 and 4'), ({'score_layers': ()}, 'score_layers')])
def test_bad_arguments_are_named(options, word, backbone):
    with pytest.raises(PolicyError, match=word):
        CaptionMemory(backbone, **{**SMALL, **options})


def test_what_cannot_fit_the_trained_context_is_refused_with_the_first_clip(backbone, frames, monkeypatch):
    def told(positions: str, limit: int) -> int:
        memory = memory_of(backbone, frames, 3, positions=positions)
        monkeypatch.setattr(backbone, 'max_position', limit)
        memory.step(frames[3], stamp(3))
        return memory.selected[0].native

    assert told('native', 10**6)
    clip = memory_of(backbone, frames, 4).selected[0].inputs.next_position - backbone.prefix().next_position
    request = len(backbone.tokenize_question(PROMPT)) + SMALL['max_caption_tokens']
    native = backbone.prefix().next_position + 4 * clip + request
    contiguous = native - 3 * clip + 3 * 2
    assert told('', native) and told('native', native) and not told('', native - 1) and not told('', contiguous)
    for positions, limit in (('native', native - 1), ('contiguous', contiguous - 1), ('', contiguous - 1)):
        with pytest.raises(PolicyError, match=f'{limit}: lower one'):
            told(positions, limit)
    monkeypatch.setattr(backbone, 'max_position', 60)
    full = written(backbone, *TEXTS)
    with pytest.raises(QuestionError, match='no room'):
        full.answer(QUESTION, max_tokens=20)


def test_longer_timestamps_put_tokens_kept_in_line_instead_of_failing(backbone, frames, monkeypatch):
    """A stream past 100 s: each timestamp is a token longer, and what fitted just so no longer does."""
    read, forward = [], backbone.forward
    monkeypatch.setattr(backbone, 'forward', lambda inputs, memory: read.append(inputs) or forward(inputs, memory))
    memory = memory_of(backbone, frames, 8)
    prefix, clip = backbone.prefix().next_position, memory.selected[0].inputs
    request = len(backbone.tokenize_question(PROMPT)) + SMALL['max_caption_tokens']
    monkeypatch.setattr(backbone, 'max_position', prefix + 4 * (clip.next_position - prefix) + request)
    for index in range(8, 24):
        read.clear()
        memory.step(frames[index], stamp(index) + (100 * SECOND if index >= 12 else 0))
        if index == 15:
            assert torch.equal(read[1].positions, torch.arange(prefix, prefix + 6).expand(3, 1, -1))
    assert len(memory.captions) == 6 and not any(kept.native for kept in memory.selected)


def test_bad_frames_and_questions_are_named_and_cost_nothing(backbone, frames):
    with pytest.raises(QuestionError, match='nothing has been seen'):
        memory_of(backbone, frames, 0).answer(QUESTION)
    memory = memory_of(backbone, frames, 5)
    before = contents(memory)
    good = frames[5]
    for frame, at, word in ((good, stamp(4), 'previous frame'), (good, 0, 'positive'), (good[..., 0], stamp(5), 'RGB')):
        with pytest.raises(FrameError, match=word):
            memory.step(frame, at)
    for question, options, word in ((' ', {}, 'empty'), (QUESTION, {'max_tokens': 0}, 'max_tokens')):
        with pytest.raises(QuestionError, match=word):
            memory.answer(question, **options)
    assert contents(memory) == before and memory.frames == 5


@pytest.mark.parametrize('text, recurrent', [('rlivs', True), (' rlivs ', True), ('rlivs(norecurrence)', False),
                                             ('rlivs( norecurrence )', False)])
def test_the_policys_name_is_read(text, recurrent, backbone):
    assert parse_rlivs(text) is recurrent
    assert parse_rlivs(CaptionMemory(backbone, recurrent=recurrent).options.policy) is recurrent


@pytest.mark.parametrize('text', ['', 'rlivs()', 'rlivs(8)', 'rLiVS', 'rlivs(norecurrence', 'statekv(8)'])
def test_any_other_name_is_refused(text):
    with pytest.raises(PolicyError, match='rlivs'):
        parse_rlivs(text)
