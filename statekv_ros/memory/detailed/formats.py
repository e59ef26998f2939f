"""How the pages of the detailed cache are stored: in the model's own dtype, or in 8 or 4 bits. A new format is one line below.

Asymmetric minimum-to-maximum numbers per channel over the tokens of one page (as KIVI has keys, arXiv 2402.02750), for keys
and values alike. Keys go in before RoPE, where a channel is alike from token to token, and without the bias of the key
projection, which in Qwen2's first and last layers is hundreds of times what it is added to.
"""
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.errors import ParameterError
from statekv_ros.kernels.paged_attention.pool import pack, unpack

_LARGEST = torch.finfo(torch.float16).max


class Stored(NamedTuple):
    """Keys, or values, of one page (or, with one dimension more, of pages of one length) as a format stores them.

    Attributes:
        codes: [layers, kv_heads, tokens, head_dim * bits / 8] uint8, or [..., tokens, head_dim] in the model's dtype.
        scale, zero: [layers, kv_heads, head_dim] fp16; None where the codes are the numbers themselves.
    """
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None


class Format(ABC):
    """How the keys and values of a page are stored.

    Attributes:
        name: value of the parameter `detailed_format`.
        bits: per number; None: those of the model's dtype.
        rotated: whether keys are stored as attention reads them, rather than before RoPE and without bias.
    """
    name: str
    bits: int | None
    rotated: bool

    @abstractmethod
    def check(self, head_dim: int) -> None:
        """Raises ParameterError where the format cannot hold such heads."""

    @abstractmethod
    def bytes_per_token(self, layout: KVLayout, page_tokens: int) -> float:
        """Bytes of a token's keys and values over all layers, with its share of what a page of `page_tokens` needs besides."""

    @abstractmethod
    def encode(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Stored, Stored]:
        """Keys and values [layers, kv_heads, tokens, head_dim] of ONE page, in any float dtype, as they are stored. Pages of
        one length may be given at once, [layers, kv_heads, pages, tokens, head_dim].

        Raises:
            ParameterError: the format cannot hold such heads.
        """

    @abstractmethod
    def decode(self, stored: Stored) -> torch.Tensor:
        """[layers, kv_heads, tokens, head_dim] in fp32, of what `encode` gave for keys or for values."""


class Raw(Format):
    """The numbers themselves."""
    bits, rotated = None, True

    def __init__(self, name: str):
        self.name = name

    def check(self, head_dim: int) -> None:
        """Every head dim fits."""

    def bytes_per_token(self, layout: KVLayout, page_tokens: int) -> float:
        return float(layout.bytes_per_token)

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Stored, Stored]:
        return Stored(key), Stored(value)

    def decode(self, stored: Stored) -> torch.Tensor:
        return stored.codes.float()


class Packed(Format):
    """Whole numbers of `bits`: x = code * scale + zero, off by half a scale at most. A number beyond fp16's 65,504 is cut."""
    rotated = False

    def __init__(self, name: str, bits: int):
        self.name, self.bits = name, bits

    def check(self, head_dim: int) -> None:
        per_byte = 8 // self.bits
        if head_dim <= 0 or head_dim % per_byte:
            raise ParameterError(f'detailed_format {self.name!r} puts {per_byte} channels into a byte, so head_dim must be a '
                                 f'positive multiple of {per_byte}, got {head_dim}: take {RAW.name!r}')

    def bytes_per_token(self, layout: KVLayout, page_tokens: int) -> float:
        self.check(layout.head_dim)
        if page_tokens <= 0:
            raise ParameterError(f'a page must hold a positive number of tokens, got {page_tokens}')
        numbers = 2 * layout.layers * layout.kv_heads * layout.head_dim
        return numbers * (self.bits / 8 + 2 * torch.float16.itemsize / page_tokens)

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Stored, Stored]:
        return self._encode(key), self._encode(value)

    def decode(self, stored: Stored) -> torch.Tensor:
        numbers = unpack(stored.codes, self.bits).float()
        return torch.addcmul(stored.zero.float().unsqueeze(-2), numbers, stored.scale.float().unsqueeze(-2))

    def _encode(self, numbers: torch.Tensor) -> Stored:
        self.check(numbers.shape[-1])
        levels = 2**self.bits - 1
        numbers = numbers.float().clamp(-_LARGEST, _LARGEST)
        least, greatest = numbers.aminmax(dim=-2)
        # Codes are for the scale and zero that are stored. Rounded outwards, these leave no number outside.
        zero = _at_most(least)
        scale = -_at_most((zero.float() - greatest) / levels)
        step = scale.float().unsqueeze(-2)
        # A channel that is the same all over the page has scale 0.
        codes = ((numbers - zero.float().unsqueeze(-2)) / step.masked_fill(step == 0, 1)).round_().clamp_(0, levels)
        return Stored(pack(codes.to(torch.uint8), self.bits), scale, zero)


RAW = Raw('bf16')
FORMATS = (RAW, Packed('int8', 8), Packed('int4', 4))


def find_format(name: str) -> Format:
    """The format of a name. Raises ParameterError."""
    for each in FORMATS:
        if each.name == name:
            return each
    raise ParameterError(f'detailed_format must be one of {", ".join(each.name for each in FORMATS)}, got {name!r}')


def _at_most(numbers: torch.Tensor) -> torch.Tensor:
    """fp32 to the nearest fp16 that is not greater; within fp16's range."""
    near = numbers.half()
    bits = near.view(torch.int16)
    # One step down: the bits of a positive number fall, those of a negative one grow, below 0 comes the first negative.
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, torch.full_like(bits, -2**15 + 1)))
    return torch.where(near.float() > numbers, below.view(torch.float16), near)
