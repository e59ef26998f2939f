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
    return [caption.text for caption in memory.captions], [rows.tolist() for rows in memory.selected]


@pytest.fixture(scope='module')
def stock(tiny_model_dir):
    """The library's own model, whose eager attention tells every weight."""
    return Qwen3VLForConditionalGeneration.from_pretrained(tiny_model_dir, attn_implementation='eager').eval()


class Definition:
    """The method told again: whole forwards of the library's model, attention averaged entry by entry, plain lists."""

    def __init__(self, stock, tokenizer, backbone):
        self.stock, self.tokenizer, self.backbone = stock, tokenizer, backbone
        self.language = stock.model.language_model

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

    def clip(self, frames, seconds, past: list[tuple], keep: float, layers, max_tokens: int):
        """Caption's tokens, and (embedding, DeepStack rows) of each visual token kept. past: the same of past clips."""
        prefix = self.ids('<|im_start|>user\n')
        parts, position = [self.text(prefix, 0)], len(prefix)
        if past:
            line = torch.arange(position, position + len(past))
            parts.append((torch.stack([row for row, _ in past]), torch.stack([line] * 3),
                          [torch.stack(level) for level in zip(*(deep for _, deep in past))]))
            position += len(past)
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
            rows += [(step.embeds[0, before + i], [level[i] for level in deepstack]) for i in range(seen)]
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
        return told, [rows[j] for j in sorted(best)]


@pytest.mark.parametrize('score_layers, layers', [(4, (0, 1, 2)), (2, (0, 2)), ((1,), (1,))])
@torch.inference_mode()
def test_captions_and_selection_equal_the_definition_clip_after_clip(score_layers, layers, backbone, stock, tiny_model_dir,
                                                                      frames):
    definition = Definition(stock, AutoTokenizer.from_pretrained(tiny_model_dir), backbone)
    memory = CaptionMemory(backbone, **{**SMALL, 'clip_frames': 6, 'keep': .25, 'fifo_clips': 2}, score_layers=score_layers)
    past: list[list[tuple]] = []
    for clip in range(4):
        for index in range(6 * clip, 6 * clip + 6):
            memory.step(frames[index], stamp(index))
        told, kept = definition.clip(frames[6 * clip:6 * clip + 6], [i / 2 for i in range(6 * clip, 6 * clip + 6)],
                                     [row for rows in past[-2:] for row in rows], .25, layers, 5)
        past.append(kept)
        assert memory.captions[-1].text == backbone.decode(told).strip(), f'caption of clip {clip}'
        expected = torch.stack([torch.cat([row, *deep]) for row, deep in kept])
        assert len(kept) == 3 and memory.selected[-1].shape == expected.shape
        assert (memory.selected[-1] - expected).abs().max() < 1e-4, f'tokens kept of clip {clip}'


def test_a_caption_without_a_word_selects_by_the_request_and_is_kept(backbone, frames, monkeypatch):
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset(range(10**5)))
    memory = memory_of(backbone, frames, 8)
    assert [(c.text, len(c.token_ids)) for c in memory.captions] == [('', 0)] * 2
    assert [len(rows) for rows in memory.selected] == [2, 2]
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
        assert torch.equal(told.selected[0][:4], backbone.visual_features(step)), 'all of them, in time order'


def test_a_clip_is_read_right_behind_the_past_clips_tokens(backbone, tiny_model_dir, frames, monkeypatch):
    read, tokenizer = [], AutoTokenizer.from_pretrained(tiny_model_dir)
    forward = backbone.forward
    monkeypatch.setattr(backbone, 'forward', lambda inputs, memory: read.append(inputs) or forward(inputs, memory))
    memory = memory_of(backbone, frames, 0)
    prefix = backbone.prefix().next_position
    for index in range(32):
        read.clear()
        carried = memory.state_tokens
        if memory.step(frames[index], stamp(index)) is None:
            continue
        _, *middle = read[:2 + bool(carried)]
        if carried:
            line = torch.arange(prefix, prefix + carried)
            assert torch.equal(middle[0].positions, line.expand(3, 1, -1)) and middle[0].visual_tokens == carried
        assert middle[-1].start == prefix + carried, 'as if the video began here'
        time = backbone.embed(tokenizer(f'<{(index - 2.5) / 2:.1f} seconds><|vision_start|>').input_ids, 0).embeds
        assert torch.equal(middle[-1].embeds[:, :middle[-1].visual_start], time), 'but at its true time'
    assert carried == 6 and read[-1].next_position <= prefix + 6 + 2 * 25 + 40 + 5


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
        return math.fsum(x * y for x, y in zip(a, b)) / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))

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
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0., .3, .5, .7, 1.]), st.integers(5, 60), st.integers(0, 2))
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


