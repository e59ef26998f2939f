"""Weights in few bits: quantised at load, or stored so in the checkpoint. What they change, what they take, what is refused."""
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForImageTextToText

from conftest import SECOND
from statekv_ros.backbones import load_backbone, stored_formats
from statekv_ros.backbones.checkpoint import read_config
from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.backbones.stored_formats import FORMATS
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.backbones.weights import WEIGHTS, language_matrices, planned_bytes, weight_parts
from statekv_ros.errors import ModelError, ParameterError, StateKVError, StoreMismatch
from statekv_ros.memory import VideoStream
from statekv_ros.memory.trial import try_out
from statekv_ros.node.memory_folder import identity_of
from statekv_ros.node.watches.kept import KeptWatches, answers_of
from statekv_ros.node.watches.table import WatchTable
from statekv_ros.node.watches.watch import Definition, Watch
from statekv_ros.patrol.heldout import ask_all
from statekv_ros.patrol.questions import answer_at
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.plan import main as plan
from statekv_ros.store import MemoryStore

needs_torchao = pytest.mark.skipif(find_spec('torchao') is None, reason='torchao is not installed: pip install .[weights]')
FEW_BITS = ('int8', 'int4')
IDS = [1, 7, 30, 9, 12, 40, 41, 8, 3, 25]


def loaded(model, weights='auto', dtype='float32'):
    return load_backbone(str(model), device='cpu', dtype=dtype, weights=weights)


@pytest.fixture(scope='module')
def patrol() -> dict:
    """The model that comes along by its weights, fp32 on the CPU; loaded when first asked for."""
    class Loaded(dict):
        def __missing__(self, weights):
            self[weights] = loaded('patrol', weights)
            return self[weights]
    return Loaded()


class Causal:
    """Ordinary attention, as an `AttentionMemory`."""

    def attend(self, layer, query, key, value, scale):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def logits(backbone) -> torch.Tensor:
    return backbone.logits(backbone.forward(backbone.embed(IDS, 0), Causal())).float()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def refusal(error: type[StateKVError], model, **options) -> str:
    with pytest.raises(error) as caught:
        load_backbone(str(model), **{'device': 'cpu', **options})
    return str(caught.value)


def config_only(tiny_model_dir, tmp_path, **quantization) -> Path:
    """A checkpoint that has no weights to load: whatever is said of it was said before."""
    config = json.loads((Path(tiny_model_dir) / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | ({'quantization_config': quantization} if quantization else {})))
    return tmp_path


# --- quantised at load

@needs_torchao
@pytest.mark.parametrize('weights, far', [('int8', .02), ('int4', .15)])
def test_logits_stay_close(patrol, weights, far):
    distance = apart(logits(patrol[weights]), logits(patrol['as_stored']))
    assert far / 10 < distance < far


@needs_torchao
@pytest.mark.parametrize('weights', FEW_BITS)
def test_the_model_computes_what_its_matrices_say(tmp_path, weights, tiny_model_dir):
    """The model with each matrix written out in full, as its product with the identity tells it, gives the same logits."""
    few, full = loaded(tiny_model_dir, weights), loaded(tiny_model_dir)
    assert apart(logits(few), logits(full)) > 1e-3
    with torch.inference_mode():
        wide = language_matrices(full.model)
        for name, matrix in language_matrices(few.model).items():
            written = matrix(torch.eye(matrix.in_features)) - (0 if matrix.bias is None else matrix.bias)
            wide[name].weight.copy_(written.T)
    assert apart(logits(few), logits(full)) < 1e-5


@needs_torchao
@pytest.mark.parametrize('weights', FEW_BITS)
def test_only_matrices_of_the_language_model_are_quantised(patrol, weights):
    few = {name for name, weight in patrol[weights].model.named_parameters() if is_traceable_wrapper_subclass(weight)}
    assert few == {f'{name}.weight' for name in language_matrices(patrol['as_stored'].model)} and len(few) == 5 * 7
    plain = dict(patrol['as_stored'].model.named_parameters())
    for name, weight in patrol[weights].model.named_parameters():
        if name not in few:
            assert torch.equal(weight, plain[name]), name


