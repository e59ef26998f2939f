"""The published checkpoints' shapes: the table against known totals, and a step of each at true widths, two layers deep."""
import os

import numpy as np
import pytest
import torch

from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.backbones.random_weights import random_backbone
from statekv_ros.memory import VideoStream
from statekv_ros.memory.detailed.cache import EXACT_STEPS, PAGE_TOKENS
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.detailed.sizes import step_bytes

# Billions of parameters as the hub pages state them; GB of keys and values per hour at 1 frame/s in bf16, from StateKV.
BILLIONS = {'Qwen3-VL-2B': 2.13, 'Qwen3-VL-4B': 4.44, 'Qwen3-VL-8B': 8.77, 'InternVL3-1B': 0.938, 'InternVL3-2B': 2.09,
            'InternVL3-8B': 7.94, 'LLaVA-OneVision-0.5B': 0.894, 'LLaVA-OneVision-7B': 8.03, 'Qwen2.5-VL-7B': 8.29}
GB_PER_HOUR = {'InternVL3-1B': 11, 'InternVL3-2B': 27, 'InternVL3-8B': 53}
FRAME = (128, 128)
STEPS = int(os.environ.get('STATEKV_TEST_STEPS', 2))      # in few bits; more of them show the same for longer
VISUAL_TOKENS = {'internvl': 256, 'llava_onevision': 196, 'eagle_2_5_vl': 256, 'qwen3_vl': 16, 'qwen2_5_vl': 25}  # of FRAME


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_step_runs_at_true_widths(name):
    row = PUBLISHED[name]
    # As published in bf16, where that is no matter of minutes on a processor that has none: each family but the widest has one.
    dtype = torch.bfloat16 if row.text['hidden_size'] * VISUAL_TOKENS[row.family] < 300_000 else torch.float32
    backbone = random_backbone(name, dtype=dtype, layers=2)
    layout = backbone.layout
    assert (layout.kv_heads, layout.head_dim) == (row.text['num_key_value_heads'], row.head_dim)
    assert layout.bytes_per_token * row.text['num_hidden_layers'] == row.kv_bytes_per_token(dtype.itemsize) * layout.layers
    assert backbone.max_position == row.text['max_position_embeddings']

    stream = VideoStream(backbone, 'statekv(64)')
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    report = [stream.step(frame, index + 1) for index in range(backbone.frames_per_step)][-1]
    views, (*_, record) = stream.detailed.views(), stream.detailed.records()
    assert record.visual_tokens == VISUAL_TOKENS[row.family]
    assert report.step_tokens == backbone.step_tokens(*FRAME)
    assert report.state_tokens == min(64, report.detailed_tokens)
    assert all(view.key.isfinite().all() and view.value.isfinite().all() for view in views)
    assert stream.answer('what?', max_tokens=1).answer_tokens == 1


@pytest.mark.parametrize('name', ['Qwen3-VL-2B', 'InternVL3-1B', 'LLaVA-OneVision-0.5B'])
def test_a_model_with_random_weights_has_the_checkpoints_parameters(name):
    """Tied tables once, where the checkpoint ties them; on the meta device, where they take no memory."""
    backbone = random_backbone(name, 'meta')
    assert backbone.size(448, 448).weights_bytes == 2 * PUBLISHED[name].parameters()


@pytest.mark.parametrize('name', BILLIONS)
def test_the_table_has_as_many_parameters_as_the_hub_says(name):
    assert PUBLISHED[name].parameters() / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)


@pytest.mark.parametrize('name', GB_PER_HOUR)
def test_the_table_gives_the_known_growth_of_the_detailed_cache(name):
    assert PUBLISHED[name].kv_bytes_per_token() * 259 * 3600 / 1e9 == pytest.approx(GB_PER_HOUR[name], abs=0.6)


@pytest.mark.parametrize('name', ['Qwen3-VL-2B', 'InternVL3-8B'])
def test_steps_of_true_shapes_take_the_bytes_that_are_planned_in_every_format(name, monkeypatch):
    backbone = random_backbone(name, dtype=torch.bfloat16 if name == 'Qwen3-VL-2B' else torch.float32, layers=1)
    see, seen = backbone._see, []
    monkeypatch.setattr(backbone, '_see', lambda step: seen[0] if seen else seen.append(see(step)) or seen[0])   # it looks once
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    for form in ('bf16', 'int8', 'int4'):
        stream = VideoStream(backbone, 'statekv(64)', detailed_format=form)
        for index in range((EXACT_STEPS + STEPS) * backbone.frames_per_step):
            stream.step(frame, index + 1)
        packed, pages = stream.detailed._packed, stream.detailed.pages
        pools = (stream.detailed._exact._pool,) if packed is None else (packed._codes, packed._scales)
        records = list(stream.detailed.records())
        steps = [step_bytes(backbone.layout, find_format(form), backbone.position_axes, record.tokens, PAGE_TOKENS)
                 for record in (records if packed is None else records[:-EXACT_STEPS])]
        assert len(records) == EXACT_STEPS + STEPS
        assert sum(pool.row_bytes * pool._live for pool in pools) == sum(step.rows for step in steps)
        assert pages.page_bytes * (pages.stop - pages.first) == len(records) * steps[0].index
