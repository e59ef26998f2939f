"""Which model this is, from what it is made of and not from where it lies."""
import hashlib
import json

import torch
from transformers import PreTrainedModel

from statekv_ros.backbones.weights import plain_parts

_SAMPLES = 64       # of each weight
_PASSING = ('dtype', 'torch_dtype', 'transformers_version')


def fingerprint(model: PreTrainedModel) -> str:
    """Type and a hash of the config and of a sample of every weight: 'qwen3_vl 1f0a52c3d4e5f607'.

    Weights loaded in another dtype give the same, where rounding to bfloat16 does; any training changes it.
    """
    digest = hashlib.sha256(json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str).encode())
    samples = []
    for name, weight in model.state_dict().items():
        digest.update(f'{name} {tuple(weight.shape)}'.encode())
        for part in plain_parts(weight):
            flat = part.detach().reshape(-1)
            samples.append(flat[::max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16))
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())     # one transfer for all
    return f'{model.config.model_type} {digest.hexdigest()[:16]}'


def _lasting(value):
    """A config without what changes with the library or the way it was loaded."""
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if not str(key).startswith('_') and key not in _PASSING}
    return [_lasting(inner) for inner in value] if isinstance(value, (list, tuple)) else value
