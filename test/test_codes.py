"""Index entries in 4 bits: what they stand for, when they are made, what they take, and the votes that they keep."""
import pytest
import torch

from conftest import entries_at
from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.answering.candidates import OPEN_LEAVES, Candidates, Group
from statekv_ros.memory.detailed.codes import Codes
from statekv_ros.memory.detailed.index import INDEXES
from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, VOLUME
from statekv_ros.memory.detailed.table import PageTable

LAYERS, HEADS, DIM = 2, 2, 16
LAYOUT = KVLayout(LAYERS, HEADS, DIM, torch.float32, torch.device('cpu'))
PAGES = VOLUME * CHAPTER


def seen(pages: int, kinds: int = 60, far: float = 0, seed: int = 0) -> torch.Tensor:
    """Means and variances [layers, kv_heads, pages, 2 x head_dim] of some kinds of page, rare and frequent ones, never quite
    alike, that drift; keys stand up to `far` from 0."""
    random = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(LAYERS, HEADS, kinds, DIM, generator=random)
    often = torch.rand(kinds, generator=random).pow(3) + .01
    kind = often.expand(LAYERS * HEADS, -1).multinomial(pages, replacement=True, generator=random)
    kind = kind.view(LAYERS, HEADS, pages, 1).expand(-1, -1, -1, DIM)
    mean = centres.gather(2, kind) + .4 * torch.randn(LAYERS, HEADS, pages, DIM, generator=random)
    mean += torch.linspace(0, 1, pages)[:, None] + far * torch.rand(DIM, generator=random)
    return torch.cat([mean, .3 * torch.rand(LAYERS, HEADS, pages, DIM, generator=random).square()], dim=-1)


def filled(entries: torch.Tensor, step: int = 64) -> PageTable:
    table = PageTable(LAYOUT, INDEXES['mean_variance'])
    for begin in range(0, entries.shape[2], step):
        table.append(entries[:, :, begin:begin + step], begin, 9 * entries[:, :, begin:begin + step].shape[2])
    return table


def by_number(table: PageTable, layer: int) -> torch.Tensor:
    places, pages = table.lying(layer, slice(table.first, table.stop))
    entries = entries_at(table, layer, places)
    return entries.gather(1, pages.expand(HEADS, -1).argsort(dim=-1)[..., None].expand_as(entries))


