"""rLiVS: selection, retrieval and answers against plain definitions; bounded, private, the same every time."""
import math
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import FrameError, Interrupted, PolicyError, QuestionError
from statekv_ros.memory.rlivs import CaptionMemory, parse_rlivs
from statekv_ros.memory.rlivs.long_term import Caption, make_caption, retrieve
from statekv_ros.memory.rlivs.options import pick_layers
from statekv_ros.memory.snapshot import PendingFrames
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.patrol.world import make_patrol
from statekv_ros.share import find_share

QUESTION = 'is the door open?'
PROMPT = 'describe what is happening.'
SMALL = dict(clip_frames=4, keep=.25, fifo_clips=3, max_caption_tokens=5)  # clips of 2 steps of 4 visual tokens, 2 kept


def stamp(index: int) -> int:
    return (index + 1) * SECOND // 2


def memory_of(backbone, frames, count: int, **options) -> CaptionMemory:
    memory = CaptionMemory(backbone, **{**SMALL, **options})
    for index in range(count):
        memory.step(frames[index % len(frames)], stamp(index))
    return memory


def contents(memory: CaptionMemory) -> tuple:
    return ([caption.text for caption in memory.captions],
            [(kept.inputs.embeds.tolist(), kept.inputs.positions.tolist()) for kept in memory.selected])


@pytest.fixture(scope='module')
def backbone():
    """The model that comes along: its captions have words, which a tiny random one's hardly have."""
    return load_backbone('patrol', device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def frames() -> list[np.ndarray]:
    return [frame for _, frame in patrol_frames(make_patrol(16, np.random.default_rng(3)), 3, 64, 64)]


@pytest.fixture(scope='module')
def definitions(tiny_model_dir):
    return {'tiny': Definition(tiny_model_dir, tiny_model_dir), 'patrol': Definition('patrol', find_share('models/patrol'))}


class Definition:
    """The method told again: whole forwards of the library's model, attention averaged entry by entry, plain lists."""

    def __init__(self, model: str, folder):
        self.backbone = load_backbone(model, device='cpu', dtype='float32')
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        # Eager attention tells every weight.
        self.stock = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation='eager',
                                                                     dtype=torch.float32).eval()
        self.language = self.stock.model.language_model

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def forward(self, parts: list[tuple], **options):
        """parts: (embeddings [tokens, hidden], positions [3, tokens], DeepStack levels or None), one behind the other."""
        mask = torch.cat([torch.full((len(part[0]),), part[2] is not None) for part in parts])
        levels = [torch.cat(level) for level in zip(*(part[2] for part in parts if part[2] is not None))]
        return self.language(
            inputs_embeds=torch.cat([part[0] for part in parts])[None], use_cache=False,
            position_ids=torch.cat([part[1] for part in parts], dim=1)[:, None],
            **dict(visual_pos_masks=mask[None], deepstack_visual_embeds=levels) if levels else {}, **options)

    def text(self, ids: list[int], position: int) -> tuple:
        line = torch.arange(position, position + len(ids))
        return self.language.embed_tokens(torch.tensor(ids)), torch.stack([line] * 3), None

    def greedy(self, parts: list[tuple], position: int, max_tokens: int) -> list[int]:
        told: list[int] = []
        while len(told) < max_tokens:
            hidden = self.forward([*parts, *([self.text(told, position)] if told else [])]).last_hidden_state
            token = int(self.stock.lm_head(hidden[0, -1]).argmax())
            if token == self.tokenizer.eos_token_id:
                break
            told.append(token)
        return told

    def clip(self, frames, seconds, past: list[dict], positions: str, keep: float, layers, max_tokens: int):
        """Caption's tokens, and what is kept: embedding, place from the clip's beginning and DeepStack rows of each visual
        token, and the positions until the next clip. past: the same of past clips."""
        prefix = self.ids('<|im_start|>user\n')
        parts, position = [self.text(prefix, 0)], len(prefix)
        for kept in past:
            for number, (row, place, deep) in enumerate(kept['rows']):
                at = position + (place if positions == 'native' else torch.full((3,), number))
                parts.append((row[None], at[:, None], [level[None] for level in deep]))
            position += kept['span'] if positions == 'native' else len(kept['rows'])
        begin = position
        visual, rows = [], []
        for first in range(0, len(frames), 2):
            step = self.backbone.encode([self.backbone.prepare(f) for f in frames[first:first + 2]],
                                        seconds[first:first + 2], position)
            before, seen = step.visual_start, step.visual_tokens
            start = sum(len(part[0]) for part in parts)
            deepstack = [level[0, before:before + seen] for level in step.extra['deepstack']]
            for a, b, deep in ((0, before, None), (before, before + seen, deepstack), (before + seen, step.tokens, None)):
                parts.append((step.embeds[0, a:b], step.positions[:, 0, a:b], deep))
            visual += range(start + before, start + before + seen)
            rows += [(step.embeds[0, before + i], step.positions[:, 0, before + i] - begin, [level[i] for level in deepstack])
                     for i in range(seen)]
            position = step.next_position
        request = self.ids(f'{PROMPT}<|im_end|>\n<|im_start|>assistant\n')
        parts.append(self.text(request, position))
        told = self.greedy(parts, position + len(request), max_tokens)
        first_told = sum(len(part[0]) for part in parts)
        attention = self.forward([*parts, self.text(told, position + len(request))], output_attentions=True).attentions
        importance = []
        for j in visual:
            weights = [attention[layer][0, head, first_told + i, j].item() for layer in layers
                       for head in range(attention[layer].shape[1]) for i in range(len(told))]
            importance.append(math.fsum(weights) / len(weights))
        best = sorted(range(len(visual)), key=lambda j: -importance[j])[:max(1, round(keep * len(visual)))]
        return told, {'rows': [rows[j] for j in sorted(best)], 'span': position - begin}


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