@needs_torchao
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('weights', ['as_stored', *FEW_BITS])
def test_planned_bytes_are_those_in_use(weights, dtype):
    backbone = loaded('patrol', weights, dtype)
    with torch.device('meta'):
        empty = AutoModelForImageTextToText.from_config(read_config('patrol'))
    planned = planned_bytes(empty, weights, backbone.dtype, backbone.device)
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for _, part in weight_parts(backbone.model)}
    assert backbone.size(64, 64).weights_bytes == planned == sum(storages.values())


@needs_torchao
@pytest.mark.parametrize('weights', FEW_BITS)
def test_short_patrols_are_answered_rightly(patrol, weights):
    right = []
    for seed in range(2):
        walk, asked = ask_all(16, np.random.default_rng(9100 + seed))
        stream = VideoStream(patrol[weights], 'statekv(72)')
        for index, (time_ns, frame) in enumerate(patrol_frames(walk, seed)):
            stream.step(frame, SECOND + time_ns)
            right += [stream.answer(question.text, max_tokens=8).text == answer_at(walk, question, step)
                      for question, step in filter(None, asked) if index == 2 * step + 1]
    assert len(right) > 12 and np.mean(right) > .8


@needs_torchao
@pytest.mark.parametrize('family', ['qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5'])
def test_every_family_runs_in_few_bits(tmp_path, family):
    folder = write_tiny_checkpoint(tmp_path / family, family=family, layers=1)
    for weights in FEW_BITS:
        backbone = loaded(folder, weights)
        assert len(language_matrices(backbone.model)) == 7
        try_out(backbone)


@needs_torchao
@pytest.mark.parametrize('later, text', [('auto', 'yes'), ('int8', ''), ('int4', '')])
def test_watches_compare_no_answer_with_one_of_other_weights(patrol, tmp_path, later, text):
    watch = Watch('1', Definition(question='is the door open?', camera='front', condition='changes', every_steps=1, every_s=0.0,
                                  debounce=1, expires_s=0.0, max_tokens=8, answer_policy='last(4)'), text='yes')
    tables, said = [WatchTable(['front'], 1), WatchTable(['front'], 1)], []
    before, after = (KeptWatches(tmp_path, answers_of(patrol[weights]), lambda work: work() or True, said.append)
                     for weights in ('as_stored', later))
    tables[0].put([watch])
    before.save(tables[0])
    after.restore(tables[1], [])
    assert [watch.text for watch in tables[1].all()] == [text]
    assert ['its weights in another format' in sentence for sentence in said] == ([] if text else [True])


@needs_torchao
def test_a_memory_says_that_it_was_made_with_other_weights(patrol, tmp_path):
    def identity(weights):
        return identity_of(patrol[weights], {'camera': VideoStream(patrol[weights], 'statekv(72)')}, '', '', 0)

    with MemoryStore.open(tmp_path / 'stored', identity('as_stored'), 10**8):
        assert identity('auto') == identity('as_stored')
    for weights in FEW_BITS:
        with pytest.raises(StoreMismatch, match=rf'another weights \(as_stored there, {weights} here\); it'):
            MemoryStore.open(tmp_path / 'stored', identity(weights), 10**8)
    with MemoryStore.open(tmp_path / 'int8', identity('int8'), 10**8):
        pass
    with pytest.raises(StoreMismatch, match=r'another weights \(int8 there, as_stored here\); it'):
        MemoryStore.open(tmp_path / 'int8', identity('auto'), 10**8)


@pytest.mark.parametrize('weights', ['int3', 'INT8', ''])
def test_unknown_weights_are_refused_with_what_there_is(weights):
    said = refusal(ParameterError, 'patrol', weights=weights)
    assert repr(weights) in said and ', '.join(WEIGHTS) in said


