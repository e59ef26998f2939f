"""Attention that gives its output alone, by every way of torch that works on a device: what attention with importance is
compared with."""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def output_only(tensors: Tensors) -> dict[str, Callable]:
    """Every way of torch to attend that works here on `tensors` (query [batch, q_heads, queries, head_dim], key and value
    [batch, kv_heads, keys, head_dim]) and on others of the same shapes, as functions of such tensors.

    'causal' is the same attention; the others also see the frame's later keys, queries / 2 more per query.
    """
    def attend(tensors: Tensors, backends: list[SDPBackend], mask=None) -> torch.Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)

    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    causal = causal_lower_right(tensors[0].shape[2], tensors[1].shape[2])
    kinds = {'causal': lambda tensors: attend(tensors, every, causal),
             'flash': lambda tensors: attend(tensors, [SDPBackend.FLASH_ATTENTION]),
             'cudnn': lambda tensors: attend(tensors, [SDPBackend.CUDNN_ATTENTION]),
             'efficient': lambda tensors: attend(tensors, [SDPBackend.EFFICIENT_ATTENTION]),
             'math': lambda tensors: attend(tensors, [SDPBackend.MATH])}
    working = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a backend says at length why it cannot
        for kind, function in kinds.items():
            try:
                function(tensors)
            except (RuntimeError, ValueError):
                continue
            working[kind] = function
    return working
