"""Load a checkpoint in Transformers' format: safetensors only, no remote code, and no missing weight goes unnoticed."""
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from statekv_ros.backbones.checks import (
    as_model_error, check_layers, check_numbers, check_report, check_vocabulary, check_weights)
from statekv_ros.backbones.fingerprint import fingerprint
from statekv_ros.backbones.stored_formats import FORMATS, loading_options, require_format, stored_format
from statekv_ros.backbones.weights import AS_STORED, quantise, require_quantiser, resolved
from statekv_ros.errors import ModelError, ParameterError
from statekv_ros.share import find_share

_DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
EMBEDDED = 'patrol'          # the small checkpoint that the package brings along; './patrol' is a directory of yours
FRAME_PIXELS = 64 * 64, 448 * 448
_ADVICE = '{"min_frame_pixels": ..., "max_frame_pixels": ..., "demonstration": "..."}'
_PIXEL_FILES = ('video_preprocessor_config.json', 'preprocessor_config.json')


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model in evaluation mode with its tokenizer.

    Attributes:
        name: directory or hub id it came from.
        demonstration: as in `Advice`.
        stop_token_ids: from the generation config and the tokenizer.
        pixel_statistics: 'mean', 'std' and 'resample' as far as its preprocessor config states them.
        fingerprint: of the weights as the checkpoint has them; empty where they are none that a memory could be kept of.
        weights: 'as_stored', or what they were quantised to.
    """
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    pixel_statistics: dict[str, Any]
    demonstration: str = ''
    fingerprint: str = ''
    weights: str = AS_STORED


class Advice(NamedTuple):
    """What a checkpoint says of itself in its optional statekv.json.

    Attributes:
        min_frame_pixels, max_frame_pixels: bounds on height x width of a frame that it was made for.
        demonstration: all that it knows, where it was made to try this package with, so that no robot acts on its answers;
            empty for any other model.
    """
    min_frame_pixels: int = FRAME_PIXELS[0]
    max_frame_pixels: int = FRAME_PIXELS[1]
    demonstration: str = ''


def read_config(model: str) -> transformers.PretrainedConfig:
    """The config of a local directory or hub id.

    Raises:
        ModelError: not there, or not readable.
    """
    if not model:
        raise ModelError('no model given: set the parameter "model" to a checkpoint directory, a hub id, or "patrol"')
    looks_local = model.startswith(('/', './', '../', '~')) or model.count('/') != 1
    path = Path(_source(model)).expanduser()
    if looks_local and not path.is_dir():
        raise ModelError(f'model directory {model!r} does not exist: give a directory in Transformers\' format '
                         '(config.json, *.safetensors, tokenizer) or a hub id such as "Qwen/Qwen3-VL-2B-Instruct"')
    if path.is_dir() and not (path / 'config.json').is_file():
        raise ModelError(f'{model!r} has no config.json: it is not a checkpoint in Transformers\' format')
    with as_model_error(f'cannot read config.json of model {model!r}'):
        return AutoConfig.from_pretrained(_source(model), trust_remote_code=False)


def load_checkpoint(model: str, device: str, dtype: str, weights: str = 'auto') -> Checkpoint:
    """Load weights and tokenizer of a directory or hub id onto a device.

    Args:
        device: 'auto' (CUDA when there is one), 'cpu', 'cuda' or 'cuda:<n>'.
        dtype: 'auto' (bfloat16 on CUDA, float32 on the CPU), 'float32', 'bfloat16' or 'float16'.
        weights: 'as_stored' or 'auto', which is the same; 'int8' or 'int4': the language model's are quantised.

    Raises:
        ModelError: files missing or broken, tensors missing, of the wrong shape or not finite, an unknown device or dtype, or
            weights in a format whose package is missing.
        ParameterError: `weights` that are unknown or cannot be had of this checkpoint.
    """
    where = _device(device)
    precision = _dtype(dtype, where)
    wanted = resolved(weights)
    source = _source(model)
    config = read_config(model)
    stored = _require_loadable(model, config, wanted, where, precision)
    tensors = check_weights(Path(source))
    if tensors:
        check_layers(model, config, tensors)
    with as_model_error(f'cannot load model {model!r} (config.json, *.safetensors)'), _quietly():
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            source, dtype=precision, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **loading_options(stored, where))
    check_report(model, report)
    with as_model_error(f'cannot load the tokenizer of model {model!r} (tokenizer.json, tokenizer_config.json)'):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer('a')      # some of what may be wrong with it shows in use only
    check_vocabulary(model, loaded, tokenizer)
    loaded = loaded.eval().requires_grad_(False)
    made_of = fingerprint(loaded)       # now: once quantised or used, weights are others
    if wanted != AS_STORED:
        with as_model_error(f'cannot quantise the weights of model {model!r} to {wanted}'):
            quantise(loaded, model, wanted, where)
    if not (stored and FORMATS[stored].placed):
        with as_model_error(f'cannot move model {model!r} to {where}'):
            loaded = loaded.to(where)
    check_numbers(model, loaded)        # what is not finite shows in a scale, where weights were quantised
    with as_model_error(f'cannot tell which tokens end an answer of model {model!r} (generation_config.json)'):
        stops = _stop_tokens(loaded, tokenizer)
    return Checkpoint(model, loaded, tokenizer, stops, _pixel_statistics(model, source), read_advice(model).demonstration, made_of,
                      wanted)


def _require_loadable(model: str, config: transformers.PretrainedConfig, weights: str, device: torch.device,
                      dtype: torch.dtype) -> str:
    """The format that the weights are stored in, '' for plain numbers; raises where a package is missing, before minutes are spent
    on reading weights."""
    stored = stored_format(model, config)
    if stored and weights != AS_STORED:
        raise ParameterError(f'weights {weights!r} cannot be made of model {model!r}, whose weights are stored in the format '
                             f'{stored!r} already: set the parameter "weights" to {AS_STORED}')
    if stored:
        require_format(model, stored, device)
    if weights != AS_STORED:
        require_quantiser(weights, device, dtype)
    return stored


def read_advice(model: str) -> Advice:
    """What the checkpoint says of itself in its optional statekv.json.

    Raises:
        ModelError: the file is there and cannot be used.
    """
    file = Path(_source(model)) / 'statekv.json'
    if not file.is_file():
        return Advice()
    with as_model_error(f'{str(file)!r} is not {_ADVICE}'):
        told = json.loads(file.read_text())
        advice = Advice(**{name: told[name] for name in Advice._fields if told.get(name) is not None})
        for name, value in advice._asdict().items():
            wanted = type(Advice._field_defaults[name])
            if type(value) is not wanted:
                raise ValueError(f'{name} must be of type {wanted.__name__}, got {value!r}')
    return advice


def checkpoint_folder(model: str) -> Path:
    """Where the files of a checkpoint (directory, hub id or 'patrol') lie on this machine. Raises OSError."""
    source = _source(model)
    return Path(source) if Path(source).is_dir() else Path(cached_file(source, 'config.json')).parent


def _source(model: str) -> str:
    if model == EMBEDDED:
        return str(find_share(f'models/{EMBEDDED}') or model)
    path = Path(model).expanduser()
    return str(path) if path.is_dir() else model


def _device(device: str) -> torch.device:
    if device == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ('cpu', 'cuda'):
        raise ModelError(f'device must be auto, cpu, cuda or cuda:<n>, got {device!r}: set the parameter "device"')
    if where.type == 'cuda' and not torch.cuda.is_available():
        raise ModelError(f'device {device!r} asks for CUDA, but torch {torch.__version__} sees no GPU: '
                         'set the parameter "device" to cpu')
    if where.type == 'cuda' and (where.index or 0) >= torch.cuda.device_count():
        raise ModelError(f'device {device!r} is not there, torch sees {torch.cuda.device_count()} GPU(s), cuda:0 first: set the '
                         'parameter "device" to one of them')
    return where


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == 'auto':
        return torch.bfloat16 if device.type == 'cuda' else torch.float32
    if dtype not in _DTYPES:
        raise ModelError(f'dtype must be auto or one of {sorted(_DTYPES)}, got {dtype!r}')
    return _DTYPES[dtype]


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    stops: set[int] = set()
    for ids in (getattr(getattr(model, 'generation_config', None), 'eos_token_id', None), tokenizer.eos_token_id):
        stops.update(ids if isinstance(ids, Sequence) else [ids])
    return frozenset(i for i in stops if i is not None)


def _pixel_statistics(model: str, source: str) -> dict[str, Any]:
    for name in _PIXEL_FILES:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)
        if file is None:
            continue
        with as_model_error(f'{name} of model {model!r} is not a preprocessor config'):
            values, found = json.loads(Path(file).read_text()), {}
            for ours, theirs in (('mean', 'image_mean'), ('std', 'image_std')):
                if values.get(theirs) is not None:
                    red, green, blue = map(float, values[theirs])
                    found[ours] = red, green, blue
            if values.get('resample') is not None:
                found['resample'] = Image.Resampling(values['resample'])
        return found
    return {}


@contextmanager
def _quietly() -> Iterator[None]:
    """The library's bar of weights would be a broken line in a log, and what `loading_options` says is said on purpose."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'You passed `quantization_config`')
            yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