def captions_of(embeddings: np.ndarray, lengths: list[int]) -> list[Caption]:
    return [Caption('', 1, i + 1, i + 1, array('i', [7] * length), torch.nn.functional.normalize(torch.tensor(row), dim=0))
            for i, (row, length) in enumerate(zip(embeddings.astype(np.float32), lengths))]


def mmr(captions: list[Caption], question, weight: float, room: int, separator: int) -> list[int]:
    """Maximal marginal relevance by its definition, in Python numbers."""
    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)

    vectors, chosen, used = [caption.embedding.tolist() for caption in captions], [], 0
    while len(chosen) < len(captions):
        value = {i: weight * cosine(vectors[i], question)
                 - (1 - weight) * max((cosine(vectors[i], vectors[j]) for j in chosen), default=0)
                 for i in range(len(captions)) if i not in chosen}
        best = max(value, key=value.get)
        used += len(captions[best].token_ids) + (separator if chosen else 0)
        if used > room:
            break
        chosen.append(best)
    return sorted(chosen)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0., .3, .5, .7, 1.]), st.integers(5, 60),
       st.integers(0, 2))
def test_retrieval_equals_the_definition_of_mmr(seed, count, weight, room, separator):
    random = np.random.default_rng(seed)
    captions = captions_of(random.normal(size=(count, 6)), random.integers(0, 6, count).tolist())
    question = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=6).astype(np.float32)), dim=0)
    found = [caption.first_stamp_ns - 1 for caption in retrieve(captions, question, weight, room, separator)]
    total = sum(len(caption.token_ids) for caption in captions) + separator * (count - 1)
    if weight == 0 and total > room:  # every caption is as good a first choice as any: the earliest
        assert found[0] == 0 or found == []
    assert found == (list(range(count)) if total <= room else mmr(captions, question.tolist(), weight, room, separator))


