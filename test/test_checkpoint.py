"""Checkpoints that cannot watch video are refused with the reason, before the first frame."""
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.backbones.tiny.models import BUILDERS
from statekv_ros.errors import ModelError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.trial import try_out
from statekv_ros.tiny_model import FAMILIES, main

MUTATIONS = 48
# No large ones: what they cost, `test_a_config_with_far_too_many_layers...` is about.
VALUES = (0, -1, 1, 2, 3, 7, .5, None, '', 'x', 'nan', float('nan'), [], {}, [1, 2], True)


@pytest.fixture
def broken(tiny_model_dir, tmp_path) -> Path:
    """A copy of the tiny checkpoint to break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / 'broken'))


def refusal(model, **options) -> str:
    with pytest.raises(ModelError) as error:
        load_backbone(str(model), **{'device': 'cpu', **options})
    return str(error.value)


def test_the_script_writes_the_same_checkpoint_again(tiny_model_dir, tmp_path):
    again = write_tiny_checkpoint(tmp_path / 'again')
    assert (again / 'model.safetensors').read_bytes() == (Path(tiny_model_dir) / 'model.safetensors').read_bytes()


def test_the_script_offers_every_family():
    assert FAMILIES == tuple(sorted(BUILDERS))


@pytest.mark.parametrize('family', ['qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5'])
def test_the_script_writes_every_family(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['statekv-tiny-model', str(tmp_path / family), '--family', family, '--layers', '1'])
    assert main() == 0
    folder = capsys.readouterr().out.strip().splitlines()[-1]
    backbone = load_backbone(folder, device='cpu')
    assert backbone.layout.layers == 1
    try_out(backbone)


def test_pixels_follow_the_preprocessor_config(broken):
    (broken / 'preprocessor_config.json').write_text(json.dumps(
        {'image_mean': [.1, .2, .3], 'image_std': [.4, .5, .6], 'resample': 2}))
    pixels = load_backbone(str(broken), device='cpu')._pixels
    assert (pixels.mean, pixels.std, pixels.resample) == ((.1, .2, .3), (.4, .5, .6), 2)


@pytest.mark.parametrize('text', ['{ half', '[]', '{"image_mean": [0.5]}', '{"image_std": "none"}', '{"resample": 17}'])
def test_a_broken_preprocessor_config_is_named(text, broken):
    (broken / 'preprocessor_config.json').write_text(text)
    assert 'preprocessor_config.json' in refusal(broken)


def test_a_missing_directory_is_named(tmp_path):
    assert 'does not exist' in refusal(tmp_path / 'nowhere') and 'nowhere' in refusal(tmp_path / 'nowhere')
    assert 'parameter "model"' in refusal('')
    assert 'config.json' in refusal(tmp_path)


def test_half_a_safetensors_file_is_named(broken):
    file = broken / 'model.safetensors'
    data = file.read_bytes()
    for keep in (0, 4, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:keep])
        assert 'model.safetensors' in refusal(broken)


def test_pickled_weights_are_not_loaded(broken):
    (broken / 'model.safetensors').unlink()
    torch.save({}, broken / 'pytorch_model.bin')
    assert 'safetensors' in refusal(broken)


def test_a_missing_tensor_is_named(broken):
    tensors = load_file(broken / 'model.safetensors')
    name = next(n for n in tensors if 'q_proj' in n)
    del tensors[name]
    save_file(tensors, broken / 'model.safetensors', metadata={'format': 'pt'})
    assert 'q_proj' in refusal(broken)


def test_a_wrong_vocabulary_is_named(broken):
    config = json.loads((broken / 'config.json').read_text())
    config['text_config']['vocab_size'] += 8
    (broken / 'config.json').write_text(json.dumps(config))
    assert 'embed_tokens' in refusal(broken)


def test_a_model_without_video_support_is_named(broken):
    (broken / 'config.json').write_text(json.dumps({'model_type': 'bert'}))
    message = refusal(broken)
    assert "'bert'" in message and 'qwen3_vl' in message
    (broken / 'config.json').write_text(json.dumps({'model_type': 'no_such_model', 'auto_map': {'AutoConfig': 'evil.Config'}}))
    (broken / 'evil.py').write_text('raise SystemExit("remote code ran")')
    refusal(broken)
    (broken / 'config.json').write_text('{ half')
    assert 'config' in refusal(broken)


def test_bad_devices_and_dtypes_are_named(tiny_model_dir):
    assert "'abacus'" in refusal(tiny_model_dir, device='abacus')
    for device in ('meta', 'mps', 'cpu:x', ''):
        assert f'device must be auto, cpu, cuda or cuda:<n>, got {device!r}' in refusal(tiny_model_dir, device=device)
    assert "'int8'" in refusal(tiny_model_dir, dtype='int8')
    if not torch.cuda.is_available():
        assert 'sees no GPU' in refusal(tiny_model_dir, device='cuda')
    assert 'max_frame_pixels' in refusal(tiny_model_dir, max_frame_pixels=-1)


def test_a_gpu_that_is_not_there_is_named(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert "device 'cuda:7' is not there, torch sees 2 GPU(s)" in refusal(tiny_model_dir, device='cuda:7')


def change_config(folder: Path, part: str, **values) -> None:
    config = json.loads((folder / 'config.json').read_text())
    config[part].update(values)
    (folder / 'config.json').write_text(json.dumps(config))


def change_tensor(folder: Path, name: str, value: float) -> str:
    """One number of the first tensor whose name holds `name`; its whole name."""
    tensors = load_file(folder / 'model.safetensors')
    name = next(n for n in tensors if name in n)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    return name


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('tensor', ['visual.blocks.0', 'layers.1.mlp.down_proj', 'embed_tokens'])
def test_a_tensor_with_a_number_that_is_not_finite_is_named(tensor, value, broken):
    name = change_tensor(broken, tensor, value)
    assert name in (message := refusal(broken)) and 'not finite' in message and str(broken) in message


def test_weights_too_large_for_float16_are_refused_with_the_remedy(broken):
    change_tensor(broken, 'q_proj', 1e5)
    assert 'bfloat16 or float32' in refusal(broken, dtype='float16')
    load_backbone(str(broken), device='cpu', dtype='float32')


def test_a_deepstack_index_outside_of_the_tower_is_named(broken):
    change_config(broken, 'vision_config', deepstack_visual_indexes=[7])
    assert 'deepstack_visual_indexes [7]' in (message := refusal(broken)) and 'config.json' in message


@pytest.mark.timeout(60)
@pytest.mark.parametrize('part,field', [('text_config', 'num_hidden_layers'), ('vision_config', 'depth')])
def test_a_config_with_far_too_many_layers_is_refused_before_they_are_built(part, field, broken):
    change_config(broken, part, **{field: 10**9})
    assert f'{part}.{field} 1000000000' in (message := refusal(broken)) and 'config.json' in message


def test_what_a_checkpoint_says_of_itself_is_checked(broken):
    for text in ('{ half', '[]', '{"max_frame_pixels": "many"}', '{"min_frame_pixels": true}', '{"demonstration": 1}'):
        (broken / 'statekv.json').write_text(text)
        assert 'statekv.json' in refusal(broken) and str(broken) in refusal(broken)
    (broken / 'statekv.json').write_text('{"min_frame_pixels": 0, "max_frame_pixels": -5}')
    assert '-5' in refusal(broken) and 'statekv.json' in refusal(broken)
    (broken / 'statekv.json').write_text('{"demonstration": "red balls"}')
    assert load_backbone(str(broken), device='cpu').demonstration == 'red balls'


def test_what_loads_and_fails_at_its_first_frame_is_a_model_error(broken):
    change_config(broken, 'vision_config', num_heads=3)     # of a tower 32 wide
    with pytest.raises(ModelError, match='fails at its first frame') as error:
        try_out(load_backbone(str(broken), device='cpu'))
    assert str(broken) in str(error.value)


def test_what_loads_and_computes_no_finite_number_is_a_model_error_also_when_it_is_asked(broken, frames):
    change_config(broken, 'text_config', rms_norm_eps=float('nan'))
    backbone = load_backbone(str(broken), device='cpu')
    with pytest.raises(ModelError, match='not finite') as error:
        try_out(backbone)
    assert str(broken) in str(error.value)
    stream = VideoStream(backbone, 'statekv(20)')
    stream.step(frames[0], 1)
    with pytest.raises(ModelError, match='not finite'):
        stream.answer('what?')


def test_loading_draws_no_progress_bar_and_leaves_the_setting_as_it_was(tiny_model_dir, capfd):
    transformers.utils.logging.enable_progress_bar()
    load_backbone(tiny_model_dir, device='cpu')
    assert capfd.readouterr().err == ''
    assert transformers.utils.logging.is_progress_bar_enabled()


def leaves(tree, path=()):
    """Paths of all values of a JSON tree, those of objects and lists included."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*path, key))


