"""Page votes and places: the naive twin against the definition in float64, and the Triton kernels against the naive twin. What is
compiled for CPUs: test_compiled_votes.py."""
import itertools
from typing import NamedTuple

import pytest
import torch

from statekv_ros.kernels.page_votes import Entries, Leaves, Line, Lines, PageColumns, page_places, page_votes
from statekv_ros.kernels.page_votes.naive import AtOnce

LEAF = 16
VOLUME = 64     # pages whose codes have the same steps
STRAYS = 9      # that have a line of their own, where some pages are in 4 bits


class Case(NamedTuple):
    """A call: pages in lines, some of them where each KV head has them elsewhere; leaves in each of `stretches`; entries of the
    first `coded` volumes are in 4 bits, strays among them as they are."""

    rows: int
    width: int
    heads: int = 2
    lines: tuple[int, ...] = (37,)
    stretches: tuple[int, ...] = ()
    opened: int = 3
    dtype: torch.dtype = torch.float16
    unwanted: bool = False
    coded: int = 0
    seed: int = 0

    def __str__(self):
        return '-'.join(map(str, self)).replace('torch.', '')


CASES = [Case(*each, seed=number) for number, each in enumerate([
    (1, 16), (7, 64, 1, (1,)), (8, 200, 2, (5, 130)), (4, 32, 2, (64, 1, 3), (), 3, torch.float16, True), (1, 32, 1, (), (9,)),
    (7, 64, 2, (33,), (20,)), (2, 256, 2, (5, 30), (20, 11), 7), (70, 32, 1, (2,), (40,), 12),
    (3, 512, 1, (20,), (5, 12), 4, torch.float32), (5, 48, 2, (), (140, 4), 3),
    (1, 64, 2, (20,), (9, 7), 4, torch.float16, False, 2), (9, 200, 1, (50, 3, 40), (30,), 12, torch.float16, False, 99),
    (40, 128, 2, (), (40, 3), 2, torch.float16, False, 3), (6, 32, 3, (17, 90, 60), (), 3, torch.float16, True, 2),
    (2, 96, 2, (20, 3), (9, 7), 4, torch.float16, False, 2), (16, 192, 1, (70,), (9,), 4, torch.float16, False, 1),
    (5, 120, 2, (9,)), (2, 32, 2, (20,), (90,), 70)])]


class Inputs(NamedTuple):
    queries: torch.Tensor
    entries: Entries
    lines: Lines
    leaves: Leaves | None