def written(backbone, *texts: str, **options) -> CaptionMemory:
    """A memory with given captions of clips of four frames."""
    memory = CaptionMemory(backbone, **{**SMALL, 'max_caption_tokens': 40, **options})
    for number, text in enumerate(texts):
        clip = PendingFrames()
        for index in range(4 * number, 4 * number + 4):
            clip.add(np.zeros((64, 64, 3), np.uint8), stamp(index), index / 2, 0.)
        memory.captions.append(make_caption(backbone, text, clip, 40))
        memory._told_frames += 4
    return memory


TEXTS = ('3 red door , 5 green ball', 'a toolbox', 'nothing', 'the door is open')


@pytest.mark.parametrize('model', ['tiny', 'patrol'])
@torch.inference_mode()
def test_an_answer_is_the_librarys_answer_to_the_captions_as_text(model, definitions):
    definition = definitions[model]
    pieces = [definition.ids(text) for text in ('<|im_start|>user\n', *(f' {text}' for text in TEXTS), ' .')]
    ids = definition.ids(f'<|im_start|>user\n {" . ".join(TEXTS)} {QUESTION}<|im_end|>\n<|im_start|>assistant\n')
    answer = written(definition.backbone, *TEXTS).answer(QUESTION, max_tokens=6, evidence=9)
    told = definition.greedy([definition.text(ids, 0)], len(ids), 6)
    assert list(answer.token_ids)[:len(told)] == told and answer.answer_tokens - len(told) == (answer.finish_reason == 'stop')
    assert len(pieces[0]) + answer.context_tokens + answer.question_tokens == len(ids)
    assert (answer.first_stamp_ns, answer.last_stamp_ns, answer.frames_covered) == (stamp(0), stamp(15), 16)
    assert (answer.prefill_policy, answer.answer_policy) == ('rlivs', 'captions')

    read = definition.text([*ids, *answer.token_ids[:-1]], 0)
    attention = torch.stack(definition.forward([read], output_attentions=True).attentions)[:, 0]
    mass, start = [], len(pieces[0])
    for piece in pieces[1:-1]:  # of what was read where a token of the answer was told
        mass.append(attention[:, :, len(ids) - 1:, start:start + len(piece)].sum().item())
        start += len(piece) + len(pieces[-1])
    best = sorted(range(4), key=lambda i: -mass[i])
    assert [(e.first_stamp_ns, e.last_stamp_ns) for e in answer.evidence] == [(stamp(4 * i), stamp(4 * i + 3)) for i in best]
    assert [e.share for e in answer.evidence] == pytest.approx([mass[i] / sum(mass) for i in best], abs=1e-5)


def test_a_full_context_leaves_captions_out_and_says_so(backbone):
    texts = [f'{i} red door , {i + 1} green ball' for i in range(20)]
    answer = written(backbone, *texts, context_tokens=60).answer(QUESTION, max_tokens=2, evidence=99)
    assert answer.context_tokens <= 60 and 0 < answer.frames_covered < 80
    assert len(answer.evidence) == answer.frames_covered // 4


def test_a_span_cuts_the_memory(backbone, frames):
    memory = memory_of(backbone, frames, 18)
    answer = memory.answer(QUESTION, max_tokens=2, span=(stamp(3), stamp(11)))
    assert (answer.first_stamp_ns, answer.last_stamp_ns, answer.frames_covered) == (stamp(4), stamp(11), 8)
    with pytest.raises(QuestionError, match='no clip between'):
        memory.answer(QUESTION, span=(stamp(1), stamp(5)))


def test_a_question_within_a_clip_sees_it_and_leaves_no_trace(backbone, frames):
    quiet, asked = memory_of(backbone, frames, 21), memory_of(backbone, frames, 0)
    for index in range(21):
        asked.step(frames[index], stamp(index))
        answer = asked.answer(QUESTION, max_tokens=3)
        assert (answer.frames_covered, answer.last_stamp_ns) == (index + 1, stamp(index))
    assert contents(quiet) == contents(asked) and quiet.frames == asked.frames == 21
    assert quiet.flush().frames == 1 and quiet.flush() is None
    assert quiet.answer(QUESTION, max_tokens=3).token_ids == answer.token_ids
    assert contents(quiet) != contents(asked)


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
