"""Weights of the language model in 8 or 4 bits: what may be asked for, how they are quantised at load, the bytes they take.

Quantised are the matrices of the text model's layers alone. Vision tower, projector, embeddings, head, norms and biases stay as
they are. A matrix [rows, columns] takes, by torchao's formats:
    int8: rows x columns bytes, and a row an fp32 scale and a zero point of a byte;
    int4: half a byte an element, and of each group of columns a scale and a zero point in the dtype that the model computes in. On
    a GPU the kernel wants columns a multiple of 1024 and rows of 8, and is given zeros for the rest.
"""
import math
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from statekv_ros.errors import ModelError, ParameterError

AS_STORED = 'as_stored'
WEIGHTS = ('auto', AS_STORED, 'int8', 'int4')
_GROUPS = (128, 64, 32)     # columns of int4 that share a scale: the largest that divides a layer's columns
_ROWS = 16                  # that the int4 kernel for the CPU takes at a time
_INSTALL = "pip install 'statekv_ros[weights]'"


def resolved(weights: str) -> str:
    """'as_stored', 'int8' or 'int4'. Raises ParameterError for anything else than `WEIGHTS`."""
    if weights not in WEIGHTS:
        raise ParameterError(f'weights must be one of {", ".join(WEIGHTS)}, got {weights!r}: set the parameter "weights"')
    return AS_STORED if weights == 'auto' else weights


def language_matrices(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """By name, what is quantised."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and 'language_model.' in name and '.layers.' in name}


def require_quantiser(weights: str, device: torch.device, dtype: torch.dtype) -> None:
    """Before anything is loaded.

    Raises:
        ParameterError: torchao is missing or too old, or its kernel for the device takes no such dtype.
    """
    try:
        _config(weights, device, _GROUPS[0])
    except ImportError as error:
        raise ParameterError(f'weights {weights!r} are quantised by torchao, which is not installed or too old ({error}): '
                             f'{_INSTALL}, or set the parameter "weights" to {AS_STORED}') from error
    if weights == 'int4' and device.type == 'cuda' and dtype != torch.bfloat16:
        raise ParameterError(f'weights "int4" are computed with in bfloat16 on a GPU, got dtype {_name(dtype)}: set the parameter '
                             '"dtype" to bfloat16, or "weights" to int8')


def quantise(model: torch.nn.Module, name: str, weights: str, device: torch.device) -> None:
    """Quantise the language model's matrices in place, one after another, each on `device`, where it stays: a GPU never holds
    more than one of them as it was.

    Args:
        name: of the model, for messages.

    Raises:
        ParameterError: a layer's shape does not fit.
    """
    from torchao.quantization import quantize_
    matrices = language_matrices(model)
    if not matrices:
        raise ModelError(f'model {name!r} has no language model whose weights could be {weights}: set the parameter "weights" to '
                         f'{AS_STORED}')
    groups = {layer: _group(layer, matrix, weights, device) for layer, matrix in matrices.items()}
    for layer, matrix in matrices.items():
        quantize_(matrix.to(device), _config(weights, device, groups[layer]))


def planned_bytes(model: torch.nn.Module, weights: str, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of a model's weights, tied ones once, as they lie on `device` in `dtype` once they are quantised; the model may be
    on the meta device and in any dtype.

    Raises:
        ParameterError: as `quantise`.
    """
    matrices = language_matrices(model)
    others = sum(weight.numel() for weight in model.parameters()) - sum(m.weight.numel() for m in matrices.values())
    return others * dtype.itemsize + planned_layer_bytes(model, weights, dtype, device)


def planned_layer_bytes(model: torch.nn.Module, weights: str, dtype: torch.dtype, device: torch.device) -> int:
    """The same of the language model's matrices alone."""
    return sum(_matrix_bytes(name, matrix, weights, dtype, device) for name, matrix in language_matrices(model).items())


def unpacked_bytes(model: torch.nn.Module, weights: str, dtype: torch.dtype) -> int:
    """Of the largest temporary that a product with quantised weights needs: int8 ones become a matrix in `dtype` for it."""
    return max((m.weight.numel() for m in language_matrices(model).values()), default=0) * dtype.itemsize \
        if weights == 'int8' else 0


def layer_bytes(model: torch.nn.Module) -> int:
    """Of the language model's layers without their norms, as they lie in memory."""
    return sum(part.nbytes for name, part in weight_parts(model)
               if 'language_model.' in name and '.layers.' in name and 'norm' not in name)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights as they lie in memory: parameters and what else the model saves, tied ones once, scales and zero points
    of those in few bits included."""
    return sum(part.nbytes for _, part in weight_parts(model))


def weight_parts(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and plain tensors of each weight: one for most, for a quantised one its numbers, scales and zero points."""
    seen: set[int] = set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if torch.is_tensor(weight) and id(weight) not in seen:
            seen.add(id(weight))
            for part in plain_parts(weight):
                yield name, part


def plain_parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a weight consists of: itself, or those that a quantised one keeps."""
    if not is_traceable_wrapper_subclass(weight):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(weight, name))


def _config(weights: str, device: torch.device, group: int):
    """torchao's, of the format that has a kernel for the device. Raises ImportError."""
    if weights == 'int8':
        from torchao.quantization import Int8WeightOnlyConfig
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == 'cuda':
        from torchao.quantization import Int4WeightOnlyConfig
        return Int4WeightOnlyConfig(group_size=group, int4_packing_format='tile_packed_to_4d', set_inductor_config=False)
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)


def _group(name: str, matrix: torch.nn.Linear, weights: str, device: torch.device) -> int:
    rows, columns = matrix.weight.shape
    group = next((group for group in _GROUPS if columns % group == 0), 0)
    if weights == 'int4' and not group:
        raise ParameterError(f'layer {name!r} has {columns} columns, which are no multiple of {_GROUPS[-1]}, as int4 weights have '
                             'to be: set the parameter "weights" to int8')
    if weights == 'int4' and device.type == 'cpu' and rows % _ROWS:
        raise ParameterError(f'layer {name!r} has {rows} rows, which are no multiple of {_ROWS}, as int4 weights on a CPU have to '
                             'be: set the parameter "weights" to int8')
    return group


def _matrix_bytes(name: str, matrix: torch.nn.Linear, weights: str, dtype: torch.dtype, device: torch.device) -> int:
    rows, columns = matrix.weight.shape
    if weights == AS_STORED:
        return rows * columns * dtype.itemsize
    if weights == 'int8':
        return rows * (columns + torch.float32.itemsize + torch.int8.itemsize)
    group = _group(name, matrix, weights, device)
    if device.type == 'cuda':
        rows, columns = 8 * math.ceil(rows / 8), 1024 * math.ceil(columns / 1024)
    return rows * (columns // 2 + columns // group * 2 * dtype.itemsize)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
