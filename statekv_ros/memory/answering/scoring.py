"""Products of queries and index entries, as a CPU or a GPU does them fast."""
import torch

from statekv_ros.memory.detailed.leaves import LEAF
from statekv_ros.memory.detailed.table import ENTRY_DTYPE

# Numbers of the entries that a CPU makes fp32 at a time: they stay near it, and the room for them is used again and again.
_AT_A_TIME = 2**17


class Scoring:
    """Scores pages: how much each row wants each, with the logarithm of the page's length.

    Queries are [kv_heads, rows, entry_width] fp32, as an index makes them of rows, scores [kv_heads, rows, pages] fp32. A CPU
    multiplies halves slowly, so it scores a few pages at a time in fp32.
    """

    def __init__(self, kv_heads: int, width: int, device: torch.device):
        """width: numbers in an entry."""
        self._leaves = max(1, _AT_A_TIME // (kv_heads * width * LEAF))     # at a time
        self._halves = self._floats = None
        if device.type == 'cpu':
            shape = kv_heads * self._leaves, LEAF * width
            self._halves, self._floats = torch.empty(shape, dtype=ENTRY_DTYPE), torch.empty(shape)

    def pages(self, queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
        """Scores of pages side by side, in pieces.

        Args:
            entries: [kv_heads, pages, entry_width].
            sizes: logarithms of the pages' lengths, fp32, [kv_heads or 1, 1, pages or 1].
        """
        if self._floats is None:
            return [_scores(queries, entries, sizes)]
        pieces, count, step = [], entries.shape[1], self._leaves * LEAF
        for begin in range(0, count, step):
            piece = entries[:, begin:begin + step]
            floats = self._floats.view(-1, piece.shape[2])[:piece.shape[0] * piece.shape[1]].view(piece.shape).copy_(piece)
            pieces.append(_scores(queries, floats, sizes[..., begin:begin + step] if sizes.shape[-1] > 1 else sizes))
        return pieces

    def leaves(self, queries: torch.Tensor, entries: torch.Tensor, leaves: torch.Tensor,
               sizes: torch.Tensor) -> list[torch.Tensor]:
        """Scores of the pages of some leaves, in pieces.

        Args:
            entries: by leaf, [leaves of all KV heads, LEAF x entry_width].
            leaves: which of them, [kv_heads, n] int64.
            sizes: as of `pages`.
        """
        heads, width = len(leaves), queries.shape[-1]
        if self._floats is None:
            return [_scores(queries, entries.index_select(0, leaves.flatten()).view(heads, -1, width), sizes)]
        pieces = []
        for piece, of_piece in zip(leaves.split(self._leaves, dim=1), sizes.split(self._leaves * LEAF, dim=2)):
            halves, floats = self._halves[:piece.numel()], self._floats[:piece.numel()]
            torch.index_select(entries, 0, piece.flatten(), out=halves)
            pieces.append(_scores(queries, floats.copy_(halves).view(heads, -1, width), of_piece))
        return pieces


def _scores(queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    if entries.dtype == queries.dtype:
        return torch.baddbmm(sizes, queries, entries.transpose(1, 2))
    return torch.bmm(queries.to(entries.dtype), entries.transpose(1, 2)).float().add_(sizes)
