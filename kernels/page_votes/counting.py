"""Votes from scores: each row's softmax over all candidates, added up over the rows."""
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['TOPS', 'SUMS', 'rows', 'count', 'column', 'columns', 'splits'])
def votes_kernel(SCORES, TOPS, SUMS, VOTES, rows, count, column, columns, splits, TWICE: tl.constexpr,
                 ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr):
    """Votes [kv_heads, count] of the columns from `column` on; grid (candidate tiles, KV heads). TWICE: those without any score
    are candidates elsewhere, and get -1."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    at = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    exists = at < count
    votes, most = tl.zeros((KEYS,), tl.float32), tl.full((KEYS,), float('-inf'), tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        top, total = tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            where = (split[:, None] * heads + head) * rows + row[None, :]
            there = (split < splits)[:, None] & (row < rows)[None, :]
            tops = tl.load(TOPS + where, mask=there, other=-1e30)
            sums = tl.load(SUMS + where, mask=there, other=0.0)
            larger = tl.maximum(top, tl.max(tops, 0))
            total = total * tl.exp(top - larger) + tl.sum(sums * tl.exp(tops - larger[None, :]), 0)
            top = larger
        scores = tl.load(SCORES + (head * rows + row)[:, None] * columns + (column + at)[None, :],
                         mask=(row < rows)[:, None] & exists[None, :], other=float('-inf'))
        share = tl.exp(scores - top[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
        votes += tl.sum(share, 0)
        most = tl.maximum(most, tl.max(scores, 0))
    if TWICE:
        votes = tl.where(most == float('-inf'), -1.0, votes)
    tl.store(VOTES + head * count + at, votes, mask=exists)
