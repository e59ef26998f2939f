"""Paged attention against its definition in float64: the naive twin, and the Triton kernels on a GPU or interpreted.

Triton decides when it is imported whether it interprets, so interpreted cases run in a process of their own.
"""
import itertools
import os
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from paged_definition import (CASES, DTYPES, HEAD_DIMS, KV_HEADS, LONGEST, PAGE_CAPACITY, Case, Errors, Inputs, assert_close, definition,
                              errors, inputs, measure, on, turned)
from statekv_ros.kernels.paged_attention import PackedPool, PoolPages, Span, masses, naive, paged_attention, span_and_pages


def test_the_cases_cover_every_value():
    for index, values in ((0, (1, 5, 17)), (1, LONGEST), (3, HEAD_DIMS), (4, DTYPES), (5, (16, 8, 4))):
        assert {case[index] for case in CASES} >= set(values)
    assert {case[4:6] for case in CASES} == set(itertools.product(DTYPES, (16, 8, 4)))


@pytest.mark.parametrize('case', CASES, ids=str)
def test_naive_twin_equals_the_definition(case):
    assert_close(measure(case, 'naive'), case.dtype)


@pytest.mark.parametrize('piece', [1, 3000, 20_000])
@pytest.mark.parametrize('case', [case for case in CASES if case.dtype == torch.float32][::4], ids=str)
def test_reading_in_pieces_changes_nothing(case, piece, monkeypatch):
    monkeypatch.setattr(naive, 'PIECE', piece)
    assert_close(measure(case, 'naive'), case.dtype)


def test_pages_that_no_kv_head_uses_are_not_gathered(monkeypatch):
    """Of several pools each has few of the pages that are chosen."""
    key, starts = torch.randn(2, 100, 16), torch.arange(0, 90, 3).repeat(2, 1).int()
    lengths = torch.zeros_like(starts)
    lengths[0, [4, 7, 20]], lengths[1, 29] = 3, 2
    gathered, gather = [], naive._gather
    monkeypatch.setattr(naive, '_gather', lambda key, value, pages, *rest: gathered.append(pages.starts.shape[1]) or gather(
        key, value, pages, *rest))
    output, lse, of_pages = paged_attention(query := torch.randn(2, 4, 16), key, key, starts, lengths, .25,
                                            noted=torch.ones(100, dtype=torch.bool))
    assert gathered == [3] and of_pages.shape == (2, 4, 30)
    assert torch.equal(of_pages.isfinite(), (lengths > 0)[:, None].expand(-1, 4, -1))
    scores = query[1] @ key[1, 87:89].T * .25
    assert torch.allclose(of_pages[1, :, 29], scores.logsumexp(-1)) and torch.allclose(lse[1], scores.logsumexp(-1))
    assert torch.allclose(output[1], scores.softmax(-1) @ key[1, 87:89], atol=1e-6)


def test_no_temporary_of_the_naive_twin_is_larger_than_its_bound(monkeypatch):
    monkeypatch.setattr(naive, 'PIECE', 2**14)
    sizes, multiply = [], torch.bmm

    def watched(first, second):
        product = multiply(first, second)
        sizes.append(max(tensor.numel() for tensor in (first, second, product)))
        return product
    monkeypatch.setattr(torch, 'bmm', watched)
    given = inputs(Case(17, 9, 20, 32, torch.float32, 16))
    query = given.query.repeat(1, 10, 1)
    paged_attention(*given._replace(query=query))
    assert len(sizes) > 2 and max(sizes) <= 2**14


