"""interim"""
from dataclasses import dataclass
import torch
@dataclass(frozen=True)
class Rope:
    frequencies: torch.Tensor
    stream_frequencies: torch.Tensor
    axes: torch.Tensor
    positions: torch.Tensor | None = None
    bias: torch.Tensor | None = None
def paged_attention(query, key, value, starts, lengths, scale, moves=None, noted=None, rope=None, entries=None, implementation=None):
    most = int(lengths.max())
    heads, pages = starts.shape
    offset = torch.arange(most, device=key.device)
    valid = offset < lengths[..., None]
    rows = (starts[..., None] + offset).clamp_max(key.shape[1]-1).reshape(heads, -1).long()
    valid = valid.reshape(heads, -1)
    at = rows[..., None].expand(-1, -1, key.shape[-1])
    k, v = key.gather(1, at).float(), value.gather(1, at).float()
    if moves is not None:
        angle = moves[..., None].expand(-1, -1, most).reshape(heads, -1)[..., None].float() * rope.stream_frequencies
        cos, sin = angle.cos(), angle.sin()
        a, b = k.chunk(2, -1)
        k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    scores = (query.float() * scale) @ k.transpose(1, 2)
    scores.masked_fill_(~valid[:, None], float('-inf'))
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse[..., None]).nan_to_num(0) @ v
    page_lse = None
    if noted is not None:
        s = scores.masked_fill(~noted[rows][:, None], float('-inf'))
        page_lse = s.reshape(heads, -1, pages, most).logsumexp(-1)
    return out, lse, page_lse
