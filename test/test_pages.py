"""The detailed cache's parts: rows in a ring, pages in a table, and what an index says of a page."""
import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import SECOND, entries_at
from statekv_ros.backbones.base import KVLayout
from statekv_ros.errors import ParameterError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.detailed.index import INDEXES
from statekv_ros.memory.detailed.pages import Stretch, page_lengths
from statekv_ros.memory.detailed.rows import RowPool, TokenRows
from statekv_ros.memory.detailed.table import PageTable

LAYOUT = KVLayout(2, 3, 8, torch.float32, torch.device('cpu'))


def watched(backbone, frames, count: int, **options) -> VideoStream:
    stream = VideoStream(backbone, 'statekv(20)', **options)
    for index in range(count):
        stream.step(frames[index % len(frames)], (index + 1) * SECOND // 2)
    return stream


@settings(max_examples=200, deadline=None)
@given(st.integers(20, 90), st.lists(st.integers(1, 17), min_size=1, max_size=60), st.randoms())
def test_steps_keep_their_rows_to_themselves_until_they_are_given_back(most, sizes, chance: random.Random):
    """Against what was written to each: steps come and go at the ends, and now and then the pool is given another size."""
    pool = RowPool(lambda capacity: TokenRows.empty(LAYOUT, capacity))
    steps: deque = deque()
    for mark, tokens in enumerate(sizes):
        while (row := pool.find(tokens)) is None:
            used = sum(step.tokens for step in steps)
            capacity = min(most, 2 * (used + tokens))
            if used + tokens <= capacity != pool.capacity:
                rows = pool.resize(capacity, [(step.row, step.tokens) for step in steps])
                for step, row in zip(steps, rows, strict=True):
                    step.row = row
            else:
                oldest = steps.popleft()
                pool.give_back(oldest.row, oldest.tokens)
        pool.take(row, tokens)
        pool.rows.key[:, :, row:row + tokens] = mark
        steps.append(SimpleNamespace(row=row, tokens=tokens, mark=mark))
        if chance.random() < .3 and len(steps) > 1:
            oldest = steps.popleft()
            pool.give_back(oldest.row, oldest.tokens)
        assert pool.capacity <= most and pool.bytes == pool.capacity * (2 * 2 * 3 * 8 * 4 + 1)
        for step in steps:
            assert (pool.rows.key[:, :, step.row:step.row + step.tokens] == step.mark).all()


@pytest.mark.parametrize('tokens,most,expected', [(9, 64, [9]), (64, 64, [64]), (65, 64, [32, 33]), (259, 64, [51, 52, 52, 52, 52]),
                                                  (3, 1, [1, 1, 1])])
def test_a_step_is_cut_into_even_pages(tokens, most, expected):
    assert list(page_lengths(tokens, most)) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans(), st.booleans()), max_size=120))
