"""The memory on disk under killed writers, power cuts, full and read-only disks, and damaged files."""
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from store_writer import IDENTITY, QUOTA_BYTES, SHAPE, main, parts_of

import statekv_ros.store.anchor as anchor
from statekv_ros.errors import StoreError, StoreFull
from statekv_ros.store import MemoryStore, StoreReader
from statekv_ros.store.cli import main as statekv_memory

PAGE_BYTES = 4096
KILLS = 25


def opened(folder, quota=QUOTA_BYTES, sync_period_s=2.0) -> MemoryStore:
    return MemoryStore.open(folder, IDENTITY, quota, sync_period_s)


def require_whole(store: StoreReader) -> list[int]:
    """Every step held equals, to the bit, what was put under its number; returns the numbers."""
    steps = [step for step, _ in store.steps('front')]
    for step in steps:
        header, parts = store.load_step('front', step)
        assert header == {'step': step} and parts.keys() == parts_of(step).keys()
        for name, value in parts_of(step).items():
            assert parts[name] == value if isinstance(value, bytes) else torch.equal(parts[name], value), (step, name)
    assert steps == list(range(steps[0], steps[-1] + 1)) if steps else True
    return steps


def test_killed_at_random_moments_every_committed_step_is_there_and_whole(tmp_path):
    chance, last, committed = random.Random(5), -1, []
    for _ in range(KILLS):
        out, say = os.pipe()
        writer = os.fork()
        if not writer:
            os.close(out)
            main(tmp_path, last + 1, os.fdopen(say, 'w'))
        os.close(say)
        said = os.fdopen(out)
        for _ in range(chance.randrange(1, 40)):
            committed.append(int(said.readline()))
        # Anywhere within what comes next: a step, a state, a flush, or between them.
        time.sleep(chance.random() * .01)
        os.kill(writer, signal.SIGKILL)
        committed += map(int, said.read().split())
        said.close()
        os.waitpid(writer, 0)
        with opened(tmp_path) as store:
            assert store.check() == []
            steps = require_whole(store)
            assert steps[-1] - committed[-1] in (0, 1), 'at most the step in progress is not said yet'
            assert store.load_state('front')[0]['step'] in (committed[-1], committed[-1] + 1)
            last = steps[-1]
            assert store.file_bytes() <= QUOTA_BYTES


def power_cut(folder: Path, flushed: bytes, chance: random.Random) -> None:
    """What the disk may hold then: since the last flush, each page was written or not, the head pages too."""
    data = folder / 'data.mdb'
    now, share = data.read_bytes(), chance.random()
    mixed = bytearray(now)
    for start in range(0, len(now), PAGE_BYTES):
        if chance.random() < (share if start >= 2 * PAGE_BYTES else .5):
            mixed[start:start + PAGE_BYTES] = flushed[start:start + PAGE_BYTES].ljust(min(PAGE_BYTES, len(now) - start), b'\0')
    with data.open('r+b') as file:
        file.write(mixed)


@pytest.mark.parametrize('seed', range(12))
def test_after_a_power_cut_the_memory_is_as_it_was_flushed_last_whatever_pages_came_through(tmp_path, seed, monkeypatch):
    chance, folder = random.Random(seed), tmp_path / 'memory'
    steps, flush_at = chance.randrange(5, 80), chance.randrange(80)
    ready, say = os.pipe()
    writer = os.fork()
    if not writer:
        store = opened(folder, sync_period_s=1000.0)
        flushes = store._anchor._number
        for step in range(steps):
            store.put('front', step, {'step': step}, parts_of(step))
            if step == flush_at:
                store.sync()
            if store._anchor._number != flushes:        # it also flushes when much has left
                flushes = store._anchor._number
                shutil.copy(folder / 'data.mdb', tmp_path / 'flushed')
                held = [step for step, _ in store.steps('front')]
        os.write(say, f'{held[0]} {held[-1]}'.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(writer, 0)
    oldest, newest = map(int, os.read(ready, 100).split())
    power_cut(folder, (tmp_path / 'flushed').read_bytes(), chance)
    monkeypatch.setattr(anchor, 'boot_id', lambda: b'the next start of the machine')
    with opened(folder) as store:
        assert store.check() == []
        assert require_whole(store) == list(range(oldest, newest + 1))
        store.put('front', newest + 1, {'step': newest + 1}, parts_of(newest + 1))
    with opened(folder) as store:
        assert require_whole(store)[-1] == newest + 1, 'what came after the restart is not taken back again'


def test_on_a_full_disk_a_step_is_refused_nothing_is_lost_and_it_goes_on_when_there_is_room(mounted):
    disk = mounted('-t', 'tmpfs', '-o', 'size=3m', 'tmpfs')
    ballast = disk / 'ballast'
    ballast.write_bytes(bytes(1_000_000))
    with opened(disk / 'memory', 50_000_000) as store:
        with pytest.raises(StoreFull, match=r'memory cannot be used: the disk is full: make room there.*memory_dir'):
            for step in range(100):
                store.put('front', step, {'step': step}, parts_of(step))
        steps = require_whole(store)
        assert len(steps) > 3 and store.check() == []
        with pytest.raises(StoreFull):
            store.put('front', step, {'step': step}, parts_of(step))
        store.sync()
        ballast.unlink()
        store.put('front', step, {'step': step}, parts_of(step))
    with opened(disk / 'memory', 50_000_000) as store:
        assert require_whole(store) == [*steps, step]


def test_a_memory_cannot_begin_on_a_full_disk_and_says_so(mounted):
    disk = mounted('-t', 'tmpfs', '-o', 'size=64k', 'tmpfs')
    (disk / 'memory').mkdir()
    with (disk / 'ballast').open('wb', buffering=0) as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(PAGE_BYTES))
    with pytest.raises(StoreFull, match='the disk is full'):
        opened(disk / 'memory')


