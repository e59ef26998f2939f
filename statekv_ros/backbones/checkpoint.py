"""Load a checkpoint in Transformers' format: safetensors only, no remote code, and no missing weight goes unnoticed."""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from statekv_ros.errors import ModelError
from statekv_ros.share import find_share

_DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
EMBEDDED = 'patrol'          # the small checkpoint that the package brings along; './patrol' is a directory of yours
FRAME_PIXELS = 64 * 64, 448 * 448
_PIXEL_FILES = ('video_preprocessor_config.json', 'preprocessor_config.json')


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model in evaluation mode with its tokenizer.

    Attributes:
        name: directory or hub id it came from.
        stop_token_ids: from the generation config and the tokenizer.
        pixel_statistics: 'mean', 'std' and 'resample' as far as its preprocessor config states them.
    """
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    pixel_statistics: dict[str, Any]


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
    try:
        return AutoConfig.from_pretrained(_source(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f'cannot read the config of model {model!r}: {_first_line(error)}') from error


def load_checkpoint(model: str, device: str, dtype: str) -> Checkpoint:
    """Load weights and tokenizer of a directory or hub id onto a device.

    Args:
        device: 'auto' (CUDA when there is one), 'cpu', 'cuda' or 'cuda:<n>'.
        dtype: 'auto' (bfloat16 on CUDA, float32 on the CPU), 'float32', 'bfloat16' or 'float16'.

    Raises:
        ModelError: files missing or broken, tensors missing or of the wrong shape, an unknown device or dtype.
    """
    where = _device(device)
    precision = _dtype(dtype, where)
    source = _source(model)
    _check_weights(Path(source))
    try:
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            source, dtype=precision, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True)  # reported below, by name
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except torch.OutOfMemoryError as error:
        raise ModelError(f'model {model!r} does not fit into memory: take a smaller checkpoint') from error
    except Exception as error:  # the library raises many kinds; all of them mean that this checkpoint does not load
        raise ModelError(f'cannot load model {model!r}: {_first_line(error)}') from error
    _check_report(model, report)
    _check_vocabulary(model, loaded, tokenizer)
    try:
        loaded = loaded.eval().requires_grad_(False).to(where)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise ModelError(f'cannot move model {model!r} to {where}: {_first_line(error)}') from error
    return Checkpoint(model, loaded, tokenizer, _stop_tokens(loaded, tokenizer), _pixel_statistics(model, source))


def frame_pixels(model: str) -> tuple[int, int]:
    """Smallest and largest height x width of a frame that the checkpoint says it was made for, in its optional statekv.json;
    64 x 64 and 448 x 448 where it says nothing.

    Raises:
        ModelError: the file is there and cannot be used.
    """
    file = Path(_source(model)) / 'statekv.json'
    if not file.is_file():
        return FRAME_PIXELS
    try:
        advice = json.loads(file.read_text())
        return tuple(int(advice.get(f'{name}_frame_pixels', usual)) for name, usual in zip(('min', 'max'), FRAME_PIXELS))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f'{str(file)!r} is not {{"min_frame_pixels": ..., "max_frame_pixels": ...}}: '
                         f'{_first_line(error)}') from error


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
    except RuntimeError as error:
        raise ModelError(f'device must be auto, cpu, cuda or cuda:<n>, got {device!r}') from error
    if where.type == 'cuda' and not torch.cuda.is_available():
        raise ModelError(f'device {device!r} asks for CUDA, but torch {torch.__version__} sees no GPU: '
                         'set the parameter "device" to cpu')
    return where


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == 'auto':
        return torch.bfloat16 if device.type == 'cuda' else torch.float32
    if dtype not in _DTYPES:
        raise ModelError(f'dtype must be auto or one of {sorted(_DTYPES)}, got {dtype!r}')
    return _DTYPES[dtype]


def _check_weights(folder: Path) -> None:
    """Say which file is broken: the library's own message names none."""
    if not folder.is_dir():
        return
    files = sorted(folder.glob('*.safetensors'))
    if not files:
        others = [f.name for f in folder.glob('*.bin')]
        raise ModelError(f'{str(folder)!r} has no *.safetensors file' + (
            f' (only {", ".join(others)}, which could run code when loaded: convert it to safetensors)' if others else ''))
    for file in files:
        size = file.stat().st_size
        with file.open('rb') as stream:
            length = int.from_bytes(stream.read(8), 'little')
            header = stream.read(length) if 0 < length < size else b''
        try:
            tensors = json.loads(header)
            end = 8 + length + max(t['data_offsets'][1] for name, t in tensors.items() if name != '__metadata__')
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f'{str(file)!r} is not a whole safetensors file ({size} bytes): copy it again') from error
        if size < end:
            raise ModelError(f'{str(file)!r} is cut short: {size} of {end} bytes; copy it again')


def _check_report(model: str, report: dict) -> None:
    for key, what in (('missing_keys', 'lacks'), ('mismatched_keys', 'has the wrong shape for')):
        names = sorted(name if isinstance(name, str) else name[0] for name in report.get(key) or ())
        if names:
            raise ModelError(f'model {model!r} {what} {len(names)} tensor(s), first {names[0]!r}: '
                             'the checkpoint is incomplete or does not fit its config.json')


def _check_vocabulary(model: str, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = loaded.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f'model {model!r} has {rows} token embeddings, but its tokenizer has {len(tokenizer)} tokens: '
                         'they are not of one checkpoint')


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
        try:
            values, found = json.loads(Path(file).read_text()), {}
            for ours, theirs in (('mean', 'image_mean'), ('std', 'image_std')):
                if values.get(theirs) is not None:
                    red, green, blue = map(float, values[theirs])
                    found[ours] = red, green, blue
            if values.get('resample') is not None:
                found['resample'] = Image.Resampling(values['resample'])
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f'{name} of model {model!r} is not a preprocessor config: {_first_line(error)}') from error
        return found
    return {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
