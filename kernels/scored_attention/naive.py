"""Scored attention from its definition, in plain torch on any device: the specification that the fast kernels must meet."""
import torch


def naive_scored_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                           importance: torch.Tensor) -> torch.Tensor:
    """Prefix-causal attention; writes each key's importance into `importance`. Arguments as in `scored_attention`.

    One KV head at a time, so the largest temporary is [batch, group, queries, keys] in fp32.
    """
    q_heads, queries = query.shape[1:3]
    kv_heads, keys = key.shape[1], key.shape[2]
    past = keys - queries
    grouped = query.unflatten(1, (kv_heads, q_heads // kv_heads))
    out = torch.empty_like(query)
    grouped_out = out.unflatten(1, (kv_heads, q_heads // kv_heads))
    # Query i of the frame sees all of the past and frame keys 0..i.
    future = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu_(1)
    for head in range(kv_heads):
        k, v = key[:, head, None].float(), value[:, head, None].float()
        scores = (grouped[:, head].float() * scale) @ k.transpose(-1, -2)
        scores[..., past:].masked_fill_(future, float('-inf'))
        mass = torch.softmax(scores, dim=-1)
        grouped_out[:, head] = (mass @ v).to(query.dtype)
        importance[:, head] = mass.sum(dim=(1, 2))
    return out
