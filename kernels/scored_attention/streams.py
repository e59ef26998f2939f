"""Scored attention of several streams at once, a row of the batch for each; states differ in length and stay where they lie."""
from collections.abc import Sequence
from typing import NamedTuple

import torch

from statekv_ros.kernels.fitness import run
from statekv_ros.kernels.scored_attention import OPERATION

from .naive import naive_scored_attention

FIELDS = 8      # of a stream in a table


class Stream(NamedTuple):
    """One stream's state, with room for a frame behind it.

    Attributes:
        key, value: [layers, kv_heads, capacity, head_dim], contiguous.
        importance: [layers, kv_heads, capacity] fp32, contiguous.
        past: tokens of the state, from slot 0 on; the frame's keys and values are put behind them.
        columns: where the frame's tokens are in the stream's row of the batch; what is beside them is padding.
    """
    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    past: int
    columns: slice

    @property
    def queries(self) -> int:
        return self.columns.stop - self.columns.start

    @property
    def live(self) -> int:
        """Tokens of state and frame."""
        return self.past + self.queries


def scored_attention_of_streams(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, streams: Sequence[Stream],
                                layer: int, scale: float, table: torch.Tensor | None = None,
                                implementation: str | None = None) -> torch.Tensor:
    """As `scored_attention`, of one layer, for each stream by itself: its frame over [state ; frame].

    The frame's keys and values are written behind each state, and the importance of each of its keys into its `importance`.

    Args:
        query: [streams, q_heads, tokens, head_dim], as in `scored_attention`.
        key, value: of the frames, [streams, kv_heads, tokens, head_dim].
        table: of these streams, see `new_table`; 'triton' needs it.
        implementation: as in `scored_attention`.

    Returns:
        [streams, q_heads, tokens, head_dim], 0 where there is padding.

    Raises:
        ValueError: shapes do not fit each other, a table is missing, or the implementation is unknown or cannot run here.

    Example:
        >>> streams = [Stream(torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, 16), past, slice(0, 3))
        ...            for past in (0, 5)]
        >>> query, key = torch.randn(2, 4, 3, 32), torch.randn(2, 2, 3, 32)
        >>> scored_attention_of_streams(query, key, key, streams, 0, 1.0).shape
        torch.Size([2, 4, 3, 32])
        >>> [round(stream.importance[0, 0].sum().item()) for stream in streams]     # queries x group
        [6, 6]
    """
    _check(query, key, value, streams)

    def kernel() -> torch.Tensor:
        if table is None:
            raise ValueError("implementation 'triton' needs the table of the streams: see new_table")
        from .triton import triton_scored_streams
        return triton_scored_streams(query, key, value, streams, layer, scale, table)

    return run(OPERATION, implementation, query.device, kernel,
               lambda: naive_scored_streams(query, key, value, streams, layer, scale))


def naive_scored_streams(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, streams: Sequence[Stream], layer: int,
                         scale: float) -> torch.Tensor:
    """One stream after the other: the specification that the kernels must meet."""
    output = torch.zeros_like(query)
    for row, stream in enumerate(streams):
        frame, live = slice(stream.past, stream.live), slice(0, stream.live)
        stream.key[layer, :, frame] = key[row, :, stream.columns]
        stream.value[layer, :, frame] = value[row, :, stream.columns]
        output[row, None, :, stream.columns] = naive_scored_attention(
            query[row, None, :, stream.columns], stream.key[layer, None, :, live], stream.value[layer, None, :, live], scale,
            stream.importance[layer, None, :, live])
    return output


def new_table(streams: Sequence[Stream]) -> torch.Tensor:
    """Room for where so many streams lie, on their device, [layers, streams, FIELDS] int64; `entries` tell what belongs there."""
    key = streams[0].key
    return torch.empty(len(key), len(streams), FIELDS, dtype=torch.int64, device=key.device)


def entries(streams: Sequence[Stream], table: torch.Tensor) -> torch.Tensor:
    """What belongs into a table of these streams, on the host; good as long as none of it moves and lengths stay.

    Of each layer and stream: where keys and values begin, counted from the table itself in their elements; the address of the
    importances; elements from one head to the next (of keys and values, of importances); keys; the first of the queries, and how
    many there are.
    """
    def begins(part: torch.Tensor, layer: int) -> int:
        return part.data_ptr() + layer * part.stride(0) * part.itemsize

    return torch.tensor([[[
        (begins(stream.key, layer) - table.data_ptr()) // stream.key.itemsize,
        (begins(stream.value, layer) - table.data_ptr()) // stream.value.itemsize, begins(stream.importance, layer),
        stream.key.stride(1), stream.importance.stride(1), stream.live, stream.columns.start, stream.queries]
        for stream in streams] for layer in range(len(table))], dtype=torch.int64)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, streams: Sequence[Stream]) -> None:
    rows, q_heads, tokens, head_dim = query.shape
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (rows, tokens, head_dim) or q_heads % key.shape[1]:
        raise ValueError(f'query, key and value must be [streams, heads, tokens, head_dim] of the frames, with q_heads a '
                         f'multiple of kv_heads, got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}')
    if len(streams) != rows:
        raise ValueError(f'each row of the batch needs its stream, got {rows} rows and {len(streams)} streams')
    for number, stream in enumerate(streams):
        layers, kv_heads, capacity, _ = stream.key.shape
        if (kv_heads, stream.key.shape[3]) != (key.shape[1], head_dim) or stream.value.shape != stream.key.shape or \
                stream.importance.shape != (layers, kv_heads, capacity):
            raise ValueError(f'stream {number} must have key and value [layers, {key.shape[1]}, capacity, {head_dim}] and '
                             f'importance [layers, {key.shape[1]}, capacity], got {tuple(stream.key.shape)}, '
                             f'{tuple(stream.value.shape)} and {tuple(stream.importance.shape)}')
        if not (0 <= stream.columns.start < stream.columns.stop <= tokens and stream.live <= capacity):
            raise ValueError(f'stream {number} must have columns within {tokens} tokens and room for {stream.live} keys, got '
                             f'columns {stream.columns.start} to {stream.columns.stop} and room for {capacity}')