def inputs(case: Case) -> Inputs:
    """Lines lie behind the leaves' pages; what nobody scores is NaN, or, in 4 bits, some number or other."""
    random = torch.Generator().manual_seed(case.seed)
    groups = max(1, len(case.lines), len(case.stretches))
    queries = torch.randn(groups, case.heads, case.rows, case.width, generator=random) * case.width ** -.5
    # An unused leaf before each stretch and behind them all.
    leaves = sum(case.stretches) + len(case.stretches) + 1
    in_leaves, base = leaves * LEAF, 2 * VOLUME      # place of the first leaf
    capacity = VOLUME * -(-(in_leaves + sum(case.lines) + 12) // VOLUME)
    coded = min(case.coded * VOLUME, capacity)
    entries = torch.full((case.heads, capacity, case.width), torch.nan)
    pages = torch.stack([torch.randperm(in_leaves, generator=random) for _ in range(case.heads)]).int() + 40
    of_leaves = torch.full((case.heads, leaves, case.width), torch.nan)
    through, begin = [], 1
    for group, count in enumerate(case.stretches):
        through.append((group, slice(begin, begin + count)))
        of_leaves[:, begin:begin + count] = torch.randn(case.heads, count, case.width, generator=random)
        at = slice(begin * LEAF, (begin + count) * LEAF)
        entries[:, at] = torch.randn(case.heads, count * LEAF, case.width, generator=random)
        begin += count + 1
    lines, place = [], in_leaves
    for group, count in enumerate(case.lines):
        entries[:, place:place + count] = torch.randn(case.heads, count, case.width, generator=random)
        stop = place + count
        while place < stop:
            end = min(stop, (place // VOLUME + 1) * VOLUME) if place < coded else stop
            sizes = torch.rand(1, 1, end - place, generator=random)
            if case.unwanted and end - place > 1:
                sizes[..., ::2] = -torch.inf
            places = slice(base + place, base + end)
            if group % 2:
                places = torch.stack([torch.randperm(end - place, generator=random) for _ in range(case.heads)]) + base + place
                sizes = sizes.repeat(case.heads, 1, 1) + torch.rand(case.heads, 1, 1, generator=random)
            volume = (base + place) // VOLUME if place < coded else None
            if volume is not None and group % 2:    # behind the others, in each head as many as there are
                for head, own in enumerate(places):
                    own[len(own) - min(len(own), head + 2):] = ~(17 + torch.arange(min(len(own), head + 2)))
            lines.append(Line(group, places, sizes, volume, strays=volume is not None))
            place = end
        if coded and group == len(case.lines) - 1:
            places = ~(5 + torch.arange(STRAYS))[None]
            lines.append(Line(group, places, torch.rand(case.heads, 1, STRAYS, generator=random), strays=True))
    numbers = torch.randint(5000, 9000, (case.heads, sum(line.count for line in lines)), generator=random).int()
    pages = torch.where(torch.rand(pages.shape, generator=random) < .1, ~pages, pages)      # strays
    found = Leaves(of_leaves.to(case.dtype), pages.view(case.heads, leaves, LEAF), base, through, case.opened,
                   torch.tensor([[[3.0]]]), torch.rand(in_leaves, generator=random), 40) if through else None
    return Inputs(queries, in_bits(entries.to(case.dtype), base, coded, random), Lines(lines, numbers), found)


def in_bits(entries: torch.Tensor, base: int, coded: int, random: torch.Generator) -> Entries:
    """Entries [kv_heads, capacity, width] at places from `base` on, the first `coded` of them in 4 bits, beside those of their
    leaves."""
    if not coded:
        return Entries.plain(entries, -base)
    (heads, capacity, width), begin = entries.shape, max(0, coded - LEAF)
    exact = entries[:, begin:].clone()
    exact[:, :coded - begin] = torch.nan
    codes = torch.randint(256, (heads, capacity // VOLUME * VOLUME, -(-width // 2)), generator=random).to(torch.uint8)
    steps, scales = (torch.rand(heads, capacity // places, *size, generator=random) / 2
                     for places, size in ((VOLUME, [width]), (LEAF, [])))
    leaves = torch.randn(heads, capacity // LEAF + 1, width, generator=random).to(entries.dtype)
    strays = torch.randn(heads, 30, width, generator=random).to(entries.dtype)
    return Entries(exact, -base - begin, codes, steps, scales, base, base + coded, VOLUME, LEAF, leaves, base - LEAF, strays, 4)


def entry(entries: Entries, head: int, place: int) -> torch.Tensor:
    """What is meant by an entry, [width] float64."""
    at = place - entries.base
    if place < 0:
        return entries.strays[head, ~place - entries.first_stray].double()
    if place >= entries.stop:
        return entries.exact[head, place + entries.offset].double()
    step, pairs = entries.steps[head, at // entries.volume].double() * entries.scales[head, at // LEAF], entries.codes[head, at]
    codes = torch.stack([pairs % 16, pairs // 16], dim=-1).flatten()[:len(step)]
    return entries.leaves[head, (place - entries.first_leaf) // LEAF].double() + step * (codes - 7.5)


def definition(given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of pages and votes in float64, one KV head after the other; -1: a candidate elsewhere."""
    all_numbers, all_votes = [], []
    for head in range(given.queries.shape[1]):
        queries, scores = given.queries[:, head].double(), []
        for line in given.lines:
            places = line.places
            places = torch.arange(places.start, places.stop) if isinstance(places, slice) else places[head % len(places)]
            sizes = line.sizes[head if len(line.sizes) > 1 else 0]
            entries = torch.stack([entry(given.entries, head, place) for place in places.tolist()])
            scores.append(queries[line.group] @ entries.T + sizes)
        through = given.leaves.through if given.leaves else ()
        of_leaves = [queries[group] @ given.leaves.entries[head, part].double().T + given.leaves.size[0]
                     for group, part in through]
        shares = torch.cat([*scores, *of_leaves], -1).softmax(-1).sum(0)[sum(line.count for line in given.lines):]
        opened, numbers = [], []
        for (group, part), of_stretch, share in zip(through, of_leaves, shares.split([len(leaf.T) for leaf in of_leaves])):
            for leaf in share.topk(given.leaves.opened).indices.tolist():
                pages = given.leaves.pages[head, part.start + leaf]
                strays, pages = pages < 0, torch.where(pages < 0, ~pages, pages)
                begin = given.leaves.first_place + (part.start + leaf) * LEAF
                entries = torch.stack([entry(given.entries, head, place) for place in range(begin, begin + LEAF)])
                sizes = given.leaves.sizes[pages - given.leaves.first].masked_fill(strays, -torch.inf)
                opened.append(queries[group] @ entries.T + sizes)
                of_stretch[:, leaf] = -torch.inf
                numbers.append(pages)
        numbers.append(given.lines.numbers[head])
        every = torch.cat([*opened, *scores, *of_leaves], -1)
        votes = every.softmax(-1).sum(0)
        if through:
            votes = votes.masked_fill(every[0] == -torch.inf, -1)
        all_numbers.append(torch.cat(numbers))
        all_votes.append(votes[:len(all_numbers[-1])])
    return torch.stack(all_numbers), torch.stack(all_votes)


def off(case: Case, implementation: str, device: str = 'cpu') -> tuple[bool, float]:
    """Whether the candidates are those of the definition, and the largest error of a vote."""
    given = inputs(case)
    numbers, votes = page_votes(*on(given, device), implementation=implementation)
    right_numbers, right_votes = definition(given)
    numbers, votes = numbers.cpu().expand(len(votes), -1).long(), votes.cpu().double()
    order, right_order = numbers.argsort(dim=-1, stable=True), right_numbers.long().argsort(dim=-1, stable=True)
    same = torch.equal(numbers.gather(1, order), right_numbers.long().gather(1, right_order))
    if given.leaves is None:
        order = right_order = torch.arange(votes.shape[1]).expand_as(votes)
    return same, (votes.gather(1, order) - right_votes.gather(1, right_order)).abs().max().item() if same else float('nan')


def on(given: Inputs, device: str) -> Inputs:
    def move(part):
        if isinstance(part, torch.Tensor):
            return part.to(device)
        if isinstance(part, (Line, Leaves, Entries)):
            return type(part)(*map(move, part))
        return Lines([move(line) for line in part], move(part.numbers)) if isinstance(part, Lines) else part
    return Inputs(*map(move, given))


class Chosen(NamedTuple):
    """A call of `page_places`: `pages` there are, the first `below` of them not on the device, `packed` before all that are
    exact, `since` of them since an answer began; `chosen` of them."""

    pages: int
    chosen: int
    tokens: int
    below: int
    packed: int
    numbered: bool
    moved: bool
    unwanted: bool
    since: int = 0


CHOSEN = [Chosen(*each) for each in [
    (9, 1, 50, 0, 0, False, False, False), (40, 33, 120, 0, 0, True, True, False), (40, 7, 60, 0, 30, False, True, True),
    (90, 20, 99, 30, 80, True, False, False), (90, 90, 9999, 30, 30, False, True, False), (50, 9, 30, 50, 50, True, True, False),
    (50, 17, 80, 0, 50, False, False, True), (70, 11, 5, 9, 20, False, False, False),
    (40, 30, 300, 0, 33, False, True, False, 7), (30, 30, 999, 4, 30, True, True, False, 12),
    (900, 600, 2500, 90, 500, True, True, False, 300), (700, 520, 9999, 0, 400, False, False, True)]]


def places(case: Chosen, implementation: str, device: str = 'cpu') -> list:
    random, heads, first = torch.Generator().manual_seed(case.pages), 2, 100
    columns = torch.randint(1, 10, (5, case.pages + 6), generator=random).int()
    best = torch.stack([torch.randperm(case.pages, generator=random)[:case.chosen] for _ in range(heads)])
    numbers = None
    if case.numbered:
        numbers = torch.stack([torch.randperm(case.pages, generator=random) for _ in range(heads)]).int() + first
    table = PageColumns(columns.to(device), 4 - first, first + case.below, first + case.pages,
                        torch.tensor([first + case.packed], device=device), case.packed > case.below,
                        min(case.pages - case.packed + case.since, case.pages), first - 3,
                        torch.randint(-99, 99, (case.pages + 3,), generator=random).int().to(device) if case.moved else None,
                        (torch.rand(case.pages + 3, generator=random) < .3).to(device) if case.unwanted else None)
    numbers = numbers if numbers is None else numbers.to(device)
    votes = torch.rand(heads, case.chosen, generator=random)
    if case.numbered:       # some are candidates elsewhere, and of pages that there are not any more
        votes[:, 1::4] = -1
        numbers = numbers.scatter(1, best[:, 1::8].to(device), -1000)
    return page_places(best.to(device), votes.to(device), numbers, first, table, case.tokens, implementation)


def equals_naive(case: Chosen, implementation: str, device: str) -> bool:
    found, right = places(case, implementation, device), places(case, 'naive')
    for one, other in itertools.zip_longest(found, right):
        used = other.lengths > 0
        for name, part, expected in zip(other._fields, one, other):
            if not isinstance(expected, torch.Tensor):
                assert part is expected if expected is None else part == expected, name
            elif name == 'lengths' or not (other.far and name in ('starts', 'slots')):
                where = torch.ones_like(used) if name in ('lengths', 'pages') else used
                assert part.dtype == expected.dtype and torch.equal(part.cpu()[where], expected[where]), name
    return True


@pytest.mark.parametrize('case', CASES, ids=str)
def test_votes_equal_the_definition(case):
    same, error = off(case, 'naive')
    assert same and error < 1e-2 * case.rows


@pytest.mark.parametrize('case', CASES, ids=str)
def test_votes_are_the_same_in_one_piece_as_a_gpu_without_triton_has_them(case):
    given = inputs(case)
    numbers, votes = page_votes(*given, implementation='naive')
    same, at_once = page_votes(*given, AtOnce(LEAF if given.leaves else 1), implementation='naive')
    assert torch.equal(numbers, same) and torch.allclose(votes, at_once, atol=1e-2 * case.rows)


@pytest.mark.parametrize('case', CHOSEN, ids=str)
def test_places_hold_no_more_than_the_tokens_and_each_page_once(case):
    found = places(case, 'naive')
    lengths = torch.stack([part.lengths.sum(-1) for part in found]).sum(0)
    assert (lengths <= case.tokens).all()
    for part in found:
        assert len(part.pages) == 2 and (part.slots is not None) <= (case.packed > 0)
        for pages, of_pages in zip(part.pages, part.lengths):
            read = pages[of_pages > 0].tolist()
            assert len(read) == len(set(read))
            assert all(page < 100 + case.below if part.far else page >= 100 + case.below for page in read)
            assert part.far or all((page < 100 + case.packed) == (part.slots is not None) for page in read)


@pytest.mark.timeout(300)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_votes_of_triton_equal_the_definition(case, run_triton):
    same, error = run_triton(off, case)
    assert same and error < 1e-4 * case.rows


@pytest.mark.timeout(300)
@pytest.mark.parametrize('case', CHOSEN, ids=str)
def test_places_of_triton_equal_those_of_the_naive_twin(case, run_triton):
    assert run_triton(equals_naive, case)


@pytest.mark.parametrize('change, words', [
    (lambda given: given._replace(queries=given.queries.half()), 'queries must be float32 .groups, kv_heads, rows, width.'),
    (lambda given: given._replace(entries=given.entries._replace(exact=given.entries.exact[:1])),
     r'entries must be float16 or float32 \[2, capacity, 64\]'),
    (lambda given: given._replace(entries=given.entries._replace(codes=given.entries.codes.char())),
     r'codes must be uint8 \[2, capacity, 32\]'),
    (lambda given: given._replace(entries=given.entries._replace(strays=given.entries.strays.double())),
     'entries of strays must be float16 .2, capacity, 64'),
    (lambda given: given._replace(leaves=given.leaves._replace(entries=given.leaves.entries[..., :8])),
     'entries of leaves must be'),
    (lambda given: given._replace(lines=Lines([], None), leaves=None), 'there is no candidate'),
])
def test_bad_arguments_are_errors_that_name_them(change, words):
    with pytest.raises(ValueError, match=words):
        page_votes(*change(inputs(CASES[5])))


def test_best_pages_of_another_kind_are_named():
    table = PageColumns(torch.zeros(3, 9).int(), 0, 0, 9, torch.tensor([0]), False, 0, 0, None, None)
    with pytest.raises(ValueError, match='best must be int64'):
        page_places(torch.zeros(2, 3).int(), torch.zeros(2, 3), None, 0, table, 9)


def constants(counts: tuple[int, int], implementation: str, device: str) -> set[str]:
    """Of each kernel launched, what the compiler is given as constants, where so many leaves are opened and pages chosen."""
    from statekv_ros.kernels.page_votes import triton
    (opened, chosen), launched = counts, set()

    class Noted:
        def __init__(self, name):
            self._name, self._kernel = name, getattr(triton, name)

        def __getitem__(self, grid):
            def launch(*arguments, **named):
                launched.add(f'{self._name} {sorted(named.items())}')
                return self._kernel[grid](*arguments, **named)
            return launch

    with pytest.MonkeyPatch.context() as patch:
        for name in ('score_kernel', 'open_kernel', 'votes_kernel', 'places_kernel'):
            patch.setattr(triton, name, Noted(name))
        off(Case(2, 32, 2, (20,), (90,), opened, coded=1), implementation, device)
        places(Chosen(700, chosen, 9999, 0, 600, True, True, True), implementation, device)
    return launched


def test_nothing_is_compiled_for_a_number_of_leaves_or_pages(run_triton):
    """An answer that reads more would compile in its midst what a warm-up has not."""
    few = run_triton(constants, (3, 9))
    assert len(few) == 6 and few == run_triton(constants, (80, 600))


def test_nothing_is_compiled_anew_once_the_first_volume_has_codes():
    """What a kernel is compiled for tells multiples of 16 and ones from other numbers: of what is not told apart on purpose, those
    without any code, as a warm-up has them, are as those with codes."""
    triton_scores = pytest.importorskip('statekv_ros.kernels.page_votes.scores')
    given = inputs(CASES[12]).entries
    plain = Entries.plain(given.exact)
    names = {'codes': 'c_head', 'steps': 'v_head', 'scales': 'f_head', 'leaves': 'b_head', 'strays': 't_head'}
    for kernel in (triton_scores.score_kernel, triton_scores.open_kernel):
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        for pool, name in names.items():
            kinds = {(stride == 1, stride % 16 == 0) for stride in (getattr(each, pool).stride(0) for each in (given, plain))}
            assert name in free or len(kinds) == 1, (pool, kinds)