def test_pages_and_another_part_are_put_together_by_their_log_sum_exp():
    given = inputs(Case(10, 9, 6, 64, torch.float32, 16, unused='none'))
    whole, whole_lse, _ = paged_attention(*given)
    parts = [paged_attention(*given._replace(starts=given.starts[:, cut], lengths=given.lengths[:, cut]))
             for cut in (slice(0, 4), slice(4, 10))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(sum(out * (part_lse - lse).exp()[..., None] for out, part_lse, _ in parts), whole)


def test_shares_of_all_pages_add_up_to_one_when_every_row_is_noted():
    given = inputs(Case(17, 33, 12, 64, torch.float32, 8, moved=True))
    _, lse, page_lse = paged_attention(*given._replace(noted=torch.ones_like(given.noted)))
    torch.testing.assert_close((page_lse - lse[..., None]).exp().sum(-1), torch.ones_like(lse))


@pytest.mark.parametrize('bits', [16, 8, 4])
def test_a_moved_page_is_read_as_a_page_whose_tokens_stand_there(bits):
    given = inputs(Case(5, 9, 6, 64, torch.float32, bits, moved=True, unused='none'))
    rope, moves = given.rope, given.moves
    moved = paged_attention(*given)
    if bits == 16:
        keys = given.key.clone()
        for head, page in itertools.product(range(KV_HEADS), range(5)):
            rows = slice(given.starts[head, page], given.starts[head, page] + 9)
            keys[head, rows] = turned(keys[head, rows], (moves[head, page] * rope.stream_frequencies).expand(9, -1))
        there = [paged_attention(*given._replace(key=keys, moves=None))] * KV_HEADS
    else:
        # Positions belong to rows, which the heads share: one call per head.
        there = []
        for head in range(KV_HEADS):
            positions = rope.positions.clone()
            for page in range(5):
                rows = slice(given.starts[head, page], given.starts[head, page] + 9)
                positions[:2, rows] += moves[head, page]    # the third axis does not advance
            there.append(paged_attention(*given._replace(rope=replace(rope, positions=positions), moves=None)))
    for index in range(3):
        for head in range(KV_HEADS):
            torch.testing.assert_close(moved[index][head], there[head][index][head], rtol=1e-4, atol=1e-5)


def test_a_page_of_hours_ago_that_is_read_from_close_by_loses_nothing():
    case = Case(5, 9, 6, 64, torch.float32, 8, moved=True, unused='none')
    given = inputs(case)
    advances = given.rope.positions.new_tensor([1, 1, 0])[:, None]
    far = given._replace(rope=replace(given.rope, positions=given.rope.positions + advances * 8_000_000),
                         moves=given.moves - 8_000_000)
    assert torch.equal(paged_attention(*far)[0], paged_attention(*given)[0])


class Whole(NamedTuple):
    """A span of `tokens`, of which the last `new` ask with `group` rows each, and room `behind` them; and pages of pools, `later`
    of which come later."""

    tokens: int
    new: int
    group: int
    head_dim: int
    dtype: torch.dtype
    bits: tuple[int, ...]
    later: int = 0
    behind: int = 5

    def __str__(self):
        return '-'.join(map(str, self)).replace('torch.', '')


WHOLES = [Whole(*each) for each in [
    (1, 1, 1, 32, torch.float32, ()), (130, 1, 7, 64, torch.float32, (16,)), (65, 5, 3, 80, torch.float32, (4, 16)),
    (20, 20, 2, 32, torch.float16, (8,)), (40, 1, 8, 32, torch.bfloat16, (4, 16)), (30, 2, 4, 32, torch.float32, (16, 8, 4), 2),
    (3, 1, 4, 32, torch.float32, (), 0, 300), (140, 9, 2, 64, torch.float32, (16,), 0, 0),
    (70, 1, 2, 32, torch.float32, (), 0, 0)]]


def whole_errors(case: Whole, implementation: str | None, device: str = 'cpu') -> Errors:
    """Relative error of the output; largest ones of the log-sum-exp, and of a share."""
    rows, random = case.group * case.new, torch.Generator().manual_seed(case.tokens)
    given = [inputs(Case(5 + 2 * number, 9, rows, case.head_dim, case.dtype, bits, number % 2 == 0, seed=number))
             for number, bits in enumerate(case.bits)]
    query = given[0].query if given else torch.randn(KV_HEADS, rows, case.head_dim, generator=random).to(case.dtype)
    room = torch.randn(2, KV_HEADS, case.tokens + case.behind, case.head_dim, generator=random).to(case.dtype)
    span, places = Span(*room[:, :, :case.tokens]), torch.arange(case.tokens - case.new, case.tokens)
    pools = [PoolPages(*(on(each, device)[at] for at in (1, 2, 3, 4, 6, 7, 8, 9))) for each in given]
    near, scale = len(pools) - case.later, case.head_dim ** -0.5
    given_span = Span(*room.to(device), places.to(device)) if case.behind or case.new > 1 else Span(*room.to(device))
    read = span_and_pages(query.to(device), given_span, pools[:near], scale, True, lambda: iter(pools[near:]), implementation)
    mass = [part.cpu() for part in masses(read.noted, read.lse, implementation)]
    assert (mass[0][:, case.tokens:] == 0).all(), 'nobody sees what lies behind'
    mass[0] = mass[0][:, :case.tokens]

    scores = query.double() @ span.key.double().transpose(1, 2) * scale
    hidden = torch.arange(case.tokens) - (case.tokens - case.new) > (torch.arange(rows) % case.new)[:, None]
    scores.masked_fill_(hidden, -torch.inf)
    parts = [(scores.softmax(-1) @ span.value.double(), scores.logsumexp(-1)),
             *(definition(each._replace(query=query))[:2] for each in given)]
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    output = sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in parts)
    right = [(scores - lse[..., None]).exp().sum(1)]
    for each in given:
        noted = definition(each._replace(query=query, noted=torch.zeros(9 * PAGE_CAPACITY, dtype=torch.bool)
                                         if each.noted is None else each.noted))[2]
        right.append((noted - lse[..., None]).exp().sum(1))
    return Errors(((read.output.cpu() - output).norm() / output.norm()).item(), (read.lse.cpu() - lse).abs().max().item(),
                  max((ours - theirs).abs().max().item() for ours, theirs in zip(mass, right, strict=True)))


