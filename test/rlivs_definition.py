"""What tests of rLiVS share: a small memory, and the method told again in plain terms."""
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.evaluation.rlivs import CaptionMemory
from statekv_ros.evaluation.rlivs.long_term import make_caption
from statekv_ros.memory.intake import PendingFrames
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.patrol.world import make_patrol
from statekv_ros.share import find_share

QUESTION = 'is the door open?'
PROMPT = 'describe what is happening.'
SMALL = dict(clip_frames=4, keep=.25, fifo_clips=3, max_caption_tokens=5)  # clips of 2 steps of 4 visual tokens, 2 kept
TEXTS = ('3 red door , 5 green ball', 'a toolbox', 'nothing', 'the door is open')


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
