"""Training batches: a patrol's context once, and behind it many questions that each see only what was there when asked.

A row is [context][question]...[question][caption request]...: the attention of each segment is bound to a span of the context
and to itself, so one pass over the frames serves all questions. The context is a video, or the captions of its clips.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from statekv_ros.backbones.mrope import grid_positions, text_positions
from statekv_ros.patrol import captions
from statekv_ros.patrol.pictures import PictureBank
from statekv_ros.patrol.questions import KINDS, PERCEPTION, Question, answer_at, ask, pick_step
from statekv_ros.patrol.world import COLOURS, SHAPES, Patrol, View, make_patrol, words_in_view

CLIP_STEPS = 8                    # of a caption: 16 frames
QUESTION_TOKENS, CAPTION_TOKENS = 16, 44
GRID = 2                          # visual tokens along one side of a step
IGNORED = -100
# Words that the last visual token of each step must tell, while training: what is in view, where, before, when, again, how many.
NOTES = 9


@dataclass
class Batch:
    """One packed batch; all indices are into rows joined end to end.

    Attributes:
        ids: [rows, tokens] int64; positions: [3, rows, tokens] int64; labels: [rows, tokens], IGNORED where nothing is told.
        context_tokens: tokens of each row's context, padded alike.
        questions, captions: segments of QUESTION_TOKENS and of CAPTION_TOKENS behind the context of each row.
        seen: [rows, questions + captions, 2] first and last + 1 context token that a segment sees besides the prefix.
        prefix_tokens: first tokens of the context, which every segment sees.
        pictures: [steps] index into the picture bank, row by row; visual: [steps x 4] where its tokens stand.
        noted: [steps] last visual token of each step; notes: [steps, NOTES] token ids told there, IGNORED for none.
        kinds: [rows, questions] index into KINDS, -1 for a caption's place.
    """
    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    context_tokens: int
    questions: int
    captions: int
    seen: torch.Tensor
    prefix_tokens: int
    pictures: np.ndarray
    visual: torch.Tensor
    noted: torch.Tensor
    notes: torch.Tensor
    kinds: torch.Tensor


class Packer:
    """Makes batches of one tokenizer and picture bank."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bank: PictureBank):
        self.bank = bank
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._prefix = self.encode('<|im_start|>user\n')
        self._pad, self._end = tokenizer.convert_tokens_to_ids(['<|endoftext|>', '<|im_end|>'])
        self._visual = tokenizer.convert_tokens_to_ids('<|video_pad|>')

    def encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def video_batch(self, rows: int, steps: int, questions: int, captions: int, random: np.random.Generator,
                    kind_weights: np.ndarray | None = None, vary: bool = True) -> Batch:
        """Videos with questions of kinds drawn by `kind_weights` (even when None).

        vary: random start times, gaps in the positions and fractions of a second; off, the video starts at 0 s as a stream does.
        """
        contexts, segments = [], []
        for _ in range(rows):
            patrol = make_patrol(steps, random)
            context = self._video(patrol, random, vary)
            contexts.append(context)
            segments.append([*self._questions(patrol, context, questions, random, kind_weights),
                             *(self._caption(patrol, context, random) for _ in range(captions))])
        return self._pack(contexts, segments, questions, captions)

    def caption_batch(self, rows: int, steps: int, questions: int, random: np.random.Generator,
                      kind_weights: np.ndarray | None = None) -> Batch:
        """Questions about captions alone; those about what is in view now are left out."""
        weights = np.ones(len(KINDS)) if kind_weights is None else kind_weights.copy()
        weights[[KINDS.index(kind) for kind in (*PERCEPTION, 'again')]] = 0
        contexts, segments = [], []
        for _ in range(rows):
            patrol = make_patrol(steps, random)
            context = self._told(patrol, random)
            contexts.append(context)
            segments.append(self._questions(patrol, context, questions, random, weights))
        return self._pack(contexts, segments, questions, 0)

    def asked_batch(self, asked: Sequence[tuple[Patrol, Sequence[tuple[Question, int] | None]]],
                    random: np.random.Generator) -> Batch:
        """Videos from 0 s with given questions and the step each is asked at, for an evaluation; None leaves a place empty."""
        contexts, segments = [], []
        for patrol, pairs in asked:
            context = self._video(patrol, random, vary=False)
            contexts.append(context)
            segments.append([_EMPTY if pair is None else self._question(patrol, context, *pair) for pair in pairs])
        return self._pack(contexts, segments, len(asked[0][1]), 0)

    def _video(self, patrol: Patrol, random: np.random.Generator, vary: bool) -> '_Context':
        steps = len(patrol.steps)
        start, gaps = 0, np.zeros(steps, np.int64)
        if vary:
            start = int(random.integers(0, 100 - min(steps, 99)) if random.random() < .7 else random.integers(100, 9000))
            if random.random() < .5:
                gaps = random.integers(0, int(random.choice([7, 14, 28])) + 1, steps)
        context = _Context([*self._prefix], [text_positions(0, len(self._prefix))], len(self._prefix),
                           [start + i for i in range(steps)])
        for index, step in enumerate(patrol.steps):
            tenth = 2 if not vary or random.random() < .7 else int(random.integers(10))
            before = self.encode(f'<{context.seconds[index]}.{tenth} seconds><|vision_start|>')
            after = self.encode('<|vision_end|>')
            at = context.next_position + int(gaps[index])
            corner = at + len(before)
            context.ids += [*before, *[self._visual] * GRID**2, *after]
            context.positions += [text_positions(at, len(before)), grid_positions(corner, corner, GRID, GRID),
                                  text_positions(corner + GRID, len(after))]
            first_visual = len(context.ids) - len(after) - GRID**2
            context.visual += range(first_visual, first_visual + GRID**2)
            context.next_position = corner + GRID + len(after)
            context.ends.append(len(context.ids))
            context.after_step.append(context.next_position)
            context.pictures.append(self.bank.pick(step, random))
            context.notes.append(self._notes(patrol, index, context.seconds))
        return context

    def _told(self, patrol: Patrol, random: np.random.Generator) -> '_Context':
        start = int(random.integers(0, 60)) if random.random() < .7 else int(random.integers(100, 9000))
        seconds = [start + i for i in range(len(patrol.steps))]
        clips = [captions.caption(patrol, first, min(first + CLIP_STEPS, len(seconds)) - 1, seconds)
                 for first in range(0, len(seconds), CLIP_STEPS)]
        ids = self._prefix + self.encode(' . '.join(clips))
        position = len(ids)
        return _Context(ids, [text_positions(0, position)], position, seconds, whole=True)

    def _questions(self, patrol: Patrol, context: '_Context', wanted: int, random: np.random.Generator,
                   weights: np.ndarray | None) -> list['_Segment']:
        weights = None if weights is None else weights / weights.sum()
        segments = []
        while len(segments) < wanted:
            kind = KINDS[int(random.choice(len(KINDS), p=weights))]
            step = len(patrol.steps) - 1 if context.whole else pick_step(patrol, kind, random, random.random() < .5)
            question = ask(patrol, kind, step, random)
            if question is not None:
                segments.append(self._question(patrol, context, question, step))
        return segments

    def _question(self, patrol: Patrol, context: '_Context', question: Question, step: int) -> '_Segment':
        answer = answer_at(patrol, question, step, context.seconds)
        end = len(context.ids) if context.whole else context.ends[step]
        position = context.next_position if context.whole else context.after_step[step]
        return self._segment(question.text, answer, position, (len(self._prefix), end), KINDS.index(question.kind))

    def _caption(self, patrol: Patrol, context: '_Context', random: np.random.Generator) -> '_Segment':
        steps = len(patrol.steps)
        clip = min(steps, CLIP_STEPS if random.random() < .7 else int(random.integers(1, CLIP_STEPS + 1)))
        last = int(random.integers(clip - 1, steps))
        first = last - clip + 1
        text = captions.caption(patrol, first, last, context.seconds)
        begin = context.ends[first - 1] if first else len(self._prefix)
        return self._segment(captions.PROMPT, text, context.after_step[last], (begin, context.ends[last]), -1)

    def _segment(self, question: str, answer: str, position: int, seen: tuple[int, int], kind: int) -> '_Segment':
        asked = self.encode(question) + self.encode('<|im_end|>\n<|im_start|>assistant\n')
        told = [*self.encode(answer), self._end]
        return _Segment(asked + told[:-1], [IGNORED] * (len(asked) - 1) + told, position, seen, kind)

    def _notes(self, patrol: Patrol, index: int, seconds: list[int]) -> list[int]:
        step = patrol.steps[index]
        objects = patrol.objects(index)
        colour, shape = words_in_view(step)
        before_colour = before_shape = 'nothing'
        again, count = IGNORED, IGNORED
        if step.view == View.OBJECT:
            again = self.encode(answer_at(patrol, Question('again'), index))[0]
            count = self.encode(str(min(99, sum(o.shape == step.shape for o in objects))))[0]
            objects = objects[:-1]
        if objects:
            before_colour, before_shape = COLOURS[objects[-1].colour], SHAPES[objects[-1].shape]
        number = self.encode(str(seconds[index]))
        words = (colour, shape, COLOURS[step.room], before_colour, before_shape)
        return [*(self.encode(word)[0] for word in words), number[0], number[1] if len(number) > 1 else IGNORED, again, count]

    def _pack(self, contexts: list['_Context'], segments: list[list['_Segment']], questions: int, captions: int) -> Batch:
        rows, context_tokens = len(contexts), max(len(context.ids) for context in contexts)
        total = context_tokens + questions * QUESTION_TOKENS + captions * CAPTION_TOKENS
        ids = np.full((rows, total), self._pad)
        labels = np.full((rows, total), IGNORED)
        positions = np.zeros((3, rows, total), np.int64)
        seen = np.zeros((rows, questions + captions, 2), np.int64)
        kinds = np.full((rows, questions), -1)
        for row, (context, behind) in enumerate(zip(contexts, segments)):
            ids[row, :len(context.ids)] = context.ids
            positions[:, row, :len(context.ids)] = torch.cat(context.positions, dim=2)[:, 0].numpy()
            start = context_tokens
            for number, segment in enumerate(behind):
                length = QUESTION_TOKENS if number < questions else CAPTION_TOKENS
                used = min(length, len(segment.ids))
                ids[row, start:start + used] = segment.ids[:used]
                labels[row, start:start + used] = segment.labels[:used]
                positions[:, row, start:start + length] = segment.position + np.arange(length)
                seen[row, number] = segment.seen
                if number < questions:
                    kinds[row, number] = segment.kind
                start += length
        offsets = np.arange(rows) * total
        visual = torch.from_numpy(np.array([o + v for o, c in zip(offsets, contexts) for v in c.visual], np.int64))
        return Batch(
            *(torch.from_numpy(array) for array in (ids, positions, labels)), context_tokens, questions, captions,
            torch.from_numpy(seen), len(self._prefix), np.array([p for c in contexts for p in c.pictures], np.int64),
            visual, visual[GRID**2 - 1::GRID**2],
            torch.from_numpy(np.array([n for c in contexts for n in c.notes], np.int64).reshape(-1, NOTES)),
            torch.from_numpy(kinds))


class _Context:
    """A row's context while it is written."""

    def __init__(self, ids: list[int], positions: list[torch.Tensor], next_position: int, seconds: list[int],
                 whole: bool = False):
        self.ids, self.positions, self.next_position, self.seconds, self.whole = ids, positions, next_position, seconds, whole
        self.visual: list[int] = []
        self.ends: list[int] = []             # tokens until the end of each step
        self.after_step: list[int] = []       # position of the token behind each step
        self.pictures: list[int] = []
        self.notes: list[list[int]] = []


@dataclass(frozen=True)
class _Segment:
    ids: list[int]
    labels: list[int]
    position: int
    seen: tuple[int, int]
    kind: int


_EMPTY = _Segment([], [], 0, (0, 0), -1)
