"""What may be wrong with a checkpoint's files, said as a ModelError that names them."""
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from statekv_ros.backbones.weights import weight_parts
from statekv_ros.errors import ModelError, StateKVError


@contextmanager
def as_model_error(what: str) -> Iterator[None]:
    """An error of any kind inside becomes `ModelError('<what>: <error>')`, for libraries raise many kinds where a checkpoint is
    broken. An error of this package passes as it is.
    """
    try:
        yield
    except StateKVError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f'{what}: memory is full; take a smaller checkpoint, or free memory') from error
    except Exception as error:
        # An OSError or ValueError speaks for itself; "KeyError: 'x'" needs its name.
        kind = '' if isinstance(error, (OSError, ValueError, RuntimeError)) else f'{type(error).__name__}: '
        said = ' '.join(str(error).split()) or type(error).__name__
        raise ModelError(what + ': ' + textwrap.shorten(kind + said, 300, placeholder=' ...')) from error


def check_weights(folder: Path) -> int:
    """How many tensors the safetensors files of a folder hold; 0 where it is none (a hub id).

    Raises:
        ModelError: names the file that is broken, as the library's own message does not.
    """
    if not folder.is_dir():
        return 0
    count = 0
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
            ends = [tensor['data_offsets'][1] for name, tensor in tensors.items() if name != '__metadata__']
            end = 8 + length + max(ends)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f'{str(file)!r} is not a whole safetensors file ({size} bytes): copy it again') from error
        if size < end:
            raise ModelError(f'{str(file)!r} is cut short: {size} of {end} bytes; copy it again')
        count += len(ends)
    return count


def check_layers(model: str, config: PretrainedConfig, tensors: int) -> None:
    """Raises ModelError when config.json wants more layers than there are `tensors`: the library would build them all before it
    looks at the weights, for minutes where a digit is wrong."""
    for part in ('text_config', 'vision_config'):
        for name in ('depth', 'num_hidden_layers'):     # of the vision tower they may be one
            layers = getattr(getattr(config, part, None), name, None)
            if isinstance(layers, int) and layers > tensors:
                raise ModelError(f'config.json of model {model!r} has {part}.{name} {layers}, but its *.safetensors have '
                                 f'{tensors} tensors: they are not of one checkpoint')


def check_numbers(model: str, loaded: PreTrainedModel) -> None:
    """Raises ModelError when a weight is NaN or infinite; names the tensor."""
    for name, weight in weight_parts(loaded):
        if weight.numel() and weight.is_floating_point():
            wide = weight if weight.itemsize > 1 else weight.to(torch.bfloat16)     # torch finds no extremes of 8 bits
            low, high = wide.aminmax()      # NaN goes through, and no copy is made
            if not (low.isfinite() and high.isfinite()):
                hint = ', or set the parameter "dtype" to bfloat16 or float32: float16 ends at 65504' \
                    if weight.dtype == torch.float16 else ''
                raise ModelError(f'model {model!r} has numbers that are not finite (NaN or infinite) in tensor {name!r}: copy '
                                 f'the checkpoint again{hint}')


def check_report(model: str, report: dict) -> None:
    """Raises ModelError for what `from_pretrained` reports as missing or of another shape; it would fill in random numbers."""
    for key, what in (('missing_keys', 'lacks'), ('mismatched_keys', 'has the wrong shape for')):
        names = sorted(name if isinstance(name, str) else name[0] for name in report.get(key) or ())
        if names:
            raise ModelError(f'model {model!r} {what} {len(names)} tensor(s), first {names[0]!r}: '
                             'the checkpoint is incomplete or does not fit its config.json')


def check_vocabulary(model: str, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError when the tokenizer writes tokens that the model has no embedding for."""
    rows = loaded.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f'model {model!r} has {rows} token embeddings, but its tokenizer has {len(tokenizer)} tokens: '
                         'they are not of one checkpoint')
