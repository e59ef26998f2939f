"""Every compiled variant of scored attention that a model's frame steps can need, run once on noise."""
from collections.abc import Iterable

import torch

from .streams import Stream, entries, new_table


def run_variants(q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, queries: Iterable[int],
                 state: int, several: bool = False) -> list[str]:
    """Launch both passes with one and with several splits of the keys: these are compiled apart, and which of them a step takes
    depends on its length, the state's and the chip.

    Args:
        queries: tokens of the steps that are known beforehand; each is run on an empty state and on a full one.
        state: tokens of a full state.
        several: launch for several streams at once, too.

    Returns:
        what was run, in words.

    Raises:
        Exception: a kernel cannot be compiled or launched; see `fitness.explain`.
    """
    from .triton import triton_scored_attention, triton_scored_streams
    ran, scale = [], head_dim ** -0.5
    for tokens in sorted(set(queries)):
        # As a model and a state hold them: neither contiguous nor of the same strides.
        query = torch.randn(1, tokens, q_heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
        for past in sorted({0, state}):
            keys = past + tokens
            room = torch.randn(2, kv_heads, -(-keys // 16) * 16, head_dim, dtype=dtype, device=device)
            key, value = (part[None, :, :keys] for part in room)
            importance = torch.empty(kv_heads, room.shape[2], dtype=torch.float32, device=device)[None, :, :keys]
            for splits in (1, 2):
                words = f'{tokens} tokens on a state of {past}, {"several splits" if splits > 1 else "one split"}'
                triton_scored_attention(query, key, value, scale, importance, splits=splits)
                ran.append(words)
                if several:
                    two = [part.expand(2, -1, -1, -1) for part in (query, key[:, :, past:], value[:, :, past:])]
                    streams = [Stream(*room[:, None], importance.new_empty(1, *room.shape[1:3]), past, slice(0, tokens))] * 2
                    table = new_table(streams)
                    triton_scored_streams(*two, streams, 0, scale, table.copy_(entries(streams, table)), splits=splits)
                    ran.append(f'{words}, of two streams')
    return ran
