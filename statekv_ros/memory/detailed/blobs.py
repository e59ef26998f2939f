"""Steps in few bits outside the device: for each layer, its pages one behind the other, each a contiguous run of bytes.

A page's run has the codes of its keys and of its values, [kv_heads, tokens, head_dim * bits / 8] each, and then scale and zero of
the keys and of the values, [kv_heads, head_dim] fp16 each: what one reading of one page in one layer needs, and nothing else.
"""
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed.formats import Stored

SCALES = 4     # of keys and values, scale and zero


class Encoded(NamedTuple):
    """Pages of one length of a step: their numbers in it, first tokens, tokens, and what the format makes of them."""
    pages: list[int]
    begins: list[int]
    length: int
    key: Stored
    value: Stored


def page_bytes(layout: KVLayout, bits: int, tokens: int) -> int:
    """Bytes of a page of `tokens` tokens in one layer."""
    return layout.kv_heads * layout.head_dim * (2 * tokens * bits // 8 + SCALES * torch.float16.itemsize)


def page_cuts(layout: KVLayout, bits: int, lengths: Sequence[int]) -> list[int]:
    """Where the pages of a step begin in the bytes of a layer, and, last, how many these are."""
    return [0, *accumulate(page_bytes(layout, bits, tokens) for tokens in lengths)]


def to_blob(layout: KVLayout, bits: int, lengths: Sequence[int], encoded: Sequence[Encoded]) -> torch.Tensor:
    """A step's pages of these lengths, [layers, bytes] uint8."""
    cuts = page_cuts(layout, bits, lengths)
    blob = encoded[0].key.codes.new_empty(layout.layers, cuts[-1])
    for part in encoded:
        # [layers, kv_heads, pages, ...] to [layers, pages, bytes]
        runs = [numbers.transpose(1, 2).flatten(2).view(torch.uint8) for numbers in (
            part.key.codes, part.value.codes, *part.key[1:], *part.value[1:])]
        for number, run in zip(part.pages, torch.cat(runs, dim=-1).unbind(1)):
            blob[:, cuts[number]:cuts[number + 1]] = run
    return blob


def from_blobs(layout: KVLayout, bits: int, tokens: int, blobs: torch.Tensor) -> tuple[Stored, Stored]:
    """Keys and values of pages of `tokens` tokens.

    Args:
        blobs: their runs of bytes, [..., bytes] uint8.

    Returns:
        codes [..., kv_heads, tokens, head_dim * bits / 8], scale and zero [..., kv_heads, head_dim], of keys and of values.
    """
    heads, width = layout.kv_heads, layout.head_dim * bits // 8
    codes, scales = blobs.split([2 * heads * tokens * width, SCALES * heads * layout.head_dim * torch.float16.itemsize], dim=-1)
    key, value = codes.unflatten(-1, (2, heads, tokens, width)).unbind(-4)
    numbers = scales.contiguous().view(torch.float16).unflatten(-1, (SCALES, heads, layout.head_dim)).unbind(-3)
    return Stored(key, *numbers[:2]), Stored(value, *numbers[2:])
