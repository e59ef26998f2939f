"""Checkpoints that cannot watch video are refused with the reason, before the first frame."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.backbones.tiny.models import BUILDERS
from statekv_ros.errors import ModelError
from statekv_ros.tiny_model import FAMILIES, main


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
    assert load_backbone(folder, device='cpu').layout.layers == 1


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
    assert "'int8'" in refusal(tiny_model_dir, dtype='int8')
    if not torch.cuda.is_available():
        assert 'sees no GPU' in refusal(tiny_model_dir, device='cuda')
    assert 'max_frame_pixels' in refusal(tiny_model_dir, max_frame_pixels=-1)


def test_bfloat16_runs(tiny_model_dir, frames):
    from statekv_ros.memory import VideoStream
    stream = VideoStream(load_backbone(tiny_model_dir, device='cpu', dtype='bfloat16'), 'statekv(20)')
    for index, frame in enumerate(frames[:8]):
        stream.step(frame, index + 1)
    assert stream.answer('what?', max_tokens=3).answer_tokens > 0