@torch.inference_mode()
def test_an_answer_is_the_librarys_answer_to_the_captions_as_text(backbone, stock, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer(f'<|im_start|>user\n {" . ".join(TEXTS)} {QUESTION}<|im_end|>\n<|im_start|>assistant\n').input_ids
    definition = Definition(stock, tokenizer, backbone)
    answer = written(backbone, *TEXTS).answer(QUESTION, max_tokens=6, evidence=9)
    assert list(answer.token_ids) == definition.greedy([definition.text(ids, 0)], len(ids), 6)
    framing = len(definition.ids('<|im_start|>user\n'))
    assert framing + answer.context_tokens + answer.question_tokens == len(ids)
    assert (answer.first_stamp_ns, answer.last_stamp_ns, answer.frames_covered) == (stamp(0), stamp(15), 16)
    assert {(e.first_stamp_ns, e.last_stamp_ns) for e in answer.evidence} == {(stamp(4 * i), stamp(4 * i + 3)) for i in range(4)}
    shares = [e.share for e in answer.evidence]
    assert math.isclose(sum(shares), 1) and shares == sorted(shares, reverse=True)
    assert (answer.prefill_policy, answer.answer_policy) == ('rlivs', 'captions')


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
    report = memory.step(np.zeros((96, 128, 3), np.uint8), stamp(3))
    assert (report.frames, report.segment) == (3, 0)
    report = memory.step(np.zeros((96, 128, 3), np.uint8), stamp(0))
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
def test_every_family_can_tell_clips(family, frames, tmp_path):
    backbone = load_backbone(str(write_tiny_checkpoint(tmp_path / family, family=family)), device='cpu', dtype='float32')
    memory = memory_of(backbone, frames, 9, max_caption_tokens=3)
    assert [len(rows) for rows in memory.selected] == [round(.25 * backbone.visual_features(backbone.encode(
        [backbone.prepare(frames[0])], [0.], 0)).shape[0] * 4 / backbone.frames_per_step)] * 2
    answer = memory.answer(QUESTION, max_tokens=3)
    assert answer.frames_covered == 9 and sum(e.share for e in answer.evidence) == pytest.approx(1)


@pytest.mark.parametrize('options, word', [
    ({'clip_frames': 0}, 'clip_frames'), ({'clip_frames': 2.5}, 'clip_frames'), ({'keep': 0}, 'keep'), ({'keep': 1.01}, 'keep'),
    ({'keep': math.nan}, 'keep'), ({'fifo_clips': 0}, 'recurrent=False'), ({'mmr_lambda': -.1}, 'mmr_lambda'),
    ({'mmr_lambda': math.nan}, 'mmr_lambda'), ({'context_tokens': 0}, 'context_tokens'),
    ({'context_tokens': 4}, 'lower max_caption_tokens'), ({'caption_prompt': ' '}, 'caption_prompt'),
    ({'max_caption_tokens': 0}, 'max_caption_tokens'), ({'max_captions': -1}, 'max_captions'), ({'score_layers': 0}, 'score_layers'),
    ({'score_layers': (0, 3)}, 'between 0 and 2'), ({'score_layers': ()}, 'score_layers')])
def test_bad_arguments_are_named(options, word, backbone):
    with pytest.raises(PolicyError, match=word):
        CaptionMemory(backbone, **{**SMALL, **options})


def test_what_cannot_fit_the_trained_context_is_refused_with_the_first_clip(backbone, frames, monkeypatch):
    memory = memory_of(backbone, frames, 3)
    monkeypatch.setattr(backbone, 'max_position', 60)
    with pytest.raises(PolicyError, match='60: lower one'):
        memory.step(frames[3], stamp(3))
    full = written(backbone, *TEXTS)
    with pytest.raises(QuestionError, match='no room'):
        full.answer(QUESTION, max_tokens=20)


def test_bad_frames_and_questions_are_named_and_cost_nothing(backbone, frames):
    with pytest.raises(QuestionError, match='nothing has been seen'):
        memory_of(backbone, frames, 0).answer(QUESTION)
    memory = memory_of(backbone, frames, 5)
    before = contents(memory)
    for frame, at, word in ((frames[5], stamp(4), 'previous frame'), (frames[5], 0, 'positive'), (frames[5][..., 0], stamp(5), 'RGB')):
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
