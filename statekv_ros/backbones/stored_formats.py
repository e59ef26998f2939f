"""Checkpoints whose weights are stored in few bits: the formats that load, and what each needs."""
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from transformers import CompressedTensorsConfig, PretrainedConfig

from statekv_ros.errors import ModelError


class StoredFormat(NamedTuple):
    """One `quant_method` of config.json.

    Attributes:
        packages: import name and what pip installs, in the order to name them.
        placed: whether its weights are put on their device as they are read, since they cannot be moved later.
        gpu: whether there is no way to run it on a CPU.
    """
    packages: dict[str, str]
    placed: bool = False
    gpu: bool = False


_ACCELERATE = {'accelerate': 'accelerate'}
FORMATS = {
    'fp8': StoredFormat(_ACCELERATE, placed=True),
    'fbgemm_fp8': StoredFormat({**_ACCELERATE, 'fbgemm_gpu': 'fbgemm-gpu'}, placed=True, gpu=True),
    'awq': StoredFormat({**_ACCELERATE, 'gptqmodel': 'gptqmodel'}, placed=True),
    'gptq': StoredFormat({**_ACCELERATE, 'optimum': 'optimum', 'gptqmodel': 'gptqmodel'}, placed=True),
    'compressed-tensors': StoredFormat({'compressed_tensors': 'compressed-tensors'}),
    'bitsandbytes': StoredFormat({**_ACCELERATE, 'bitsandbytes': 'bitsandbytes'}, placed=True),
    'torchao': StoredFormat({'torchao': "'statekv_ros[weights]'"}),
}


def stored_format(model: str, config: PretrainedConfig) -> str:
    """'' for weights stored as plain numbers, or the `quant_method` of `quantization_config` in config.json.

    Raises:
        ModelError: one that does not load here.
    """
    told = getattr(config, 'quantization_config', None) or getattr(config.get_text_config(), 'quantization_config', None)
    if not told:
        return ''
    method = told.get('quant_method') if isinstance(told, dict) else getattr(told, 'quant_method', None)
    method = str(getattr(method, 'value', method) or '')
    if method not in FORMATS:
        raise ModelError(f'the weights of model {model!r} are stored in the format {method!r} (quantization_config in '
                         f'config.json), which does not load here; formats that do: {", ".join(FORMATS)}')
    return method


def require_format(model: str, method: str, device: torch.device) -> None:
    """Before anything is loaded: raises ModelError where a package or a GPU that a stored format needs is missing."""
    form = FORMATS[method]
    missing = [package for name, package in form.packages.items() if find_spec(name) is None]
    if missing:
        raise ModelError(f'the weights of model {model!r} are stored in the format {method!r}, which needs a package that is not '
                         f'installed: pip install {" ".join(missing)}')
    if form.gpu and device.type != 'cuda':
        raise ModelError(f'the weights of model {model!r} are stored in the format {method!r}, which runs on a GPU alone: take '
                         'another checkpoint of the model')


def loading_options(method: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told besides for a stored format, '' for none."""
    if not method:
        return {}
    options: dict[str, Any] = {'device_map': {'': device}} if FORMATS[method].placed else {}
    if method == 'compressed-tensors':
        # Else its weights are unpacked when the whole model is first called, and here only parts of it ever are.
        options['quantization_config'] = CompressedTensorsConfig(dequantize=True)
    return options
