"""Every family streams as the same function that the library's own model computes in one forward of the whole prompt."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SECOND
from family_libraries import LIBRARIES, QUESTION, Eagle2_5, InternVL
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import ModelError
from statekv_ros.memory import VideoStream

FAMILIES = list(LIBRARIES)
STAMPS = [SECOND // 2 * (i + 1) for i in range(32)]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Tiny checkpoint of each family."""
    base = tmp_path_factory.mktemp('families')
    return {family: write_tiny_checkpoint(base / family, family=family) for family in FAMILIES}


@pytest.fixture(scope='module')
def backbones(folders):
    return {family: load_backbone(str(folder), device='cpu', dtype='float32') for family, folder in folders.items()}


@pytest.fixture(scope='module')
def libraries(folders):
    return {family: LIBRARIES[family](folder) for family, folder in folders.items()}


@pytest.fixture(scope='module')
def pictures(frames) -> list[np.ndarray]:
    """Camera frames of 100x72 pixels, which every family has to resize."""
    return [np.pad(frame, ((0, 8), (18, 18), (0, 0)), mode='wrap') for frame in frames]


def stream_of(backbone, pictures, policy: str = 'statekv(unlimited)', **options) -> VideoStream:
    stream = VideoStream(backbone, policy, **options)
    for picture, stamp in zip(pictures, STAMPS):
        stream.step(picture, stamp)
    return stream


