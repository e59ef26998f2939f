"""Pages in few bits, and what turns their keys: the arguments of paged attention that are more than one tensor."""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedPool:
    """Keys and values of one layer as small numbers: x = code * scale + zero, with a scale and a zero per page and channel.

    Keys are as they were before RoPE, without the bias of the model's key projection: both are given back when they are read.

    Attributes:
        key_codes, value_codes: [kv_heads, capacity, head_dim * bits / 8] uint8; with 4 bits, channel 2i is in the low half.
        key_scale, key_zero, value_scale, value_zero: [kv_heads, page_capacity, head_dim] fp16.
        bits: 4 or 8.
    """
    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_scale: torch.Tensor
    key_zero: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor
    bits: int


@dataclass(frozen=True)
class Rope:
    """The rotation of a model's keys. Dimension i turns with dimension i + head_dim / 2 ("rotate_half").

    Attributes:
        frequencies: [head_dim / 2] fp32, radians per position.
        stream_frequencies: the same where the axis advances along the stream, 0 on the axes that do not; what a move turns.
        axes: [head_dim / 2] integers: the axis whose position each frequency goes by. Packed pools only.
        positions: [axes, capacity] int32: where each row of the pool stands. Packed pools only.
        bias: [kv_heads, head_dim] fp32 of the key projection, or None. Packed pools only.
    """
    frequencies: torch.Tensor
    stream_frequencies: torch.Tensor
    axes: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., bytes] uint8 to [..., bytes * 8 / bits] uint8, one number each."""
    if bits == 8:
        return codes
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack`; 4 bits need an even number of channels."""
    if bits == 8:
        return numbers
    return numbers[..., 0::2] | numbers[..., 1::2] << 4
