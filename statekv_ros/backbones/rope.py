"""RoPE: frequencies, fixed once per loaded model, for a live cache must not have its angles changed under it; and turning what
is rotated already."""
import copy

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from statekv_ros.errors import ModelError


def freeze_rope(language: PreTrainedModel, rope_length: int, name: str) -> int:
    """Fix the frequencies of a text model; returns the number of positions they are meant for.

    The library recomputes dynamic-NTK frequencies whenever a position passes the longest seen so far and resets them when
    positions start small again, which leaves the cached keys with other angles than the new queries. Here they are computed
    once, for `rope_length` positions (the trained context when 0, where dynamic NTK changes nothing).

    Args:
        rope_length: positions to scale a dynamic-NTK checkpoint for; 0 leaves it as trained.
        name: of the model, for errors.

    Raises:
        ModelError: `rope_length` is below the trained context or the checkpoint's RoPE is not dynamic-NTK.
    """
    trained = language.config.max_position_embeddings
    if rope_length:
        require_dynamic(language, name)
    if 0 < rope_length < trained:
        raise ModelError(f'rope_length must be 0 or at least the trained context of {trained} positions of model {name!r}, '
                         f'got {rope_length}')
    length = rope_length or trained
    if _kind(language) == 'dynamic':
        _freeze(language.rotary_emb, length)
    return length


def require_dynamic(language: PreTrainedModel, name: str) -> None:
    """Raises ModelError for a text model whose RoPE is not dynamic-NTK, so that it cannot be scaled."""
    if _kind(language) != 'dynamic':
        raise ModelError(f'rope_length scales checkpoints with dynamic-NTK RoPE, but model {name!r} has RoPE of type '
                         f'{_kind(language)!r}: leave rope_length at 0')


def rescaled(language: PreTrainedModel, length: int) -> PreTrainedModel:
    """A text model with frozen dynamic-NTK RoPE as one for `length` positions, itself left as it is: weights are shared."""
    other, rotary = copy.copy(language), copy.copy(language.rotary_emb)
    rotary._buffers, other._modules = dict(rotary._buffers), {**language._modules, 'rotary_emb': rotary}
    _freeze(rotary, length)
    return other


def _kind(language: PreTrainedModel) -> str:
    return language.config.rope_parameters['rope_type']


def _freeze(rotary: torch.nn.Module, length: int) -> None:
    frequencies, scale = ROPE_INIT_FUNCTIONS['dynamic'](rotary.config, rotary.inv_freq.device, seq_len=length)
    # Not under torch.inference_mode: an inference tensor could not be moved or copied later on.
    rotary.inv_freq = torch.nn.Buffer(frequencies.clone(), persistent=False)
    rotary.attention_scaling = scale
    rotary.rope_type = 'default'  # the one that the library leaves alone


def rotate(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn rotated keys or queries further, in fp32, returned in the dtype they came in. Angle 0 changes no bit.

    All families rotate dimension i together with dimension i + head_dim / 2 ("rotate_half" in the library). A RoPE's
    attention scaling, where it has one, is in the vectors already and stays as it is.

    Args:
        vectors: [..., head_dim].
        angles: [..., head_dim / 2] fp32 radians, of a shape that broadcasts with the vectors'.
    """
    cos, sin = angles.cos(), angles.sin()
    first, second = vectors.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(vectors.dtype)