def mutate(folder: Path, chance: random.Random) -> str:
    """Spoil one thing in a checkpoint: a value or a byte of a file, its end, or all of it. Says what."""
    file = folder / chance.choice(['config.json'] * 4 + ['tokenizer.json', 'tokenizer_config.json', 'model.safetensors'])
    way = chance.random()
    if way < .7 and file.suffix == '.json':
        tree = json.loads(file.read_text())
        path = chance.choice(list(leaves(tree)))
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        if chance.random() < .2:
            del inner[path[-1]]
        else:
            inner[path[-1]] = chance.choice(VALUES)
        file.write_text(json.dumps(tree))
        return f'{file.name}: {path} now {inner.get(path[-1]) if isinstance(inner, dict) else inner}'
    data = bytearray(file.read_bytes())
    place = chance.randrange(min(len(data), 5000))
    if way < .85:
        data[place] = chance.randrange(256)
        file.write_bytes(data)
        return f'{file.name}: byte {place} now {data[place]}'
    if way < .95:
        file.write_bytes(data[:place])
        return f'{file.name}: cut at {place}'
    file.unlink()
    return f'{file.name}: gone'


@pytest.mark.timeout(300)
@pytest.mark.parametrize('seed', range(MUTATIONS))
def test_a_mutated_checkpoint_answers_or_is_refused_by_its_name(seed, broken):
    what = mutate(broken, random.Random(seed))
    try:
        backbone = load_backbone(str(broken), device='cpu')
        try_out(backbone)
    except ModelError as error:
        assert str(broken) in str(error), f'{what}: {error}'
        return
    stream = VideoStream(backbone, 'statekv(20)')
    for stamp in range(1, 4):
        stream.step(np.random.default_rng(stamp).integers(0, 256, (96, 64, 3), dtype=np.uint8), stamp)
    assert stream.answer('what is in view?', max_tokens=2).answer_tokens, what


def test_bfloat16_runs(tiny_model_dir, frames):
    stream = VideoStream(load_backbone(tiny_model_dir, device='cpu', dtype='bfloat16'), 'statekv(20)')
    for index, frame in enumerate(frames[:8]):
        stream.step(frame, index + 1)
    assert stream.answer('what?', max_tokens=3).answer_tokens > 0
