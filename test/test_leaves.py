"""The index's second level: leaves of alike pages, however many came and went, and what is found through them."""
import math
from functools import partial

import pytest
import torch

from conftest import SECOND, entries_at
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.base import KVLayout
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.kernels import fitness
from statekv_ros.kernels.page_votes import Scratch, page_votes
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering.candidates import OPEN_LEAVES, Candidates, Group
from statekv_ros.memory.answering.choosing import PageChooser
from statekv_ros.memory.answering.snapshot import take_snapshot
from statekv_ros.memory.detailed.index import INDEXES
from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, LEAVES, STRAYS, VOLUME
from statekv_ros.memory.detailed.leaves import by_number as numbers_of
from statekv_ros.memory.detailed.table import PageTable
from statekv_ros.memory.policies import parse_answer_policy

LAYERS, HEADS, DIM = 2, 3, 16
LAYOUT = KVLayout(LAYERS, HEADS, DIM, torch.float32, torch.device('cpu'))


def scattered(pages: int, kinds: int, index: str = 'mean', seed: int = 0) -> torch.Tensor:
    """Entries [layers, kv_heads, pages, entry_width] of a few kinds of page, seen in any order and never quite alike."""
    random = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(LAYERS, HEADS, kinds, DIM, generator=random)
    kind = torch.randint(kinds, (LAYERS, HEADS, pages, 1), generator=random).expand(-1, -1, -1, DIM)
    mean = centres.gather(2, kind) + .3 * torch.randn(LAYERS, HEADS, pages, DIM, generator=random)
    spread = .1 * torch.rand(LAYERS, HEADS, pages, DIM, generator=random)
    parts = {'mean': [mean], 'mean_variance': [mean, spread], 'mean_pair_variance': [mean, spread[..., :DIM // 2]],
             'bounds': [mean + spread, mean - spread]}
    return torch.cat(parts[index], dim=-1)


def filled(pages: int, kinds: int = 40, index: str = 'mean', step: int = 16) -> PageTable:
    """A table of so many pages, with the leaves of all chapters that are complete."""
    table, entries = PageTable(LAYOUT, INDEXES[index]), scattered(pages, kinds, index)
    for begin in range(0, pages, step):
        table.append(entries[:, :, begin:begin + step], begin, 9 * len(range(pages)[begin:begin + step]))
    return table


def chooser_of(table: PageTable, leaves: int | None, *groups: Group) -> Candidates:
    groups = groups or (Group(table.first, table.stop, 0),)
    return Candidates(table, lambda rows, turn: rows * (1 + turn[..., None] / 4), groups, leaves)


def by_number(table: PageTable, layer: int) -> torch.Tensor:
    """Entries of all pages held, [kv_heads, pages, entry_width], the oldest page first."""
    places, pages = table.lying(layer, slice(table.first, table.stop))
    entries = entries_at(table, layer, places)
    return entries.gather(1, pages.expand(HEADS, -1).argsort(dim=-1)[..., None].expand_as(entries))


def entries_of(table: PageTable, layer: int, pages: torch.Tensor) -> torch.Tensor:
    """Of pages [kv_heads, pages] by number."""
    entries = by_number(table, layer)
    return entries.gather(1, (pages - table.first).long()[..., None].expand(-1, -1, entries.shape[-1]))


def votes_of_all(table: PageTable, layer: int, rows: torch.Tensor, first: int, *groups: Group) -> torch.Tensor:
    """Votes of every page from `first` on, none found through leaves, [kv_heads, pages]."""
    pages, votes = chooser_of(table, None, *groups).votes(layer, rows, first)
    return votes if pages is None else torch.empty_like(votes).scatter_(1, pages.long() - first, votes)


def assert_same(one: tuple, other: tuple) -> None:
    """The same votes for the same pages, in any order."""
    (pages, votes), (of_pages, of_votes) = one, other
    # One that is a candidate twice: the one that counts first.
    order, of_order = (2 * pages + (votes < 0)).argsort(dim=-1), (2 * of_pages + (of_votes < 0)).argsort(dim=-1)
    assert torch.equal(pages.gather(1, order), of_pages.gather(1, of_order))
    assert torch.allclose(votes.gather(1, order), of_votes.gather(1, of_order), atol=1e-5)


def that_count(pages: torch.Tensor, votes: torch.Tensor) -> list[list[int]]:
    """The candidates of each KV head without those that are candidates elsewhere."""
    return [of_head[own >= 0].tolist() for of_head, own in zip(pages, votes)]


def test_a_chapter_has_each_page_in_one_leaf_of_alike_pages():
    table = filled(CHAPTER + 20)
    for layer in range(LAYERS):
        assert table.leaves.stops[layer] == 1
        pages = table.leaves.pages(layer, slice(0, 1))
        assert (pages.sort(dim=-1).values == torch.arange(CHAPTER)).all()
        parts = entries_at(table, layer, slice(0, CHAPTER)).view(HEADS, LEAVES, LEAF, DIM)
        assert torch.allclose(parts.flatten(1, 2), entries_of(table, layer, pages))
        unlike = (parts - parts.mean(dim=2, keepdim=True)).norm(dim=-1).flatten(1)
        strays = torch.zeros_like(unlike, dtype=torch.bool).scatter_(1, unlike.topk(STRAYS, dim=-1).indices, True)
        in_leaf, (of_all, numbers) = strays.view(HEADS, LEAVES, LEAF, 1), table.leaves.strays(layer, slice(0, 1))
        assert of_all == slice(0, STRAYS)
        assert torch.equal(numbers, pages[strays].view(HEADS, -1)), 'in the order of their places'
        assert torch.equal(entries_at(table, layer, ~torch.arange(STRAYS)[None]), entries_of(table, layer, numbers))
        others = (parts.float() * ~in_leaf).sum(dim=2) / (~in_leaf).sum(dim=2)
        assert torch.allclose(table.leaves.layer(layer)[0][:, :LEAVES].float(), others.float(), atol=4e-3)
        in_a_row = by_number(table, layer)[:, :CHAPTER].view(HEADS, LEAVES, LEAF, DIM)
        assert parts.var(dim=2).mean() < .5 * in_a_row.var(dim=2).mean()


@pytest.mark.parametrize('index', INDEXES)
def test_the_pages_with_the_most_votes_of_all_are_found_in_the_best_leaves(index):
    table, best = filled(8 * CHAPTER + 100, index=index), 28
    for layer in range(LAYERS):
        rows = .02 * by_number(table, layer)[:, ::2000, :DIM].float()
        votes = votes_of_all(table, layer, rows, 0)
        pages, found = chooser_of(table, OPEN_LEAVES).votes(layer, rows, 0)
        assert pages.shape == found.shape == (HEADS, OPEN_LEAVES * LEAF + 100 + 8 * STRAYS)
        kept = votes.gather(1, pages.gather(1, found.topk(best, dim=-1).indices).long()).sum(dim=-1)
        assert (kept > (.94 if index == 'bounds' else .97) * votes.topk(best, dim=-1).values.sum(dim=-1)).all()


def test_rows_have_their_true_say_though_most_of_what_they_want_is_not_scored():
    """A row that wants a little of everything has few votes for what is open, and must not have more say in it than it had."""
    table = filled(8 * CHAPTER)
    keen = .1 * by_number(table, 0)[:, :1].float()
    idle = torch.randn(HEADS, 6, DIM, generator=torch.Generator().manual_seed(3)) * .02
    rows = torch.cat([keen, idle], dim=1)
    votes = votes_of_all(table, 0, rows, 0)
    pages, found = chooser_of(table, 32).votes(0, rows, 0)
    assert votes.sum(dim=-1) == pytest.approx(7, rel=1e-4)
    of_open = votes.gather(1, pages.long()).masked_fill(found < 0, 0).sum(dim=-1)
    assert (of_open < 5).all() and found.clamp_min(0).sum(dim=-1) == pytest.approx(of_open, rel=.2)


@pytest.mark.parametrize('index', INDEXES)
@pytest.mark.parametrize('size', [.02, 1, 8])
def test_each_row_has_one_vote_however_far_its_leaves_are_from_what_is_in_them(index, size):
    """Against the definition, in float64: long queries want a leaf a hundred times as much, in logarithms, as its best page."""
    table = filled(4 * CHAPTER + 100, index=index)
    rows = size * torch.randn(HEADS, 5, DIM, generator=torch.Generator().manual_seed(4))
    pages, found = chooser_of(table, 32).votes(0, rows, 0)
    queries, in_leaves = table.index.queries(rows).double(), table.leaves.pages(0, slice(0, 4)).view(HEADS, -1, LEAF)
    of_leaves = queries @ table.leaves.layer(0)[0][:, :4 * LEAVES].double().transpose(1, 2) + math.log(9 * LEAF)
    opened = pages[:, :32 * LEAF]
    is_open = torch.stack([torch.isin(leaf[:, 0], of_head) for leaf, of_head in zip(in_leaves, opened)])
    assert (is_open.sum(dim=-1) == 32).all()
    closed = of_leaves.masked_fill(is_open[:, None], float('-inf')).logsumexp(dim=-1, keepdim=True)
    of_pages = queries @ entries_of(table, 0, pages).double().transpose(1, 2) + math.log(9)
    strays = torch.stack([torch.isin(of_head, own) for of_head, own in zip(opened, table.leaves.strays(0, slice(0, 4))[1])])
    assert torch.equal(found[:, :32 * LEAF] == -1, strays) and (found[:, 32 * LEAF:] >= 0).all()
    of_pages = of_pages.masked_fill(found[:, None] < 0, float('-inf'))
    votes = torch.softmax(torch.cat([of_pages, closed], dim=-1), dim=-1).sum(dim=1)[:, :-1]
    assert torch.allclose(found.double().clamp_min(0), votes, atol=1e-3)


def test_a_page_that_is_like_no_other_is_found_whatever_the_leaves_tell(monkeypatch):
    """Fifty pages among thousands of a few kinds, each asked for by a row of its own. Without strays few are found."""
    found, entries = [], scattered(4 * CHAPTER + 100, 4, 'mean_variance', seed=5)
    odd = torch.arange(7, 4 * CHAPTER, 82)
    own = torch.randn(LAYERS, HEADS, len(odd), DIM, generator=torch.Generator().manual_seed(6))
    entries[:, :, odd, :DIM] = 7 * own / own.norm(dim=-1, keepdim=True)
    for strays in (STRAYS, 0):
        monkeypatch.setattr('statekv_ros.memory.detailed.leaves.STRAYS', strays)
        table = PageTable(LAYOUT, INDEXES['mean_variance'])
        for part in entries.split(64, dim=2):
            table.append(part, 0, 9 * part.shape[2])
        candidates, hits = chooser_of(table, 2), 0
        for page in odd.tolist():
            of_heads = that_count(*candidates.votes(1, .2 * entries[1, :, page:page + 1, :DIM], 0))
            hits += sum(page in of_head for of_head in of_heads)
            assert all(len(set(of_head)) == len(of_head) for of_head in of_heads)
        found.append(hits / HEADS / len(odd))
    assert found[0] > .9 and found[1] < .6, found


def test_entries_scored_in_a_pass_are_bounded_and_hardly_grow_with_the_pages_held(monkeypatch):
    """Counted: the entries, not the time; by the naive twin, which goes through what any other does."""
    scored = []
    monkeypatch.setattr(fitness, 'find_library', lambda operation: None)
    for name in ('pages', 'of_leaves'):
        def counting(self, *arguments, of=getattr(Scratch, name)):
            found = of(self, *arguments)
            scored.append(sum(piece.shape[2] for piece in (found if isinstance(found, list) else [found])))
            return found
        monkeypatch.setattr(Scratch, name, counting)
    counts = {}
    for pages in (1000, 4000, 20_000):
        table = filled(pages, step=50)
        scored.clear()
        chooser_of(table, OPEN_LEAVES).votes(1, torch.randn(HEADS, 4, DIM), 0)
        counts[pages] = sum(scored)
    assert counts[1000] == 1000, 'few pages are all scored'
    assert all(count < pages / LEAF + pages / CHAPTER * STRAYS + OPEN_LEAVES * LEAF + 2 * CHAPTER
               for pages, count in counts.items()), counts


def telling(pages: torch.Tensor) -> torch.Tensor:
    """Entries [pages, DIM] that tell which page each is, however coarse they become: of a number of 14 bits each bit is a sign."""
    bits = pages[:, None] * 7919 % 2**14 >> torch.arange(14) & 1
    return torch.cat([2. * bits - 1, torch.zeros(len(pages), DIM - 14)], dim=1)


def told(entries: torch.Tensor) -> torch.Tensor:
    bits = (entries[..., :14] > 0).long()
    return (bits << torch.arange(14)).sum(dim=-1) * pow(7919, -1, 2**14) % 2**14


@pytest.mark.parametrize('count,held', [(9, 2500), (31, 1200), (300, 4000), (40, 4800), (1500, 5000), (37, 9000)])
def test_leaves_are_of_pages_that_are_held_however_many_came_and_went(count, held):
    """Entries that tell their page's number, in 4 bits too: what a leaf names must be what was sorted."""
    table = PageTable(LAYOUT, INDEXES['mean'])
    used = set()
    while table.stop < 12_000:
        entries_given = telling(torch.arange(table.stop, table.stop + count)).expand(LAYERS, HEADS, -1, -1)
        table.append(entries_given, 0, count)
        table.forget(max(0, table.stop - table.first - held))
        assert table.leaves._pages.shape[2] <= 2 * (held + count + 2 * CHAPTER) // LEAF
        for layer, stop in enumerate(table.leaves.stops):
            chapters = slice(table.leaves.first, stop)
            lost = table.first % (VOLUME * CHAPTER) if table.first < table.leaves.codes.stop else 0
            assert table.first - lost <= chapters.start * CHAPTER and chapters.stop * CHAPTER <= table.stop
            assert (table.stop - stop * CHAPTER) < 2 * CHAPTER + count, 'sorting keeps up'
            if chapters.start < chapters.stop:
                _, in_leaves, chapter = table.leaves.layer(layer)
                newest = (stop - chapter) * LEAVES - 1
                pages, place = numbers_of(in_leaves[:, newest]), (stop * LEAVES - 1) * LEAF
                assert (told(entries_at(table, layer, slice(place, place + LEAF))) == pages).all()
                together = table.leaves.together(layer, stop - 1)
                assert ((together.start <= pages // CHAPTER) & (pages // CHAPTER < together.stop)).all()
                used.add(stop)
            for part in (slice(table.first, table.stop), slice(table.first + 5, table.stop - held // 3)):
                if part.start >= part.stop:
                    continue
                places, pages = table.lying(layer, part)
                assert (told(entries_at(table, layer, places)) == pages).all()
                assert (pages.sort(dim=-1).values == torch.arange(part.start, part.stop)).all()
        assert (table.newest_entries(slice(table.stop - count, table.stop)) == entries_given.half()).all()
    assert len(used) > 1


def test_one_step_sorts_no_more_than_its_share_of_the_layers(monkeypatch):
    table, sorted_, of = PageTable(LAYOUT, INDEXES['mean']), [], type(PageTable(LAYOUT, INDEXES['mean']).leaves)._sorted
    monkeypatch.setattr(type(table.leaves), '_sorted', lambda *arguments: sorted_.append(1) or of(*arguments))
    for _ in range(3 * CHAPTER // 4):
        before = len(sorted_)
        table.append(torch.randn(LAYERS, HEADS, 4, DIM), 0, 36)
        assert len(sorted_) <= before + 1
    assert len(sorted_) >= 2 * LAYERS


def test_leaves_are_told_in_the_bytes_of_the_table_and_a_page_bears_its_share():
    table, few = filled(6 * CHAPTER, step=64), filled(10)
    leaves = table.leaves
    own = leaves._pages, leaves._entries, leaves._strays, leaves._of_strays
    assert few.leaves.bytes == 0 and leaves.bytes == sum(tensor.nbytes for tensor in own) > 0
    codes = leaves.codes
    assert table.bytes == sum(tensor.nbytes for tensor in (
        table._exact, table._of_pages, *codes._codes, *codes._steps, *codes._scales, *own))
    full = leaves._pages.shape[2] // LEAVES * CHAPTER
    assert 0 <= full * leaves.page_bytes - leaves.bytes < full, 'rounded up'


def test_each_turn_and_the_pages_at_both_ends_are_scored_as_without_leaves():
    """Groups cut chapters anywhere: every page is a candidate once at most, and within its own group's turn."""
    table = filled(6 * CHAPTER + 300)
    far, near = 4 * CHAPTER + 500, table.stop - 40
    groups = Group(700, far, 0), Group(far, near, 1), Group(near, table.stop, 2)
    rows = torch.randn(HEADS, 4, DIM)
    votes = votes_of_all(table, 0, rows, 700, *groups)
    pages, found = chooser_of(table, 32, *groups).votes(0, rows, 700)
    for of_head in that_count(pages, found):
        assert 700 <= min(of_head) and set(range(table.stop - 40, table.stop)) <= set(of_head) and len(set(of_head)) == len(of_head)
    of_all = votes.gather(1, (pages.long() - 700).clamp_min(0))
    assert torch.corrcoef(torch.stack([found[found >= 0], of_all[found >= 0]]))[0, 1] > .99
    pages, found = chooser_of(table, 32, *groups).votes(0, rows, 900)
    assert (pages < 900).any() and all(min(of_head) >= 900 for of_head in that_count(pages, found)), 'of a volume of codes'
    assert table.leaves.codes.stop == VOLUME * CHAPTER and not set(range(900, CHAPTER)) <= set(pages[0].tolist())


@pytest.mark.parametrize('implementation', ['naive', None])
def test_a_volume_of_which_a_few_pages_stand_otherwise_is_gone_through_by_leaves(implementation, monkeypatch):
    monkeypatch.setattr('statekv_ros.memory.answering.candidates.page_votes', partial(page_votes, implementation=implementation))
    table = filled(stop := (2 * VOLUME + 1) * CHAPTER + 300)
    few, end = 500, stop - 40
    groups = Group(0, few, 2), Group(few, end, 0), Group(end, stop, 1)
    candidates, rows = chooser_of(table, OPEN_LEAVES, *groups), by_number(table, 1)[:, ::3000].float()
    pages, votes = candidates.votes(1, rows, 0)
    strays = 2 * VOLUME * STRAYS + STRAYS
    assert pages.shape[1] == OPEN_LEAVES * LEAF + few + strays + 300, 'rather than a volume'
    opened = pages[:, :OPEN_LEAVES * LEAF]
    assert (opened < few).any() and (votes[:, :OPEN_LEAVES * LEAF][opened < few] == -1).all(), 'these are others\', and not read twice'
    others = votes[:, OPEN_LEAVES * LEAF:] < 0
    assert others.any() and (pages[:, OPEN_LEAVES * LEAF:][others] < few).all(), 'strays of others'
    assert (votes.clamp_min(0).sum(dim=-1) > 0).all()
    assert all(set(range(few)) < set(of_head) and len(set(of_head)) == len(of_head) for of_head in that_count(pages, votes))
    of_all = votes_of_all(table, 1, rows, 0, *groups)
    kept = of_all.gather(1, pages.gather(1, votes.topk(20, dim=-1).indices).long()).sum(dim=-1)
    assert (kept > .8 * of_all.topk(20, dim=-1).values.sum(dim=-1)).all()
    pages, votes = candidates.votes(1, 1000 * rows, 0)      # hardly any page gets a vote at all
    for best in pages.gather(1, votes.topk(300, dim=-1).indices):
        assert len(best.unique()) == 300


@pytest.mark.parametrize('few', [1100, 2048, 3500])
def test_a_volume_that_is_shared_more_evenly_is_scored_page_by_page_where_it_is_cut(few):
    table = filled(stop := (2 * VOLUME + 1) * CHAPTER + 300)
    groups = Group(0, few, 2), Group(few, stop, 0)
    pages, votes = chooser_of(table, OPEN_LEAVES, *groups).votes(0, by_number(table, 0)[:, ::3000].float(), 0)
    of_volumes = table.leaves.strays(0, table.leaves.chapters(0))[1]
    others = torch.stack([(own == -1) & ~torch.isin(of_head, strays) for of_head, own, strays in zip(pages, votes, of_volumes)])
    by_leaves = 2 if few >= 3 * CHAPTER else 1
    strays = (by_leaves * VOLUME + 1) * STRAYS
    one_by_one = strays + 300 + (VOLUME * CHAPTER - few if by_leaves == 2 else VOLUME * CHAPTER)
    assert pages.shape[1] == by_leaves * OPEN_LEAVES * LEAF + one_by_one
    assert others.any() == (by_leaves == 2)
    assert all(len(set(of_head)) == len(of_head) for of_head in that_count(pages, votes))


def test_an_answer_finds_the_same_before_and_after_a_chapter_loses_pages():
    table, first = filled(6 * CHAPTER + 300), VOLUME * CHAPTER + 900
    candidates, rows = chooser_of(table, 32), torch.randn(HEADS, 4, DIM)
    before = candidates.votes(1, rows, first)
    table.forget(first)
    assert_same(before, candidates.votes(1, rows, first))
    assert_same(before, chooser_of(table, 32).votes(1, rows, first))


def test_a_volume_that_loses_pages_is_gone_through_by_leaves_until_little_of_it_is_left():
    opened, table = 80, filled((3 * VOLUME + 1) * CHAPTER + 300)
    candidates, rows = chooser_of(table, opened), by_number(table, 1)[:, ::3000].float()
    assert candidates.votes(1, rows, 0)[0].shape[1] == opened * LEAF + (3 * VOLUME + 1) * STRAYS + 300
    for lost, by_leaves in (900, 2 * VOLUME + 1), (3 * CHAPTER, 2 * VOLUME + 1), (3 * CHAPTER + 100, VOLUME + 1):
        table.forget(VOLUME * CHAPTER + lost - table.first)
        assert table.leaves.together(1, VOLUME + 1) == slice(VOLUME, 2 * VOLUME)
        pages, votes = found = candidates.votes(1, rows, table.first)
        assert_same(found, chooser_of(table, opened).votes(1, rows, table.first))
        one_by_one = 0 if by_leaves > VOLUME + 1 else VOLUME * CHAPTER - lost
        assert pages.shape[1] == opened * LEAF + by_leaves * STRAYS + one_by_one + 300
        assert all(len(set(of_head)) == len(of_head) and min(of_head) >= table.first for of_head in that_count(pages, votes))
        of_all = votes_of_all(table, 1, rows, table.first)
        best = pages.gather(1, votes.topk(20, dim=-1).indices).long()
        kept = of_all.gather(1, best - table.first).sum(dim=-1)
        assert (kept > .8 * of_all.topk(20, dim=-1).values.sum(dim=-1)).all()


def test_a_volume_that_loses_pages_while_it_is_sorted_is_chapters_of_alike_pages_again():
    table, entries = PageTable(LAYOUT, INDEXES['mean']), scattered(2 * VOLUME * CHAPTER, 40)
    for part in entries.split(16, dim=2):
        table.append(part, 0, 9 * 16)
        if table.leaves._begun[0] > table.leaves._begun[1]:
            break
    assert table.leaves.together(0, 1) == slice(0, VOLUME) and table.leaves.codes.stop == 0
    before = by_number(table, 0)
    table.forget(900)
    assert table.leaves.together(0, 1) == slice(1, 2)
    assert torch.equal(by_number(table, 0), before[:, 900:])
    in_leaves = entries_at(table, 0, slice(CHAPTER, VOLUME * CHAPTER)).view(HEADS, -1, LEAF, DIM)
    in_a_row = by_number(table, 0)[:, CHAPTER - 900:][:, :(VOLUME - 1) * CHAPTER].view(HEADS, -1, LEAF, DIM)
    assert in_leaves.var(dim=2).mean() < .5 * in_a_row.var(dim=2).mean()


def test_what_has_no_say_in_scores_has_none_in_what_is_alike():
    """Half of the channels tell nothing to any query: leaves are as alike in the others as if these were not there."""
    squares = torch.tensor([1., 0]).repeat(DIM // 2).expand(LAYERS, HEADS, -1)
    entries = scattered(CHAPTER, 40) * torch.tensor([1., 9]).repeat(DIM // 2)
    spreads = []
    for given in (None, squares):
        table = PageTable(LAYOUT, INDEXES['mean'], given)
        for _ in range(2):      # what is complete is sorted with what comes next
            table.append(entries, 0, 9 * CHAPTER)
        spreads.append(entries_at(table, 0, slice(0, CHAPTER)).view(HEADS, LEAVES, LEAF, DIM)[..., ::2].var(dim=2).mean())
    assert spreads[1] < .7 * spreads[0]


def test_some_heads_of_a_table_find_what_they_find_in_the_whole():
    table = filled(4 * CHAPTER)
    part = table.of_heads(LAYOUT, slice(1, 3))
    rows = torch.randn(HEADS, 4, DIM)
    pages, votes = chooser_of(table, 32).votes(1, rows, 0)
    own_pages, own_votes = chooser_of(part, 32).votes(1, rows[1:3], 0)
    assert (own_pages == pages[1:3]).all() and torch.allclose(own_votes, votes[1:3], atol=1e-5)


@pytest.fixture(scope='module')
def long_stream(tmp_path_factory):
    """3,300 pages of one token each: some chapters more than leaves are opened."""
    path = write_tiny_checkpoint(tmp_path_factory.mktemp('leaves') / 'tiny', family='internvl', max_position=10**5)
    stream = VideoStream(load_backbone(str(path), device='cpu', dtype='float32'), 'statekv(30)', page_tokens=1)
    random = torch.Generator().manual_seed(1)
    frames = [torch.randint(256, (64, 64, 3), generator=random, dtype=torch.uint8).numpy() for _ in range(16)]
    while stream.detailed.pages.stop < 3300:
        stream.step(frames[stream.steps % 16], (stream.steps + 1) * SECOND)
    return stream


def test_weights_tell_how_large_the_channels_of_queries_are(long_stream):
    """Of hidden states whose channels are independent, as the model would project and weigh them."""
    backbone = long_stream.backbone
    heads, dim = backbone.layout.kv_heads, backbone.layout.head_dim
    for layer, told in zip(backbone._language.layers, backbone.query_squares):
        hidden = torch.randn(4000, backbone._language.config.hidden_size, generator=torch.Generator().manual_seed(5))
        query = layer.self_attn.q_proj(layer.input_layernorm(hidden)).view(4000, heads, -1, dim) * layer.self_attn.scaling
        halves = query.square().mean(dim=(0, 2)).unflatten(-1, (2, -1)).mean(dim=1)
        assert torch.allclose(told, halves.repeat(1, 2), rtol=.15)


def chosen(stream: VideoStream, span: tuple = (None, None)) -> tuple[PageChooser, list]:
    chooser = PageChooser(take_snapshot(stream.seen(), parse_answer_policy('sparse(20)'), span))
    layout = stream.backbone.layout
    rows = torch.randn(layout.kv_heads, 4, layout.head_dim, generator=torch.Generator().manual_seed(2))
    return chooser, [chooser.choose(layer, rows)[0] for layer in range(layout.layers)]


def test_a_choice_through_leaves_reads_the_rows_of_the_pages_that_it_names(long_stream, monkeypatch):
    monkeypatch.setattr('statekv_ros.memory.answering.candidates.OPEN_LEAVES', 20)
    table = long_stream.detailed.pages
    chooser, choices = chosen(long_stream)
    assert chooser._candidates.votes(0, torch.zeros(long_stream.backbone.layout.kv_heads, 1, DIM), 0)[0] is not None
    for choice in choices:
        assert (choice.starts == table.places(choice.pages)[0]).all() and (choice.lengths == 1).all()
        assert all(len(set(of_head.tolist())) == 20 for of_head in choice.pages)


def test_what_is_sorted_while_an_answer_is_decoded_changes_nothing_in_it():
    table = filled(6 * CHAPTER - 10)
    candidates, rows = chooser_of(table, 32), torch.randn(HEADS, 4, DIM)
    before = candidates.votes(0, rows, 0)
    for _ in range(4):
        table.append(torch.randn(LAYERS, HEADS, 16, DIM), 0, 144)
    assert table.leaves.stops[0] == 6
    after = candidates.votes(0, rows, 0)
    assert not torch.equal(before[0], after[0]), 'they lie otherwise now'
    assert_same(before, after)


def test_a_span_keeps_what_is_chosen_through_leaves_within_it(long_stream, monkeypatch):
    monkeypatch.setattr('statekv_ros.memory.answering.candidates.OPEN_LEAVES', 20)
    steps = long_stream.detailed.steps()
    first, last = steps[10], steps[-10]
    _, choices = chosen(long_stream, (first.record.first_stamp_ns, last.record.last_stamp_ns))
    for choice in choices:
        assert first.page <= choice.pages.min() and choice.pages.max() < last.page + len(last.lengths)