@pytest.mark.parametrize('case', WHOLES, ids=str)
def test_a_span_and_pages_of_several_pools_are_read_as_one(case):
    assert_close(whole_errors(case, 'naive'), case.dtype)


@pytest.mark.parametrize('change, words', [
    ({'places': torch.arange(0)}, 'span must have the 0 tokens that ask'),
    ({'places': torch.arange(10)}, 'got 9 tokens and 4 rows'), ({'places': torch.arange(3)}, 'as many rows of each'),
    ({'places': torch.arange(2).int()}, 'places of span must be int64'),
    ({'value': None}, 'value must be .* got None'),
    ({'key': torch.zeros(KV_HEADS, 9, 32).half()}, 'key is torch.float16')])
def test_a_bad_span_is_named(change, words):
    span = Span(*torch.zeros(2, KV_HEADS, 9, 32), torch.tensor([7, 8]))
    with pytest.raises(ValueError, match=words):
        span_and_pages(torch.zeros(KV_HEADS, 4, 32), span._replace(**change), (), 1.0)


def test_an_answer_with_no_page_at_all_has_read_nothing():
    given = inputs(Case(5, 9, 6, 64, torch.float32, 16))
    output, lse, page_lse = paged_attention(*given._replace(starts=given.starts[:, :0], lengths=given.lengths[:, :0]))
    assert (output == 0).all() and (lse == -torch.inf).all() and page_lse.shape == (KV_HEADS, 6, 0)


def change(given: Inputs, name: str, new) -> Inputs:
    """`given` with one argument, or one field 'rope.axes' or 'key.bits', replaced by `new(old)`."""
    name, _, field = name.partition('.')
    old = getattr(given, name)
    return given._replace(**{name: replace(old, **{field: new(getattr(old, field))}) if field else new(old)})