def test_pages_are_found_by_number_however_many_came_and_went(events):
    table, numbers, starts, stands, hidden = PageTable(LAYOUT, INDEXES['mean']), [], {}, {}, set()
    for count, forget, stays, hide in events:
        first = table.stop
        entries = torch.arange(first, first + count).float().expand(2, 3, 8, -1).transpose(2, 3)
        stretch = stands[first - 1] if stays and first else Stretch(first, 2 * first)
        table.append(entries, 100 * first, 10 * count, stretch)
        starts |= {first + page: 100 * first + 10 * page for page in range(count)}
        stands |= dict.fromkeys(range(first, first + count), stretch)
        numbers += range(first, first + count)
        if hide:
            table.hide(first, 1)
            hidden.add(first)
        if forget:
            table.forget(len(numbers) // 2)
            del numbers[:len(numbers) // 2]
        held = slice(table.first, table.stop)
        assert [*range(table.first, table.stop)] == numbers
        assert table.lengths(held).tolist() == [0 if number in hidden else 10 for number in numbers]
        assert torch.equal(table.sizes(held), table.lengths(held).log())
        for part in (held, slice(held.start + len(numbers) // 3, held.stop - len(numbers) // 3)):
            begins, *where = table.stretches(part).tolist()
            assert len(begins) == len({stands[number] for number in range(part.start, part.stop)})
            for begin, stop, stretch in zip(begins, [*begins[1:], part.stop], map(Stretch, *where)):
                assert all(stands[number] == stretch for number in range(begin, stop))
        assert table.places(torch.tensor(numbers, dtype=torch.int64))[0].tolist() == [starts[number] for number in numbers]
        assert entries_at(table, 1, held)[2, :, 0].tolist() == numbers


@pytest.mark.parametrize('name', INDEXES)
@pytest.mark.parametrize('lengths', [[1], [5], [3, 4], [4, 4, 5]])
def test_scores_of_an_index_equal_its_definition(name, lengths):
    torch.manual_seed(sum(lengths))
    keys, rows = 50 + torch.randn(2, 3, sum(lengths), 8), torch.randn(3, 6, 8)
    index = INDEXES[name]
    entries = index.entries(keys, len(lengths))
    assert entries.shape == (2, 3, len(lengths), index.entry_width(8))
    for layer in range(2):
        scored = index.queries(rows) @ entries[layer].transpose(1, 2)
        for page, of_page in enumerate(keys[layer].double().split(lengths, dim=1)):
            mean, spread = of_page.mean(dim=1), of_page.var(dim=1, correction=0)
            products = rows.double()[:, :, None] * of_page[:, None]
            expected = {'mean': products.sum(-1).mean(-1),
                        'mean_variance': (rows * mean[:, None]).sum(-1) + (rows.double() ** 2 * spread[:, None]).sum(-1) / 2,
                        'mean_pair_variance': (rows * mean[:, None]).sum(-1) + (
                            (rows.double() ** 2).unflatten(-1, (2, 4)).sum(-2) * spread.unflatten(-1, (2, 4)).mean(-2)[:, None]
                            ).sum(-1) / 2,
                        'bounds': products.amax(dim=2).sum(-1)}[name]
            assert (scored[:, :, page] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_bounds_are_never_passed_and_the_second_order_comes_nearer_to_the_mass_than_the_first():
    torch.manual_seed(3)
    keys, rows = torch.randn(1, 3, 40 * 9, 16), torch.randn(3, 5, 16) / 4
    of_pages = (rows @ keys[0].transpose(1, 2)).unflatten(-1, (40, 9))
    mass = of_pages.logsumexp(-1) - torch.tensor(9.).log()
    scored = {name: index.queries(rows) @ index.entries(keys, 40)[0].transpose(1, 2) for name, index in INDEXES.items()}
    assert (scored['bounds'] >= of_pages.amax(-1) - 1e-5).all()
    errors = {name: (scored[name] - mass).abs().mean() for name in scored}
    assert errors['mean_variance'] < errors['mean'] / 2 < errors['bounds']


@pytest.mark.parametrize('turn', [1, 100, 12_345])
def test_the_variance_of_a_pair_is_the_same_however_its_keys_are_turned(backbone, turn):
    torch.manual_seed(4)
    layout, index = backbone.layout, INDEXES['mean_pair_variance']
    keys = torch.randn(layout.layers, layout.kv_heads, 18, layout.head_dim) * torch.rand(layout.head_dim)
    variance, turned = (index.entries(each, 2)[..., layout.head_dim:] for each in (keys, backbone.rotate(keys, turn)))
    assert torch.allclose(variance, turned, atol=1e-5)
    full = INDEXES['mean_variance'].entries(keys, 2)[..., layout.head_dim:]
    assert torch.allclose(variance, full.unflatten(-1, (2, -1)).mean(-2), atol=1e-6)


@pytest.mark.parametrize('name', INDEXES)
def test_what_the_numbers_of_an_entry_say_is_the_root_of_the_mean_square_of_what_they_are_multiplied_with(name):
    torch.manual_seed(5)
    scale = torch.rand(8) + .1
    rows = torch.randn(200_000, 8) * scale
    of_rows = INDEXES[name].queries(rows).square().mean(dim=0).sqrt()
    assert torch.allclose(INDEXES[name].says(scale.square()), of_rows, rtol=.03)


def test_bytes_are_those_that_are_allocated(backbone, frames):
    stream = watched(backbone, frames, 40)
    key, value, visual = stream.detailed.rows()
    assert stream.detailed.bytes == (key.nbytes + value.nbytes + visual.nbytes + stream.detailed.pages.bytes
                                     + backbone.prefix().tokens * backbone.kv_bytes_per_token)
    assert visual.sum() == sum(record.visual_tokens for record in stream.detailed.records())


def test_a_machine_without_memory_left_is_a_bound_and_the_camera_goes_on_seeing(backbone, frames, monkeypatch):
    stream = watched(backbone, frames, 40)
    held, empty = stream.detailed.rows()[0].shape[2], KVLayout.empty

    def full(layout: KVLayout, tokens: int) -> torch.Tensor:
        if layout is backbone.layout and tokens > held:
            raise torch.OutOfMemoryError('no room')
        return empty(layout, tokens)

    monkeypatch.setattr(KVLayout, 'empty', full)
    for index in range(40, 120):
        stream.step(frames[index % 32], (index + 1) * SECOND // 2)
    assert stream.steps == 60 and stream.forgotten_frames > 0 and stream.frames == 120 - stream.forgotten_frames
    assert stream.answer('is the door open?', max_tokens=2).first_stamp_ns == stream.first_stamp_ns > SECOND // 2


@pytest.mark.parametrize('options,word', [({'page_tokens': 0}, 'page_tokens'), ({'index': 'magic'}, 'mean_variance'),
                                          ({'device_cache_bytes': 1}, 'device_cache_mb')])
def test_bad_sizes_are_named(options, word, backbone):
    with pytest.raises(ParameterError, match=word):
        VideoStream(backbone, **options)