def test_a_code_is_within_half_a_level_of_each_number_and_levels_go_by_how_far_the_pages_of_a_leaf_are_from_it():
    codes, random = Codes(LAYOUT, 2 * DIM, PAGES, LEAF), torch.Generator().manual_seed(1)
    differences = torch.randn(HEADS, PAGES // LEAF, LEAF, 2 * DIM, generator=random) * torch.logspace(-3, 1, 2 * DIM)
    differences *= torch.logspace(1, -2, PAGES // LEAF)[:, None, None]
    differences[..., 3] = 0
    strays = torch.rand(HEADS, PAGES // LEAF, LEAF, generator=random) < .05
    strays[:, 7] = True
    differences[strays] *= 1000
    codes.put(0, slice(None), 0, differences, strays)
    pairs, step, scale, _ = codes.layer(0)
    level = step[:, 0, None, None] * scale[:, :PAGES // LEAF, None, None]
    found = torch.stack([pairs & 15, pairs >> 4], dim=-1)[:, :PAGES].view(differences.shape)
    found = (found - 7.5) * level
    others = differences.masked_fill(strays[..., None], 0)
    assert ((found - others).abs() <= .501 * level)[~strays].all()
    assert (found[..., 3] == 0).all(), 'what never differs'
    furthest = (others.abs() / (7.5 * level)).nan_to_num(0).amax(dim=(2, 3))
    assert torch.allclose(furthest, (~strays).any(dim=-1).float(), atol=1e-3), 'levels reach what is furthest from the leaf'


@pytest.mark.parametrize('far', [0, 900])
def test_a_volume_is_coded_once_it_is_sorted_beside_its_strays_and_never_rounded_again(far):
    entries = seen(2 * PAGES + 3 * CHAPTER, far=far)
    table, right = filled(entries), entries[1].half().float()
    codes = table.leaves.codes
    assert codes.stop == 2 * PAGES

    def error(pages: slice) -> torch.Tensor:
        return (by_number(table, 1)[:, pages.start - table.first:pages.stop - table.first] - right[:, pages]).abs()

    for volume in range(2):
        pages = slice(volume * PAGES, (volume + 1) * PAGES)
        places, numbers = table.lying(1, pages)
        assert (numbers.sort(dim=-1).values == torch.arange(pages.start, pages.stop)).all()
        assert ((places < 0).sum(dim=-1) == PAGES // 32).all()
        leaf = (places.clamp_min(0) // LEAF)[..., None]
        level = codes._steps[1][:, volume, None] * codes._scales[1][..., None].gather(1, leaf)
        level = level.masked_fill(places[..., None] < 0, 0)
        level = level.gather(1, numbers.argsort(dim=-1)[..., None].expand_as(level))
        assert (error(pages) <= .51 * level + 1e-5).all(), 'strays as they are'
    newer = slice(2 * PAGES, table.stop)
    assert (error(newer) == 0).all()
    for first in (900, CHAPTER + 5, PAGES + 10, PAGES + CHAPTER + 3, 2 * PAGES - 1, 2 * PAGES + 7):
        held = by_number(table, 1)[:, first - table.first:]
        table.forget(first - table.first)
        assert torch.equal(by_number(table, 1), held)


def test_no_step_codes_more_than_one_head_nor_makes_room_in_more_than_one_layer(monkeypatch):
    done = []
    for name in ('put', '_grow'):
        of = getattr(Codes, name)
        monkeypatch.setattr(Codes, name, lambda self, *given, of=of, name=name: done.append(name) or of(self, *given))
    table, entries = PageTable(LAYOUT, INDEXES['mean_variance']), seen(16)
    while table.stop < 3 * PAGES:
        done.clear()
        table.append(entries, 0, 144)
        assert done.count('put') <= 1 and done.count('_grow') <= 1
    assert table.leaves.codes.stop == 2 * PAGES


@pytest.mark.parametrize('held', [None, 3000, 4800, 9000])
def test_exact_entries_are_of_a_volume_and_some_chapters_at_most_however_long_it_lasts(held):
    table, entries = PageTable(LAYOUT, INDEXES['mean_variance']), seen(40)
    while table.stop < 5 * PAGES:
        table.append(entries, 0, 360)
        table.forget(max(0, table.stop - table.first - (held or table.stop)))
        exact = table.stop - max(table.first, table.leaves.codes.stop)
        assert exact <= min(held or table.stop, PAGES + 2 * CHAPTER)
        assert table._exact.shape[2] <= exact + PAGES + 3 * CHAPTER
    used = table.bytes_of(table.stop - table.first)
    assert table._exact.shape[2] <= PAGES + 4 * CHAPTER and table.bytes < 1.8 * used


def test_bytes_are_those_of_codes_and_a_page_bears_its_share_of_what_they_are_in():
    table = filled(seen(2 * PAGES + 3 * CHAPTER))
    codes = table.leaves.codes
    assert codes.bytes == sum(part.nbytes for part in (*codes._codes, *codes._steps, *codes._scales))
    room = codes._codes[0].shape[1]
    assert 2 * PAGES <= room <= 3 * PAGES
    assert 0 <= room * codes.page_bytes - codes.bytes < room * LAYERS * HEADS, 'rounded up'
    exact = 2 * 2 * DIM * LAYERS * HEADS
    assert table.bytes_of(100) == 100 * (table.page_bytes + exact - codes.page_bytes)
    assert table.bytes_of(9 * PAGES) - table.bytes_of(8 * PAGES) == PAGES * table.page_bytes


def test_codes_keep_the_votes_of_the_best_pages(monkeypatch):
    """Against the same table with all entries exact: of the votes of the best 32, what the 32 best by codes have."""
    entries = seen(3 * PAGES + CHAPTER + 600)
    ours = filled(entries)
    monkeypatch.setattr(Codes, 'finish', lambda self, volume: None)
    exact = filled(entries)
    assert ours.leaves.codes.stop == 3 * PAGES and exact.leaves.codes.stop == 0
    group, kept = Group(0, exact.stop, 0), []
    for layer in range(LAYERS):
        for number in range(20):
            rows = .25 * entries[layer, :, number * 600:][:, :3, :DIM]
            _, votes = votes_of(exact, group, None, layer, rows)
            best = votes.topk(32, dim=-1).values.sum(dim=-1)
            for table in (ours, exact):
                for leaves in (OPEN_LEAVES, None):
                    pages, found = votes_of(table, group, leaves, layer, rows)
                    chosen = pages.gather(1, found.topk(32, dim=-1).indices)
                    kept.append(of_pages(*votes_of(exact, group, None, layer, rows), chosen).sum(dim=-1) / best)
    ours_found, ours_all, exact_found, exact_all = torch.stack(kept).view(-1, 4, HEADS).mean(dim=(0, 2))
    assert exact_all == pytest.approx(1) and ours_all > .98
    assert abs(ours_found - exact_found) < .02 and ours_found > .75, (ours_found, exact_found)


def votes_of(table: PageTable, group: Group, leaves: int | None, layer: int, rows: torch.Tensor) -> tuple:
    candidates = Candidates(table, lambda rows, turn: rows, [group], leaves)
    pages, votes = candidates.votes(layer, rows, 0)
    return torch.arange(table.stop).expand(HEADS, -1) if pages is None else pages.long(), votes


def of_pages(pages: torch.Tensor, votes: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    every = torch.zeros(HEADS, int(pages.max()) + 1).scatter_(1, pages.expand(HEADS, -1), votes)
    return every.gather(1, wanted)


def test_a_single_kv_head_has_the_votes_of_its_pages_though_they_are_sorted():
    """One head of a table alone: which page a vote is for is not told by its place."""
    table, entries = filled(seen(CHAPTER + 100)), seen(CHAPTER + 100)
    part = table.of_heads(KVLayout(LAYERS, 1, DIM, torch.float32, torch.device('cpu')), slice(1, 2))
    rows = entries[0, :, 5:8, :DIM]
    pages, votes = Candidates(part, None, [Group(0, part.stop, 0)], None).votes(0, rows[1:], 0)
    queries = INDEXES['mean_variance'].queries(rows[1:])
    right = (queries @ entries[0, 1:].half().float().transpose(1, 2)).softmax(dim=-1).sum(dim=1)
    assert torch.allclose(votes, right.gather(1, pages.long()), atol=1e-4)


def test_where_codes_lie_is_told_with_where_pages_are():
    table = PageTable(LAYOUT, INDEXES['mean_variance'])
    places, stops = set(), set()
    for entries in seen(PAGES + 2 * CHAPTER).split(128, dim=2):
        table.append(entries, 0, 9 * 128)
        codes = table.leaves.codes
        places.add(table.place() + table.leaves.place())
        stops.add((codes.stop, *(part.data_ptr() for part in (codes._codes[0], codes._steps[1], codes._scales[1], table._exact)),
                   table._offset))
    assert PAGES in {stop for stop, *_ in stops} and len(places) >= len(stops) > 2


def test_some_heads_have_the_votes_that_they_have_in_the_whole():
    table = filled(seen(PAGES + 3 * CHAPTER))
    assert table.leaves.codes.stop == PAGES
    part = table.of_heads(KVLayout(LAYERS, 1, DIM, torch.float32, torch.device('cpu')), slice(1, 2))
    rows, group = torch.randn(HEADS, 4, DIM), Group(30, table.stop - 3, 0)
    for leaves in (30, None):
        pages, votes = Candidates(table, None, [group], leaves).votes(1, rows, 30)
        own_pages, own_votes = Candidates(part, None, [group], leaves).votes(1, rows[1:], 30)
        assert torch.equal(own_pages[0], pages[1]) and torch.allclose(own_votes[0], votes[1], atol=1e-5)