@pytest.mark.parametrize('bits, name, new, words', [
    (16, 'query', lambda q: q[0], r'query must be .kv_heads, rows, head_dim.*got torch.float32 \(6, 64\)'),
    (16, 'query', lambda q: q.double(), 'query must be .* got torch.float64'),
    (16, 'query', lambda q: q[..., :63], 'head_dim must be even, for dimensions turn in pairs, got 63'),
    (16, 'key', lambda k: k[:1], r'key must be \[2, capacity, 64\] to go with query \(2, 6, 64\), got \(1, 360, 64\)'),
    (16, 'value', lambda v: None, r'value must be \[2, capacity, 64\] .* got None'),
    (16, 'value', lambda v: v[:, 1:], r'key and value must have the same shape, got \(2, 360, 64\) and \(2, 359, 64\)'),
    (16, 'value', lambda v: v.half(), 'value is torch.float16 on cpu rather than torch.float32 on cpu'),
    (16, 'starts', lambda s: s.long(), r'starts must be int32 \[2, pages\], got torch.int64 \(2, 5\)'),
    (16, 'starts', lambda s: s[0], r'starts must be int32 \[2, pages\], got torch.int32 \(5,\)'),
    (16, 'starts', lambda s: s + 400, 'within the 360 rows of the pool, got lengths from 9'),
    (16, 'starts', lambda s: s - 400, 'within the 360 rows of the pool, .* starts from -'),
    (16, 'lengths', lambda n: n[:, 1:], r'lengths must be int32 \(2, 5\) like starts, got torch.int32 \(2, 4\)'),
    (16, 'lengths', lambda n: -n, 'within the 360 rows of the pool, got lengths from -9'),
    (16, 'lengths', lambda n: n + 600, 'within the 360 rows of the pool, .* ends up to'),
    (16, 'scale', lambda s: 0.0, 'scale must be a positive number, got 0.0'),
    (16, 'moves', lambda m: m.float(), r'moves must be int32 \(2, 5\) like starts, got torch.float32'),
    (16, 'noted', lambda n: n[1:], r'noted must be bool \[360\], one per row of the pool, got torch.bool \(359,\)'),
    (16, 'rope', lambda r: None, 'rope must be given: moves turn the keys'),
    (8, 'rope', lambda r: None, 'rope must be given: a PackedPool has its keys before RoPE'),
    (8, 'entries', lambda e: None, 'entries must be given: they say which scale'),
    (8, 'entries', lambda e: e + 40, 'entries must be among the 40 scales of the pool, got'),
    (8, 'value', lambda v: torch.ones(1), 'value must be None with a PackedPool'),
    (8, 'key.bits', lambda b: 3, 'bits of a PackedPool must be 4 or 8, got 3'),
    (8, 'key.bits', lambda b: 4, r'key_codes of a PackedPool of 4 bits must be torch.uint8 \(2, 360, 32\)'),
    (8, 'key.value_zero', lambda z: z.float(), r'value_zero .* must be torch.float16 \(2, 40, 64\) .* got torch.float32'),
    (8, 'rope.frequencies', lambda f: f[1:], r'frequencies of rope must be float32 \[32\], got torch.float32 \(31,\)'),
    (8, 'rope.axes', lambda a: None, r'axes of rope must be integers \[32\], got None'),
    (8, 'rope.positions', lambda p: p[0], r'positions of rope must be int32 \[axes, 360\], one per row'),
    (8, 'rope.bias', lambda b: torch.ones(64), r'bias of rope must be float32 \[2, 64\], got torch.float32 \(64,\)'),
])
def test_bad_arguments_are_errors_that_name_them(bits, name, new, words):
    given = inputs(Case(5, 9, 6, 64, torch.float32, bits, moved=True, unused='none'))
    paged_attention(*given)
    with pytest.raises(ValueError, match=words):
        paged_attention(*change(given, name, new))


def test_an_unknown_implementation_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="implementation must be one of naive, triton, got 'cuda'"):
        paged_attention(*inputs(Case(5, 9, 6, 64, torch.float32, 16)), implementation='cuda')


TRITON_CASES = [case for case in CASES if case.bits == 16 or case.head_dim <= 128]


@pytest.mark.timeout(300)
@pytest.mark.parametrize('case', TRITON_CASES, ids=str)
def test_triton_equals_the_definition(case, run_triton):
    assert_close(run_triton(measure, case), case.dtype)


