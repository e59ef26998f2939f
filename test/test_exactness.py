"""The master test: with nothing evicted, streaming is the same function as one stock causal forward of the library's model."""
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from conftest import SECOND
from statekv_ros.backbones.patches import patchify
from statekv_ros.memory import VideoStream

QUESTION = 'where did you last see the red toolbox?'
STAMPS = [SECOND // 2 * (i + 1) for i in range(32)]


@pytest.fixture(scope='module')
def stock(tiny_model_dir):
    return Qwen3VLForConditionalGeneration.from_pretrained(tiny_model_dir, attn_implementation='sdpa').eval()


def stream_of(backbone, policy, frames, **options) -> VideoStream:
    stream = VideoStream(backbone, policy, **options)
    for frame, stamp in zip(frames, STAMPS):
        stream.step(frame, stamp)
    return stream


def stock_forward(stock, tiny_model_dir, backbone, frames, answer_ids=()):
    """One forward of the library's own model over the whole prompt, written as its processor writes it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    pairs = [frames[i:i + 2] for i in range(0, len(frames), 2)]
    prepared = [[backbone.prepare(frame) for frame in pair] for pair in pairs]
    rows, columns = (side // 16 for side in prepared[0][0].shape[:2])
    text = '<|im_start|>user\n'
    for index in range(len(pairs)):
        seconds = (STAMPS[2 * index] + STAMPS[2 * index + 1]) / 2 / SECOND - STAMPS[0] / SECOND
        text += f'<{seconds:.1f} seconds><|vision_start|>' + '<|video_pad|>' * (rows * columns // 4) + '<|vision_end|>'
    text += f'{QUESTION}<|im_end|>\n<|im_start|>assistant\n'
    ids = torch.cat([tokenizer(text, return_tensors='pt').input_ids, torch.tensor([answer_ids], dtype=torch.long)], dim=1)
    spec = backbone._pixels
    with torch.inference_mode():
        output = stock(input_ids=ids, use_cache=True,
                       pixel_values_videos=torch.cat([patchify(torch.from_numpy(np.stack(pair)), spec) for pair in prepared]),
                       video_grid_thw=torch.tensor([[len(pairs), rows, columns]]),
                       mm_token_type_ids=(ids == stock.config.video_token_id).int() * 2)
    return ids, output


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize('policy', ['statekv(unlimited)', 'statekv(100000)', 'full', 'window(1000)'])
def test_unlimited_memory_equals_one_stock_causal_forward(policy, backbone, stock, tiny_model_dir, frames, monkeypatch):
    logits = []
    project = backbone.logits
    monkeypatch.setattr(backbone, 'logits', lambda hidden: logits.append(project(hidden)) or logits[-1])
    stream = stream_of(backbone, policy, frames[:24])
    assert stream.steps == 12
    answer = stream.answer(QUESTION, max_tokens=6)
    ids, expected = stock_forward(stock, tiny_model_dir, backbone, frames[:24], answer.token_ids)

    views = stream.detailed.views()
    seen = stream.detailed_tokens
    assert len(views) == 2, 'the prefix, and all steps side by side'
    key, value = (torch.cat([getattr(view, name) for view in views], dim=2) for name in ('key', 'value'))
    assert ids.shape[1] == seen + answer.question_tokens + answer.answer_tokens
    for layer, reference in enumerate(expected.past_key_values.layers):
        assert worst(key[layer], reference.keys[0, :, :seen]) < 1e-4, f'K of layer {layer}'
        assert worst(value[layer], reference.values[0, :, :seen]) < 1e-4, f'V of layer {layer}'
    first = seen + answer.question_tokens - 1
    assert worst(torch.cat(logits), expected.logits[0, first:first + len(logits)]) < 1e-4


def test_small_budget_changes_the_result(backbone, stock, tiny_model_dir, frames):
    """Else the equality above would prove nothing about the state."""
    stream = stream_of(backbone, 'statekv(20)', frames[:24])
    views = stream.detailed.views()
    _, expected = stock_forward(stock, tiny_model_dir, backbone, frames[:24])
    key = torch.cat([view.key for view in views], dim=2)
    assert worst(key[-1], expected.past_key_values.layers[-1].keys[0, :, :stream.detailed_tokens]) > 1e-2


class Definition:
    """Selection from the method's definition, one head and one query at a time, in float64, on plain Python lists."""

    def __init__(self, layers: int, kv_heads: int, budget: int):
        self.budget = budget
        self.kept = {(layer, head): [] for layer in range(layers) for head in range(kv_heads)}

    def watch(self, layer: int, query, key, first_ordinal: int) -> None:
        tokens, group = query.shape[2], query.shape[1] // key.shape[1]
        for head in range(key.shape[1]):
            past = self.kept[layer, head]
            keys = past + [(first_ordinal + i, key[0, head, i].double()) for i in range(tokens)]
            importance = [0.0] * len(keys)
            matrix = torch.stack([vector for _, vector in keys])
            for q_head in range(head * group, (head + 1) * group):
                for i in range(tokens):
                    visible = len(past) + i + 1
                    scores = matrix[:visible] @ query[0, q_head, i].double() / query.shape[3] ** 0.5
                    for j, mass in enumerate(torch.softmax(scores, 0).tolist()):
                        importance[j] += mass
            order = sorted(range(len(keys)), key=lambda j: (-importance[j], keys[j][0]))
            self.kept[layer, head] = [keys[j] for j in sorted(order[:self.budget], key=lambda j: keys[j][0])]


@pytest.mark.parametrize('budget', [1, 7, 16, 33, 60])
def test_state_equals_definition_for_every_step_layer_and_head(budget, backbone, frames, monkeypatch):
    layout = backbone.layout
    definition = Definition(layout.layers, layout.kv_heads, budget)
    stream = VideoStream(backbone, f'statekv({budget})')
    attend = stream.attend

    def watched(layer, query, key, value, scale):
        definition.watch(layer, query, key, stream.seen().ordinal)
        return attend(layer, query, key, value, scale)

    monkeypatch.setattr(stream, 'attend', watched)
    compared = 0
    for frame, stamp in zip(frames, STAMPS):
        if stream.step(frame, stamp) is None:
            continue
        kept = stream.carried.kept()
        assert stream.state_tokens <= budget
        for (layer, head), expected in definition.kept.items():
            assert sorted(kept[layer, head].tolist()) == [ordinal for ordinal, _ in expected], \
                f'step {stream.steps - 1}, layer {layer}, head {head}'
            compared += 1
    assert compared == 16 * layout.layers * layout.kv_heads


def test_streams_that_interleave_equal_streams_alone_bit_for_bit(backbone, frames):
    alone = [stream_of(backbone, f'statekv({budget})', frames[start:start + 10]) for start, budget in ((0, 20), (4, 30), (9, 25))]
    together = [VideoStream(backbone, f'statekv({budget})') for budget in (20, 30, 25)]
    for index in range(10):
        for stream, start in zip(together, (0, 4, 9)):
            stream.step(frames[start + index], STAMPS[index])
    for one, other in zip(alone, together):
        for a, b in zip(one.detailed.views(), other.detailed.views()):
            assert torch.equal(a.key, b.key) and torch.equal(a.value, b.value)
        assert one.answer(QUESTION, max_tokens=8) .token_ids == other.answer(QUESTION, max_tokens=8).token_ids