def test_a_read_only_folder_is_refused_for_writing_and_can_be_looked_into(tmp_path, mounted, capsys):
    with opened(tmp_path / 'memory') as store:
        store.put('front', 0, {'step': 0}, parts_of(0))
    folder = mounted('--bind', str(tmp_path / 'memory'))
    subprocess.run(['mount', '-o', 'remount,ro,bind', str(folder)], check=True)
    with pytest.raises(StoreError, match='it lies on a read-only file system: mount it writable.*memory_dir'):
        opened(folder)
    assert statekv_memory(['check', str(folder)]) == 0
    with StoreReader.look(folder) as store:
        assert require_whole(store) == [0]


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match='no permission: make it belong to the user'):
        opened(tmp_path / 'memory')


def test_a_folder_that_nobody_may_change_is_refused_by_name(tmp_path):
    if subprocess.run(['chattr', '+i', tmp_path], capture_output=True).returncode:
        pytest.skip('this file system has no immutable folders, or they are not permitted here')
    try:
        with pytest.raises(StoreError, match='no permission: make it belong to the user who runs this.*memory_dir'):
            opened(tmp_path / 'memory')
        with pytest.raises(StoreError, match='no permission'):
            opened(tmp_path)
    finally:
        subprocess.run(['chattr', '-i', tmp_path], check=True)


def test_a_memory_dir_that_is_a_file_or_lies_in_one_is_refused(tmp_path):
    (tmp_path / 'file').write_text('important')
    with pytest.raises(StoreError, match='is a file, not a folder'):
        opened(tmp_path / 'file')
    with pytest.raises(StoreError, match='a file lies where a folder is needed'):
        opened(tmp_path / 'file/memory')
    assert (tmp_path / 'file').read_text() == 'important'


@pytest.fixture(scope='module')
def written(tmp_path_factory) -> Path:
    """A closed memory of 20 steps."""
    folder = tmp_path_factory.mktemp('written')
    with opened(folder) as store:
        for step in range(20):
            store.put('front', step, {'step': step}, parts_of(step))
    return folder


@pytest.mark.parametrize('keep', [0, 100, 5000, 8192, 60_000, .3, .7, .98])
def test_a_file_that_lost_its_end_is_said_to_be_damaged_and_left_for_export(written, tmp_path, keep):
    folder = shutil.copytree(written, tmp_path / 'memory')
    data = folder / 'data.mdb'
    size = keep if isinstance(keep, int) else int(keep * data.stat().st_size)
    os.truncate(data, size)
    before = data.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match='damaged.*statekv-memory export'):
            opened(folder)
        assert data.read_bytes() == before
    # What is whole comes out.
    code = statekv_memory(['export', str(folder), str(tmp_path / 'out')])
    assert code in (1, 2) and (code == 2 or any((tmp_path / 'out').iterdir()))


def test_a_flipped_bit_in_a_value_is_found_by_check_and_the_rest_is_exported(written, tmp_path, capsys):
    folder = shutil.copytree(written, tmp_path / 'memory')
    content = bytearray((folder / 'data.mdb').read_bytes())
    value = bytes(parts_of(7)['key'].view(torch.uint8).flatten().numpy())
    at = content.index(value) + 12_345
    content[at] ^= 4
    (folder / 'data.mdb').write_bytes(content)
    assert statekv_memory(['check', str(folder)]) == 1
    assert "part 'key' of step 7 of 'front' is no longer what was stored" in capsys.readouterr().out
    assert statekv_memory(['export', str(folder), str(tmp_path / 'out'), '--steps-per-file', '1']) == 1
    assert len(list((tmp_path / 'out').iterdir())) == 19
    with opened(folder) as store, pytest.raises(StoreError, match='damaged'):
        assert store.load_step('front', 8)[1]['key'].shape == SHAPE
        store.load_step('front', 7)


def spoil_tree(data: bytearray) -> None:
    """Leave one child to each branch page; LMDB asserts that there are more."""
    for start in range(0, len(data), PAGE_BYTES):
        number, _, flags, _, _ = struct.unpack_from('<QHHHH', data, start)
        if number == start // PAGE_BYTES and flags == 1:
            struct.pack_into('<H', data, start + 12, 16 + 2)


def open_in_a_child(folder: Path) -> tuple[int, str]:
    """Exit code of a process that opens the memory and writes a step, and what it was refused with."""
    done = subprocess.run([sys.executable, '-c', OPENS, folder], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.returncode, done.stdout


OPENS = """
import sys
from store_writer import IDENTITY, QUOTA_BYTES
from statekv_ros.errors import StoreError
from statekv_ros.store import MemoryStore
try:
    with MemoryStore.open(sys.argv[1], IDENTITY, QUOTA_BYTES) as store:
        store.put('front', 20, {}, {'value': bytes(1000)})
except StoreError as error:
    print(error)
"""


def test_a_tree_that_ends_the_process_does_so_once_and_is_said_to_be_damaged_from_then_on(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / 'memory')
    data = bytearray((folder / 'data.mdb').read_bytes())
    spoil_tree(data)
    (folder / 'data.mdb').write_bytes(data)
    assert open_in_a_child(folder)[0] < 0, 'after a clean end nothing is looked for'
    data = (folder / 'data.mdb').read_bytes()
    for _ in range(2):
        code, said = open_in_a_child(folder)
        assert code == 0 and 'is damaged (a process that went through its trees was ended by SIG' in said
    with pytest.raises(StoreError, match='is damaged .*statekv-memory export'):
        opened(folder)
    assert (folder / 'data.mdb').read_bytes() == data
