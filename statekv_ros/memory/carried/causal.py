"""Ordinary prefix-causal attention through torch's fused kernels, for policies that need no importance."""
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Query i of the last `queries` tokens sees every key up to its own.

    Args:
        query: [1, q_heads, queries, head_dim].
        key, value: [1, kv_heads, keys, head_dim], keys >= queries.

    Returns:
        [1, q_heads, queries, head_dim].
    """
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    if query.is_cuda:
        # The bias object lets torch choose its flash kernel, which reads grouped heads where they lie.
        return scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(queries, keys), scale=scale,
                                            enable_gqa=True)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_(keys - queries)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
