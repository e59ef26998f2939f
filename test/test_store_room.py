"""A memory whose quota is full while others read it: what leaves makes room once they are done, and nothing leaves in vain."""
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import lmdb
import pytest
from store_writer import IDENTITY

import statekv_ros.store.store as store_module
from statekv_ros.errors import StoreFull
from statekv_ros.store import MemoryStore

QUOTA = 1_200_000
STEP_BYTES = 30_000
FULL = 100              # steps; many times what the quota holds
READER = """
import sys
from statekv_ros.store import StoreReader
with StoreReader.look(sys.argv[1]) as store, store._reading() as transaction:
    transaction.get(b'about')
    print('reads', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path):
    with MemoryStore.open(tmp_path / 'memory', IDENTITY, QUOTA) as made:
        put(made, range(5))
        yield made


def put(store: MemoryStore, steps) -> list[int]:
    """Store steps; returns those that left."""
    return [left for step in steps for _, left in store.put('front', step, {}, {'value': bytes(STEP_BYTES)})]


def held(store: MemoryStore) -> list[int]:
    return [step for step, _ in store.steps('front')]


@contextmanager
def another_process_that_reads(store: MemoryStore):
    with subprocess.Popen([sys.executable, '-c', READER, store.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.readline().strip() == 'reads'
        try:
            yield process
        finally:
            process.kill()


def test_a_step_waits_for_who_reads_an_old_state_and_is_not_refused(store, monkeypatch):
    monkeypatch.setattr(store_module, '_HOLDERS_S', 60.0)
    begun, found, real = threading.Event(), threading.Event(), store_module.holders

    def read():
        with store._reading():
            begun.set()
            found.wait(60)      # until the writer has come upon it

    def holders(*arguments):
        reading = real(*arguments)
        if reading:
            found.set()
        return reading

    monkeypatch.setattr(store_module, 'holders', holders)
    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    left = put(store, range(5, FULL))
    reader.join()
    assert found.is_set() and held(store) == list(range(len(left), FULL)) and left == list(range(len(left)))


def test_while_a_process_reads_an_old_state_for_good_nothing_leaves_in_vain_and_it_is_named(store):
    with another_process_that_reads(store) as process:
        with pytest.raises(StoreFull, match=f'process {process.pid} reads what was there before'):
            for step in range(5, FULL):
                put(store, [step])
        before = held(store)
        for _ in range(3):
            with pytest.raises(StoreFull, match=f'process {process.pid}'):
                put(store, [step])
        assert held(store) == before and len(before) > 10
    assert put(store, range(step, step + FULL)) and held(store)[-1] == step + FULL - 1 and store.check() == []


def test_a_reader_that_was_killed_holds_nothing(store):
    with another_process_that_reads(store) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        left = put(store, range(5, FULL))
    assert held(store) == list(range(len(left), FULL)) and left == list(range(len(left)))


@pytest.mark.parametrize('seed,quota,parts,state_bytes,every', [
    (0, 1_600_000, 4, 70_000, 4), (1, 2_000_000, 4, 50_000, 2), (2, 1_100_000, 2, 70_000, 4), (3, 1_300_000, 3, 50_000, 2)])
def test_a_large_state_finds_room_among_small_steps_and_each_that_left_is_told(tmp_path, seed, quota, parts, state_bytes, every):
    chance, left, steps = random.Random(seed), [], 400
    # Flushed only when something must be: nothing depends on time.
    with MemoryStore.open(tmp_path, IDENTITY, quota, sync_period_s=1000.0) as store:
        for step in range(steps):
            left += store.put('front', step, {}, {str(part): bytes(chance.randrange(200, 8_500)) for part in range(parts)})
            if step % every == 0:
                left += store.save_state(chance.choice(('front', 'rear')), {'at': step}, {'value': bytes(state_bytes)})
        assert left == [('front', step) for step in range(len(left))] and held(store) == list(range(len(left), steps))
        assert store.file_bytes() <= quota and store.check() == []


@pytest.mark.parametrize('times', [1, 2])
def test_where_there_is_no_room_to_forget_in_it_is_tried_again_with_less(store, monkeypatch, times):
    writes, drops, write, drop = [], [], store._write, store._drop

    def fails(calls: list, until: int, real):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) <= until:
                raise lmdb.MapFullError('no room')
            return real(*arguments)
        return call

    monkeypatch.setattr(store, '_write', fails(writes, 2, write))
    monkeypatch.setattr(store, '_drop', fails(drops, times, drop))
    before = held(store)
    if times == 1:
        assert [left for _, left in store.put('front', 5, {}, {'value': bytes(STEP_BYTES)})] == before[:1]
        assert held(store) == [*before[1:], 5]
    else:
        with pytest.raises(StoreFull, match='no room left to forget in'):
            store.put('front', 5, {}, {'value': bytes(STEP_BYTES)})
        assert held(store) == before
        monkeypatch.undo()
        put(store, [5])
        assert held(store) == [*before, 5]