@pytest.mark.timeout(300)
@pytest.mark.parametrize('case', WHOLES, ids=str)
def test_a_span_and_pages_of_several_pools_are_read_as_one_in_triton(case, run_triton):
    assert_close(run_triton(whole_errors, case), case.dtype)


def measure_split(case: Case, implementation: str, device: str, splits: int, tile: tuple) -> Errors:
    from statekv_ros.kernels.paged_attention.configs import Tile
    from statekv_ros.kernels.paged_attention.triton import triton_paged_attention
    given = inputs(case)
    return errors(given, triton_paged_attention(*on(given, device), tile=Tile(*tile), splits=splits))


@pytest.mark.timeout(300)
@pytest.mark.parametrize('splits, tile, unused', [(2, (16, 16, 4, 1), 'some'), (5, (32, 64, 4, 1), 'head'),
                                                  (17, (16, 32, 8, 1), 'all'), (40, (64, 16, 4, 1), 'none')])
def test_splitting_the_pages_and_the_shape_of_tiles_change_nothing(splits, tile, unused, interpreter):
    case = Case(17, 33, 21, 64, torch.float32, 8, moved=True, unused=unused)
    assert_close(interpreter(measure_split, case, 'triton', 'cpu', splits, tile), case.dtype)


@pytest.mark.timeout(300)
def test_an_answer_with_no_page_at_all_has_read_nothing_in_triton(interpreter):
    output, lse, page_lse = interpreter(read_no_page)
    assert (output == 0).all() and (lse == -torch.inf).all() and page_lse.shape == (KV_HEADS, 6, 0)


def read_no_page():
    given = inputs(Case(5, 9, 6, 64, torch.float32, 16))
    return paged_attention(*given._replace(starts=given.starts[:, :0], lengths=given.lengths[:, :0]), implementation='triton')


def refusal(case: Case, name: str, new) -> str:
    with pytest.raises(ValueError) as refused:
        paged_attention(*change(inputs(case), name, REFUSED[new]), implementation='triton')
    return str(refused.value)


REFUSED = {'as it is': lambda old: old,
           'strided': lambda old: torch.zeros(*old.shape[:2], 2 * old.shape[2], dtype=old.dtype)[..., ::2]}


@pytest.mark.timeout(300)
@pytest.mark.parametrize('head_dim, bits, name, new, words', [
    (512, 16, 'query', 'as it is', 'takes head_dim up to 256 from a pool of 16 bits, got 512'),
    (256, 8, 'query', 'as it is', 'takes head_dim up to 128 from a pool of 8 bits, got 256'),
    (66, 4, 'query', 'as it is', 'a multiple of 4, so that both halves of a key are whole bytes, got 66'),
    (64, 16, 'key', 'strided', 'keys of the pool must be contiguous along head_dim (stride 1), got strides'),
    (64, 8, 'key.value_zero', 'strided', 'scales and zeros of a PackedPool must lie alike in memory'),
])
def test_triton_names_what_it_cannot_take(head_dim, bits, name, new, words, interpreter):
    assert words in interpreter(refusal, Case(5, 9, 6, head_dim, torch.float32, bits), name, new)


@pytest.mark.skipif('TRITON_INTERPRET' in os.environ, reason='TRITON_INTERPRET is set')
def test_triton_on_a_cpu_is_an_error_that_says_what_to_set():
    pytest.importorskip('triton')
    with pytest.raises(ValueError, match='needs tensors on a CUDA device, got cpu: .*TRITON_INTERPRET=1'):
        paged_attention(*inputs(Case(5, 9, 6, 64, torch.float32, 16)), implementation='triton')


def test_pages_are_split_only_while_processors_are_idle():
    from statekv_ros.kernels.paged_attention.configs import choose_splits
    assert choose_splits(programs=4, pages=128, processors=132) == 64
    assert choose_splits(programs=40, pages=128, processors=132) == 7
    assert choose_splits(programs=300, pages=128, processors=132) == 1
    assert choose_splits(programs=4, pages=1, processors=132) == 1
    assert choose_splits(programs=1, pages=0, processors=16) == 1
