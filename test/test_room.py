"""Room that grows over hours: what it takes of main memory, and what is given back."""
import mmap

import numpy as np
import pytest
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.detailed import leaves
from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
from statekv_ros.memory.detailed.leaves import CHAPTER, VOLUME
from statekv_ros.memory.detailed.room import give_back, zeros, zeros_of_numpy
from statekv_ros.memory.detailed.table import PageTable

CPU = torch.device('cpu')
PAGE_BYTES = mmap.PAGESIZE


def resident(tensor: torch.Tensor) -> int:
    """Bytes of main memory that the room of a tensor takes: of each page the kernel tells whether it is there."""
    storage = tensor.untyped_storage()
    first, stop = storage.data_ptr() // PAGE_BYTES, -(-(storage.data_ptr() + storage.nbytes()) // PAGE_BYTES)
    with open('/proc/self/pagemap', 'rb') as pages:
        pages.seek(first * 8)
        there = np.frombuffer(pages.read((stop - first) * 8), np.uint64) >> np.uint64(63)
    return int(there.sum()) * PAGE_BYTES


def test_rows_that_are_given_back_take_no_memory_and_the_others_are_as_they_were():
    room = zeros(2, 3, 4096, 64, dtype=torch.float32, device=CPU)
    assert not resident(room), 'not written yet'
    room += 1
    before = resident(room)
    give_back(room[:, :, 1000:3001])
    assert resident(room) <= before - 6 * (2001 * 256 - 2 * PAGE_BYTES)
    assert (room[:, :, :1000] == 1).all() and (room[:, :, 3001:] == 1).all()
    room[:, :, 1000:3001] = 2
    assert room.sum() == 6 * 64 * (2001 * 2 + 4096 - 2001)


@pytest.mark.parametrize('rows', [slice(0, 0), slice(5, 9), slice(0, 64)])
def test_room_that_is_small_is_left_alone(rows):
    room = zeros(1, 64, 16, dtype=torch.float16, device=CPU) + 1
    give_back(room[:, rows])
    assert (room == 1).all()


@pytest.mark.parametrize('shape,dtype', [((17, 64), np.int64), ((17, 20_000), np.int64), ((7, 20_000), np.float64)])
def test_room_of_numpy_is_zeros_that_can_be_written(shape, dtype):
    room = zeros_of_numpy(*shape, dtype=np.dtype(dtype))
    assert room.shape == shape and room.dtype == dtype and not room.any()
    room[1] = 3
    assert room.sum() == 3 * shape[1]


def test_exact_entries_of_what_has_become_codes_take_no_memory():
    layout = KVLayout(1, 2, 64, torch.float32, CPU)
    table, most = PageTable(layout, INDEXES[DEFAULT_INDEX]), 0
    entries = torch.randn(1, 2, 64, table.index.entry_width(64))
    page = entries[:, :, :1].numel() * 2
    for begin in range(0, (2 * VOLUME + 2) * CHAPTER, 64):
        table.append(entries, begin, 64 * 9)
        if table.leaves.codes.stop:
            exact = table.stop - table.leaves.codes.stop
            most = max(most, resident(table._exact) - exact * page)
    assert table.leaves.codes.stop == 2 * VOLUME * CHAPTER
    assert most < 600 * page, 'most pages that are neither held exactly nor given back'


def test_what_sorting_leaves_free_is_given_back_whenever_a_chapter_or_a_volume_is_sorted_in_all_heads(monkeypatch):
    given = []
    monkeypatch.setattr(leaves, 'give_back_free_memory', lambda: given.append((min(table.leaves.stops), table.leaves.codes.stop)))
    table = PageTable(KVLayout(2, 2, 16, torch.float32, CPU), INDEXES[DEFAULT_INDEX])
    entries = torch.randn(2, 2, 64, table.index.entry_width(16))
    for begin in range(0, (2 * VOLUME + 2) * CHAPTER, 64):
        table.append(entries, begin, 64 * 9)
    assert [chapter for chapter, _ in given] == sorted(chapter for chapter, _ in given)
    assert {chapter for chapter, _ in given} == set(range(1, 2 * VOLUME + 2))
    assert {stop // CHAPTER for _, stop in given} == {0, VOLUME, 2 * VOLUME} and len(given) <= 2 * VOLUME + 3