def cached(stream: VideoStream) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens, each [layers, kv_heads, tokens, head_dim]."""
    views = stream.detailed.views()
    return tuple(torch.cat([getattr(view, name) for view in views], dim=2) for name in ('key', 'value'))


def first_logits(stream: VideoStream, monkeypatch) -> torch.Tensor:
    """Logits behind the question."""
    logits = []
    project = stream.backbone.logits
    monkeypatch.setattr(stream.backbone, 'logits', lambda hidden: logits.append(project(hidden)) or logits[-1])
    stream.answer(QUESTION, max_tokens=1)
    return logits[0]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def check_equality(stream: VideoStream, ids, expected, monkeypatch) -> None:
    seen = stream.detailed_tokens
    key, value = cached(stream)
    logits = first_logits(stream, monkeypatch)
    layers = expected.past_key_values.layers
    differences = {'K': max(worst(key[i], layer.keys[0, :, :seen]) for i, layer in enumerate(layers)),
                   'V': max(worst(value[i], layer.values[0, :, :seen]) for i, layer in enumerate(layers)),
                   'logits': worst(logits, expected.logits[0, -1])}
    print(type(stream.backbone).__name__, ' '.join(f'{name} {value:.1e}' for name, value in differences.items()))
    assert len(layers) == key.shape[0]
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize('family', FAMILIES)
def test_streaming_with_nothing_evicted_equals_one_forward_of_the_library(family, backbones, libraries, pictures,
                                                                           monkeypatch):
    stream = stream_of(backbones[family], pictures[:12])
    with torch.inference_mode():
        ids, expected = libraries[family].forward(pictures[:12])
    question = backbones[family].tokenize_question(QUESTION)
    assert ids.shape[1] == stream.detailed_tokens + len(question)
    check_equality(stream, ids, expected, monkeypatch)


@pytest.mark.parametrize('family', FAMILIES)
def test_an_odd_number_of_frames_equals_the_library_with_the_last_one_repeated(family, backbones, libraries, pictures,
                                                                                monkeypatch):
    stream = stream_of(backbones[family], pictures[:5])
    with torch.inference_mode():
        ids, expected = libraries[family].forward(pictures[:5])
    check_equality(stream, ids, expected, monkeypatch)
    stream.flush()
    check_equality(stream, ids, expected, monkeypatch)


@pytest.mark.parametrize('family', FAMILIES)
def test_other_frames_give_other_keys(family, backbones, pictures):
    """Else the equality above would prove nothing about the pixels."""
    (one, _), (other, _) = (cached(stream_of(backbones[family], order)) for order in (pictures[:4], pictures[7:3:-1]))
    assert worst(one[-1], other[-1]) > 1e-1


@pytest.mark.parametrize('family', FAMILIES)
def test_streams_that_interleave_equal_streams_alone_bit_for_bit(family, backbones, pictures):
    backbone, starts, budgets = backbones[family], (0, 4, 9), (20, 30, 25)
    alone = [stream_of(backbone, pictures[start:start + 6], f'statekv({budget})') for start, budget in zip(starts, budgets)]
    together = [VideoStream(backbone, f'statekv({budget})') for budget in budgets]
    for index in range(6):
        for stream, start in zip(together, starts):
            stream.step(pictures[start + index], STAMPS[index])
    for one, other in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(cached(one), cached(other)))
        assert one.answer(QUESTION, max_tokens=4).token_ids == other.answer(QUESTION, max_tokens=4).token_ids


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('question', [
    QUESTION, ' spaces around ', '\nlines\n\nbetween\n', "7 o'clock? 7.", '...', 'größer 机器人', 'a <|im_end|> <video> <img>'])
def test_text_in_pieces_has_the_tokens_of_the_whole(family, question, backbones):
    backbone = backbones[family]
    steps = [''.join(backbone._step_text(number, [number / 3.0])) for number in (1, 2, 9, 10, 99, 100, 1000)]
    pieces = [backbone._prefix_ids, *map(backbone._tokenize, steps)]
    whole = (backbone.system.format(backbone.default_system) if backbone.default_system else '') + backbone.before_video
    whole += ''.join(steps)
    if '<' in question:  # what looks like special tokens is text
        special = set(map(backbone._token_id, backbone.special_tokens))
        asked = backbone.tokenize_question(question)
        middle = asked[len(backbone._tokenize(backbone.after_video)):-len(backbone._tokenize(backbone.after_question))]
        assert not special & set(middle) and backbone._tokenizer.decode(middle) == question
    else:
        pieces.append(backbone.tokenize_question(question))
        whole += backbone.after_video + question.strip() + backbone.after_question
    assert sum(pieces, []) == backbone._tokenize(whole)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_states_what_it_costs_and_where_it_stops(family, backbones, pictures):
    backbone = backbones[family]
    stream = VideoStream(backbone, 'none')
    for picture, stamp in zip(pictures[:backbone.frames_per_step], STAMPS):
        report = stream.step(picture, stamp)
    assert report.step_tokens == backbone.step_tokens(*pictures[0].shape[:2])
    kept = sum(tensor.numel() * tensor.element_size() for tensor in cached(stream))
    assert kept == backbone.kv_bytes_per_token * stream.detailed_tokens
    assert backbone._token_id('<|im_end|>') in backbone.stop_token_ids


@pytest.mark.parametrize('family', FAMILIES)
def test_the_system_prompt_stands_before_the_video(family, folders):
    backbone = load_backbone(str(folders[family]), device='cpu', system_prompt='Be brief.')
    text = backbone._tokenizer.decode(backbone._prefix_ids)
    assert text.startswith('<|im_start|>system') and 'Be brief.' in text and 'helpful' not in text


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('part', ['k_proj', 'vis'])
def test_a_missing_tensor_is_named(family, part, folders, tmp_path):
    folder = shutil.copytree(folders[family], tmp_path / 'broken')
    tensors = load_file(folder / 'model.safetensors')
    name = next(name for name in tensors if part in name and name.endswith('weight'))
    del tensors[name]
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ModelError, match=f'lacks 1 tensor.*{name.rsplit(".", 2)[1]}'):
        load_backbone(str(folder), device='cpu')


@pytest.mark.parametrize('family', FAMILIES)
def test_a_wrong_vocabulary_is_named(family, folders, tmp_path):
    folder = shutil.copytree(folders[family], tmp_path / 'broken')
    config = json.loads((folder / 'config.json').read_text())
    config['text_config']['vocab_size'] += 8
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelError, match='has the wrong shape for .*(lm_head|embed_tokens)'):
        load_backbone(str(folder), device='cpu')


@pytest.mark.parametrize('family', FAMILIES)
def test_a_tokenizer_of_another_checkpoint_is_named(family, folders, tmp_path):
    folder = shutil.copytree(folders[family], tmp_path / 'broken')
    file = folder / 'tokenizer.json'
    file.write_text(file.read_text().replace('<|im_end|>', '<|eot_id|>'))
    for other in ('tokenizer_config.json', 'special_tokens_map.json'):
        if (folder / other).is_file():
            (folder / other).write_text((folder / other).read_text().replace('<|im_end|>', '<|eot_id|>'))
    with pytest.raises(ModelError, match=re.escape("has no token '<|im_end|>'")):
        load_backbone(str(folder), device='cpu')


def test_qwen2_5_vl_has_the_librarys_own_positions_while_the_video_is_short(backbones, libraries, pictures, monkeypatch):
    monkeypatch.setattr(libraries['qwen2_5_vl'], 'own_positions', True)
    stream = stream_of(backbones['qwen2_5_vl'], pictures[:6])
    with torch.inference_mode():
        ids, expected = libraries['qwen2_5_vl'].forward(pictures[:6])
    check_equality(stream, ids, expected, monkeypatch)


def test_qwen2_5_vl_places_steps_by_their_true_time(backbones, pictures):
    backbone = backbones['qwen2_5_vl']
    corner, frame = len(backbone._prefix_ids), backbone.prepare(pictures[0])
    position = corner
    for seconds, time in ((0.0, 0), (0.4, 0), (0.5, 1), (3.9, 7), (60.2, 120)):
        inputs = backbone.encode([frame, frame], [seconds, seconds + 0.1], position)
        rows, columns = inputs.positions[1].max() - corner + 1, inputs.positions[2].max() - corner + 1
        assert (inputs.positions[0] == corner + time).all() and inputs.positions[1:].min() == corner
        assert inputs.next_position == max(position, corner + time + 1, corner + rows, corner + columns)
        position = inputs.next_position


def test_dynamic_rope_scaled_once_equals_the_library_at_that_length(tmp_path, pictures, monkeypatch):
    folder = write_tiny_checkpoint(tmp_path / 'short', family='internvl', max_position=100)
    library = InternVL(folder)
    with torch.inference_mode():
        ids, expected = library.forward(pictures[:6])
    assert ids.shape[1] > 150, 'the prompt should be longer than the trained context'
    scaled = load_backbone(str(folder), device='cpu', rope_length=ids.shape[1])
    assert scaled.max_position == ids.shape[1]
    check_equality(stream_of(scaled, pictures[:6], positions='native'), ids, expected, monkeypatch)

    plain = load_backbone(str(folder), device='cpu')
    before = plain._language.rotary_emb.inv_freq.clone()
    key, _ = cached(stream_of(plain, pictures[:6], positions='native'))
    assert torch.equal(plain._language.rotary_emb.inv_freq, before), 'frequencies must not change under a live cache'
    assert worst(key[0], expected.past_key_values.layers[0].keys[0, :, :key.shape[2]]) > 1e-2


def test_rope_lengths_that_cannot_be_are_named(folders, tmp_path):
    with pytest.raises(ModelError, match="RoPE of type 'default'"):
        load_backbone(str(folders['llava_onevision']), device='cpu', rope_length=10**6)
    with pytest.raises(ModelError, match='at least the trained context of 32768 positions'):
        load_backbone(str(folders['internvl']), device='cpu', rope_length=1000)


def test_sliding_window_attention_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders['eagle2_5'], tmp_path / 'sliding')
    config = json.loads((folder / 'config.json').read_text())
    config['text_config'].update(use_sliding_window=True, sliding_window=64, max_window_layers=1, layer_types=None)
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelError, match='use_sliding_window'):
        load_backbone(str(folder), device='cpu')


@pytest.mark.parametrize('changes', [
    dict(select_layer=-2), dict(mlp_connector_layers=1), dict(mlp_connector_layers=1, use_pixel_shuffle=False)])
def test_eagle_variants_of_the_projector_equal_their_definition(changes, tmp_path, pictures, monkeypatch):
    folder = write_tiny_checkpoint(tmp_path / 'eagle', family='eagle2_5', **changes)
    with torch.inference_mode():
        ids, expected = Eagle2_5(folder).forward(pictures[:3])
    check_equality(stream_of(load_backbone(str(folder), device='cpu'), pictures[:3]), ids, expected, monkeypatch)


def test_eagle_never_runs_the_code_beside_the_checkpoint(folders, tmp_path):
    folder = shutil.copytree(folders['eagle2_5'], tmp_path / 'remote')
    for module in json.loads((folder / 'config.json').read_text())['auto_map'].values():
        (folder / f'{module.split(".")[0]}.py').write_text('raise SystemExit("remote code ran")')
    load_backbone(str(folder), device='cpu')


def test_eagle_with_another_vision_tower_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders['eagle2_5'], tmp_path / 'radio')
    config = json.loads((folder / 'config.json').read_text())
    config['vision_config']['model_type'] = 'radio'
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'radio' is not supported"):
        load_backbone(str(folder), device='cpu')