def test_without_the_library_its_extra_is_named_before_anything_is_loaded(tiny_model_dir, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'torchao']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'torchao', None)
    for weights in FEW_BITS:
        said = refusal(ParameterError, config_only(tiny_model_dir, tmp_path), weights=weights)
        assert "pip install 'statekv_ros[weights]'" in said and repr(weights) in said and 'safetensors' not in said


@needs_torchao
def test_a_layer_that_int4_does_not_fit_is_named(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / 'narrow', layers=2, hidden=80)
    said = refusal(ParameterError, folder, weights='int4')
    assert 'layers.0.' in said and '80 columns' in said and 'multiple of 32' in said and '"weights" to int8' in said
    try_out(loaded(folder, 'int8'))


def test_what_the_int4_kernels_want_of_rows_is_planned_with():
    model = torch.nn.ModuleDict({'language_model': torch.nn.ModuleDict({'layers': torch.nn.ModuleList([
        torch.nn.Linear(64, 20, bias=False)])})})
    with pytest.raises(ParameterError, match=r"'language_model.layers.0' has 20 rows, .* multiple of 16.*\"weights\" to int8"):
        planned_bytes(model, 'int4', torch.float32, torch.device('cpu'))
    assert planned_bytes(model, 'int4', torch.bfloat16, torch.device('cuda')) == 24 * (1024 // 2 + 1024 // 64 * 4)


@needs_torchao
def test_int4_in_a_dtype_that_the_gpu_kernel_lacks_is_refused():
    from statekv_ros.backbones.weights import require_quantiser
    with pytest.raises(ParameterError, match='got dtype float16: set the parameter "dtype" to bfloat16'):
        require_quantiser('int4', torch.device('cuda'), torch.float16)


@needs_torchao
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('weights', FEW_BITS)
def test_a_weight_that_is_not_finite_is_named_though_bits_cannot_say_so(tiny_model_dir, tmp_path, weights, value):
    folder = shutil.copytree(tiny_model_dir, tmp_path / 'broken')
    tensors = load_file(folder / 'model.safetensors')
    name = next(name for name in tensors if name.endswith('layers.1.mlp.up_proj.weight'))
    tensors[name].view(-1)[100] = value
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    assert 'layers.1.mlp.up_proj' in refusal(ModelError, folder, weights=weights)


def test_the_plan_knows_weights_of_a_model_that_is_not_there(capsys):
    rows, found = PUBLISHED['InternVL3-8B'].text, {}
    for weights in ('as_stored', *FEW_BITS):
        assert plan(['--model', 'InternVL3-8B', '--weights', weights, '--json']) == 0
        found[weights] = json.loads(capsys.readouterr().out.splitlines()[-1])['OpenGVLab/InternVL3-8B-hf']
    hidden, mlp, layers, kv = rows['hidden_size'], rows['intermediate_size'], rows['num_hidden_layers'], 4 * 128
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (mlp, hidden), (mlp, hidden), (hidden, mlp)]
    wide = layers * sum(2 * a * b for a, b in shapes)
    int8 = layers * sum(a * b + 5 * a for a, b in shapes)
    padded = {hidden: 4096, mlp: 19456}
    int4 = layers * sum(a * padded[b] // 2 + 4 * a * padded[b] // 128 for a, b in shapes)
    bytes_of = {weights: values['weights_bytes'] for weights, values in found.items()}
    assert bytes_of['as_stored'] - bytes_of['int8'] == wide - int8 and bytes_of['as_stored'] - bytes_of['int4'] == wide - int4
    assert found['int8']['workspace_bytes'] - found['as_stored']['workspace_bytes'] == 2 * hidden * mlp    # one made wide
    assert found['int4']['ms_per_token_at_least'] < found['int8']['ms_per_token_at_least'] < found['as_stored'][
        'ms_per_token_at_least']
    assert plan(['--model', 'InternVL3-8B', '--weights', 'int3']) == 2
    assert "'int3'" in capsys.readouterr().err


# --- stored in few bits

def stored_as(tiny_model_dir, folder: Path, quantization: dict, few) -> tuple[Path, Path]:
    """The tiny checkpoint with its language model's matrices as `few` stores them, and one with the same numbers in full.

    few: (name without '.weight', fp32 matrix) -> tensors to store, and the matrix that they stand for.
    """
    stored, full = (Path(shutil.copytree(tiny_model_dir, folder / name)) for name in ('stored', 'full'))
    written, wide = {}, {}
    for name, tensor in load_file(stored / 'model.safetensors').items():
        matrix = '.layers.' in name and name.endswith('proj.weight')
        new, wide[name] = few(name.removesuffix('.weight'), tensor.float()) if matrix else ({name: tensor}, tensor)
        written |= new
    save_file(wide, full / 'model.safetensors', metadata={'format': 'pt'})
    save_file(written, stored / 'model.safetensors', metadata={'format': 'pt'})
    config = json.loads((stored / 'config.json').read_text())
    (stored / 'config.json').write_text(json.dumps(config | {'quantization_config': quantization}))
    return stored, full


def assert_watches_as(stored: Path, full: Path) -> None:
    few, wide = loaded(stored), loaded(full)
    try_out(few)
    assert few.weights == 'as_stored' and few.dtype == torch.float32
    assert apart(logits(few), logits(wide)) < 1e-4
    assert few.fingerprint == loaded(stored).fingerprint


@pytest.mark.skipif(find_spec('accelerate') is None, reason='accelerate is not installed')
def test_fp8_in_blocks(tiny_model_dir, tmp_path):
    def few(name, matrix):
        blocks = matrix.view(matrix.shape[0] // 32, 32, matrix.shape[1] // 32, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        numbers = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        return ({f'{name}.weight': numbers.view(matrix.shape), f'{name}.weight_scale_inv': scale},
                (numbers.float() * scale[:, None, :, None]).reshape(matrix.shape))

    assert_watches_as(*stored_as(tiny_model_dir, tmp_path, {
        'quant_method': 'fp8', 'activation_scheme': 'dynamic', 'weight_block_size': [32, 32],
        'modules_to_not_convert': ['lm_head', 'model.visual']}, few))


@pytest.mark.skipif(find_spec('compressed_tensors') is None, reason='compressed-tensors is not installed')
@pytest.mark.parametrize('bits, kind, form', [(8, 'int', 'int-quantized'), (4, 'int', 'pack-quantized'),
                                              (8, 'float', 'float-quantized')])
def test_compressed_tensors(tiny_model_dir, tmp_path, bits, kind, form):
    def few(name, matrix):
        scale = matrix.abs().amax(1, keepdim=True) / (448 if kind == 'float' else 2 ** (bits - 1) - 1)
        numbers = (matrix / scale).to(torch.float8_e4m3fn) if kind == 'float' else (matrix / scale).round().to(torch.int8)
        stored = {f'{name}.weight': numbers}
        if form == 'pack-quantized':       # eight of four bits to an int32, the first in the lowest
            shifts = 4 * torch.arange(8, dtype=torch.int64)
            words = ((numbers.long() + 8).view(len(matrix), -1, 8) << shifts).sum(-1)
            stored = {f'{name}.weight_packed': words.to(torch.uint32).view(torch.int32),
                      f'{name}.weight_shape': torch.tensor(matrix.shape)}
        return {**stored, f'{name}.weight_scale': scale}, numbers.float() * scale

    group = {'targets': ['Linear'], 'format': form, 'weights': {'num_bits': bits, 'type': kind, 'symmetric': True,
                                                                'strategy': 'channel', 'dynamic': False}}
    assert_watches_as(*stored_as(tiny_model_dir, tmp_path, {
        'quant_method': 'compressed-tensors', 'format': form, 'quantization_status': 'compressed',
        'ignore': ['lm_head', 're:.*visual.*'], 'config_groups': {'group_0': group}}, few))


@needs_torchao
def test_what_torchao_wrote(tiny_model_dir, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig
    folder = shutil.copytree(tiny_model_dir, tmp_path / 'torchao')
    (folder / 'model.safetensors').unlink()
    AutoModelForImageTextToText.from_pretrained(tiny_model_dir, dtype=torch.float32, quantization_config=TorchAoConfig(
        Int8WeightOnlyConfig(), modules_to_not_convert=['model.visual', 'lm_head'])).save_pretrained(folder)
    stored, quantised = loaded(folder), loaded(tiny_model_dir, 'int8')
    try_out(stored)
    assert apart(logits(stored), logits(quantised)) < 1e-5
    assert stored.size(64, 64).weights_bytes == quantised.size(64, 64).weights_bytes
    assert stored.fingerprint == loaded(folder).fingerprint != quantised.fingerprint


@pytest.mark.skipif(find_spec('bitsandbytes') is None or find_spec('accelerate') is None,
                    reason='bitsandbytes and accelerate are not installed')
@pytest.mark.parametrize('bits', ['load_in_8bit', 'load_in_4bit'])
def test_what_bitsandbytes_wrote(tiny_model_dir, tmp_path, bits):
    from transformers import BitsAndBytesConfig
    folder = shutil.copytree(tiny_model_dir, tmp_path / 'few')
    (folder / 'model.safetensors').unlink()
    few = AutoModelForImageTextToText.from_pretrained(
        tiny_model_dir, dtype=torch.float32, device_map={'': 'cpu'}, quantization_config=BitsAndBytesConfig(
            **{bits: True}, bnb_4bit_quant_type='nf4', llm_int8_skip_modules=['model.visual', 'lm_head']))
    few.save_pretrained(folder)
    stored = loaded(folder)
    assert stored.fingerprint == loaded(folder).fingerprint
    try_out(stored)
    assert apart(logits(stored), logits(loaded(tiny_model_dir))) < (.1 if bits == 'load_in_8bit' else .5)
    assert stored.size(64, 64).weights_bytes < .7 * loaded(tiny_model_dir).size(64, 64).weights_bytes


@pytest.mark.parametrize('method', FORMATS)
def test_a_format_whose_package_is_missing_is_named_with_it_before_anything_is_loaded(tiny_model_dir, tmp_path, method, monkeypatch):
    monkeypatch.setattr(stored_formats, 'find_spec', lambda name: None)     # whatever is installed here
    missing = FORMATS[method].packages.values()
    said = refusal(ModelError, config_only(tiny_model_dir, tmp_path, quant_method=method))
    assert repr(method) in said and f'pip install {" ".join(missing)}' in said


@pytest.mark.parametrize('told', [{'quant_method': 'hqq'}, {'bits': 4}, {'quant_method': ['awq']}])
def test_a_format_that_does_not_load_is_refused_with_those_that_do(tiny_model_dir, tmp_path, told):
    said = refusal(ModelError, config_only(tiny_model_dir, tmp_path, **told))
    assert ', '.join(FORMATS) in said and 'quantization_config' in said


@pytest.mark.parametrize('method', FORMATS)
def test_weights_stored_in_few_bits_are_not_quantised_again(tiny_model_dir, tmp_path, method):
    said = refusal(ParameterError, config_only(tiny_model_dir, tmp_path, quant_method=method), weights='int8')
    assert repr(method) in said and 'set the parameter "weights" to as_stored' in said


@pytest.mark.parametrize('module', ['statekv_ros.backbones', 'statekv_ros.patrol.make'])
def test_what_torchao_says_of_itself_stays_out_of_the_log(module):
    pytest.importorskip('torchao', reason='torchao is not installed: pip install "statekv_ros[weights]"')
    code = (f"import {module}, torchao, logging; "
            "logging.getLogger('torchao').warning('int4 is slow here'); logging.getLogger('torch.utils._pytree').warning('other')")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and 'int4 is slow here' in lines[0] and 'other' in lines[1], done.stderr
