"""The memory on disk: what goes in comes out, the quota holds, and what cannot be used is refused by name."""
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import lmdb
import pytest
import torch
from safetensors.torch import load_file
from store_writer import IDENTITY, QUOTA_BYTES, SHAPE, parts_of

from statekv_ros.errors import ParameterError, StoreError, StoreFull, StoreMismatch
from statekv_ros.store import MemoryStore, StoreReader
from statekv_ros.store.cli import main as statekv_memory
from statekv_ros.store.folder import file_system
from statekv_ros.store.reader import ABOUT, FORMAT_VERSION, RECORDS

WRITER = Path(__file__).with_name('store_writer.py')


def opened(folder, quota=QUOTA_BYTES, **changed) -> MemoryStore:
    return MemoryStore.open(folder, {**IDENTITY, **changed}, quota)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, dtype and shape."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.fixture
def store(tmp_path):
    with opened(tmp_path / 'memory') as made:
        yield made


@pytest.fixture
def other_writer(tmp_path):
    """A process that writes tmp_path/memory; it has committed a step."""
    process = subprocess.Popen([sys.executable, WRITER, tmp_path / 'memory', '0'], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == '0'
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize('value', [
    torch.randn(3, 2, 5, 8), torch.randn(4, 6).bfloat16(), torch.randn(4, 6).half(), torch.arange(7), torch.tensor(2.5),
    torch.zeros(0, 3), torch.randint(0, 255, (9, 5), dtype=torch.uint8), torch.tensor([True, False]),
    torch.randn(4, 6).t(), torch.randn(8, 6)[::2, 1:4]], ids=lambda value: f'{value.dtype}-{tuple(value.shape)}')
def test_every_tensor_comes_back_bit_equal_whatever_its_dtype_and_strides(store, value):
    store.put('front', 0, {}, {'value': value})
    assert same(store.load_step('front', 0)[1]['value'], value)


def test_runs_equal_the_bytes_of_the_whole_and_own_their_memory(tmp_path):
    wholes = {step: parts_of(step)['key'].view(torch.uint8).flatten().numpy().tobytes() for step in (4, 5, 6)}
    size = len(wholes[4])
    asked = [((5,), [slice(0, size)]), ((4, 6), [slice(7, 40)]), ((6, 5, 6), [slice(size - 1, size), slice(8, 8), slice(2, 101)])]
    with opened(tmp_path) as store:
        for step in wholes:
            store.put('front', step, {}, parts_of(step))
        found = [store.runs('front', 'key', steps, [(size, runs)] * len(steps)) for steps, runs in asked]
        store.clear('front')
    assert found == [[b''.join(wholes[step][run] for run in runs) for step in steps] for steps, runs in asked]


def test_headers_states_and_bytes_survive_the_next_start(tmp_path):
    with opened(tmp_path) as store:
        for step in (-1, 0, 1, 2):
            store.put('front', step, {'stamp': step * 10}, parts_of(step + 1))
        store.put('rear', 0, {}, {'note': b'other camera'})
        store.save_state('front', {'at': 2}, {'kept': torch.arange(5), 'waiting': b'half'})
    with opened(tmp_path) as store:
        assert store.steps('front') == [(step, {'stamp': step * 10}) for step in (-1, 0, 1, 2)]
        assert store.cameras() == ['front', 'rear'] and store.steps('unknown') == []
        header, parts = store.load_state('front')
        assert header == {'at': 2} and same(parts['kept'], torch.arange(5)) and parts['waiting'] == b'half'
        assert store.load_state('rear') is None and store.load_step('rear', 7) is None
        assert store.bytes('rear') == 12 and store.bytes() == store.bytes('front') + 12
        assert store.check() == []


def test_a_new_version_of_a_step_or_state_takes_the_place_of_the_old_with_all_its_parts(store):
    store.put('front', 0, {'format': 'bf16'}, {'key': torch.randn(4, 4), 'value': torch.randn(4, 4)})
    store.put('front', 0, {'format': 'int4'}, {'key': torch.zeros(2)})
    store.save_state('front', {}, {'a': b'1', 'b': b'2'})
    store.save_state('front', {}, {'a': b'3'})
    header, parts = store.load_step('front', 0)
    assert header == {'format': 'int4'} and list(parts) == ['key'] and store.load_state('front')[1] == {'a': b'3'}
    assert store.bytes() == 8 + 1


def test_a_new_folder_is_its_users_alone_and_one_that_is_there_keeps_its_rights(tmp_path):
    shared = tmp_path / 'shared'
    shared.mkdir(mode=0o750)
    for folder, rights in ((tmp_path / 'new', 0o700), (shared, 0o750)):
        opened(folder).close()
        assert folder.stat().st_mode & 0o777 == rights


def test_clear_forgets_one_camera_on_disk_too(tmp_path):
    with opened(tmp_path) as store:
        for camera in ('front', 'front2'):
            store.put(camera, 0, {}, parts_of(0))
            store.save_state(camera, {}, {'a': b'1'})
        store.clear('front')
    with opened(tmp_path) as store:
        assert store.cameras() == ['front2'] and store.bytes('front') == 0 and store.load_state('front') is None
        assert store.load_step('front2', 0) is not None


@pytest.mark.parametrize('sizes', [(400_000,), (400_000, 150_000), (390_000, 3_000, 260_000, 70_000)])
def test_the_oldest_steps_leave_and_the_file_keeps_to_the_quota_within_a_few_percent(tmp_path, sizes):
    quota, steps, left = 40_000_000, 350, []
    with opened(tmp_path, quota) as store:
        store.put('front', -1, {}, {'prefix': b'p' * 5_000})
        for step in range(steps):
            left += store.put(f'camera{step % len(sizes)}', step, {}, {'value': bytes(sizes[step % len(sizes)])})
            assert store.file_bytes() <= quota
        held = sorted(step for camera in store.cameras() if camera != 'front' for step, _ in store.steps(camera))
        assert [step for _, step in left] == list(range(steps - len(held)))
        assert held == list(range(steps - len(held), steps)), 'of all cameras together the oldest leave first'
        assert store.bytes() >= .93 * quota
        assert store.load_step('front', -1) is not None, 'the prefix stays'


def test_steps_of_wildly_mixed_sizes_find_room_though_what_is_free_does_not_lie_together(tmp_path):
    generator = torch.Generator().manual_seed(0)
    with opened(tmp_path, 6_000_000) as store:
        for step in range(600):
            size = int(torch.randint(100, 60_000, (), generator=generator))
            store.put('front', step, {}, {'value': bytes(size), 'note': b'x' * (size % 3_000)})
        assert store.steps('front')[-1][0] == 599 and store.file_bytes() <= 6_000_000 and store.check() == []
        assert store.bytes() > .7 * 6_000_000


def test_a_step_larger_than_the_quota_is_refused_and_nothing_leaves_for_it(store):
    store.put('front', 0, {}, parts_of(0))
    with pytest.raises(StoreFull, match='quota is 4000000 bytes.*disk_cache_gb'):
        store.put('front', 1, {}, {'value': bytes(3_900_000)})
    store.put('front', 1, {}, parts_of(1))
    assert [step for step, _ in store.steps('front')] == [0, 1]


def test_what_is_not_there_or_has_another_size_is_not_read_and_names_that_cannot_be_are_refused(store):
    store.put('front', 0, {}, {'value': torch.zeros(4)})
    begin, more = (16, [slice(0, 4)]), (20, [slice(0, 4)])
    assert store.runs('front', 'value', [0, 1, 0, 0], [begin, begin, more, begin]) == [b'\0' * 4, None, None, b'\0' * 4]
    assert store.runs('front', 'key', [0], [begin]) == store.runs('back', 'value', [0], [begin]) == [None]
    for camera in ('', 'a\0b', 'x' * 300):
        with pytest.raises(StoreError, match='camera must have 1 to 255 bytes'):
            store.put(camera, 0, {}, {})
    with pytest.raises(StoreError, match='what JSON knows'):
        store.put('front', 1, {'bad': torch.zeros(1)}, {})


@pytest.mark.parametrize('quota', [0, -5, float('nan'), 1000])
def test_a_quota_that_cannot_work_names_its_parameter(tmp_path, quota):
    with pytest.raises(ParameterError, match='disk_cache_gb'):
        opened(tmp_path, quota)
    with pytest.raises(ParameterError, match='sync_period_s'):
        MemoryStore.open(tmp_path, IDENTITY, QUOTA_BYTES, sync_period_s=float('nan'))


def test_another_identity_is_refused_with_both_values_and_the_memory_stays(tmp_path):
    with opened(tmp_path) as store:
        store.put('front', 0, {}, parts_of(0))
    before = (tmp_path / 'data.mdb').read_bytes()
    with pytest.raises(StoreMismatch, match=r'another dtype \(nothing there, int4 here\), model \(patrol there, qwen here\)'):
        opened(tmp_path, model='qwen', dtype='int4')
    assert (tmp_path / 'data.mdb').read_bytes() == before
    with opened(tmp_path) as store:
        assert same(store.load_step('front', 0)[1]['key'], parts_of(0)['key'])


def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path):
    opened(tmp_path).close()
    environment = lmdb.open(str(tmp_path), max_dbs=2)
    with environment.begin(write=True) as transaction:
        transaction.put(ABOUT, json.dumps({'version': FORMAT_VERSION + 1, 'something': 'else'}).encode())
    environment.close()
    for use in (opened, StoreReader.look):
        words = f'format version {FORMAT_VERSION + 1}, and this package knows up to {FORMAT_VERSION}'
        with pytest.raises(StoreError, match=words):
            use(tmp_path)


def test_a_memory_of_the_first_format_is_read_and_goes_on_in_the_present_one(tmp_path):
    with opened(tmp_path) as store:
        for step in range(2):
            store.put('front', step, {'at': step}, parts_of(step))
    environment = lmdb.open(str(tmp_path), max_dbs=2)
    with environment.begin(write=True) as transaction:
        transaction.put(ABOUT, json.dumps({**json.loads(transaction.get(ABOUT)), 'version': 1}).encode())
        with transaction.cursor(environment.open_db(RECORDS, txn=transaction)) as cursor:
            for key, value in list(cursor):
                plain = zlib.decompress(value[4:])
                cursor.put(key, zlib.crc32(plain).to_bytes(4, 'big') + plain)
    environment.close()
    for look in (StoreReader.look, opened):
        with look(tmp_path) as store:
            header, parts = store.load_step('front', 1)
            assert header == {'at': 1} and same(parts['key'], parts_of(1)['key']) and store.check() == []
    with opened(tmp_path) as store:
        store.put('front', 2, {'at': 2}, parts_of(2))
        assert [header for _, header in store.steps('front')] == [{'at': 0}, {'at': 1}, {'at': 2}]
    environment = lmdb.open(str(tmp_path), max_dbs=2)
    with environment.begin() as transaction:
        assert json.loads(transaction.get(ABOUT))['version'] == FORMAT_VERSION > 1
    environment.close()


def test_a_data_file_of_another_program_is_refused_and_left_as_it_is(tmp_path):
    environment = lmdb.open(str(tmp_path / 'lmdb'))
    with environment.begin(write=True) as transaction:
        transaction.put(b'their', b'data')
    environment.close()
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text/data.mdb').write_bytes(b'no database at all ' * 1000)
    for name, words in (('lmdb', 'not a memory of this package'), ('text', 'damaged')):
        before = (tmp_path / name / 'data.mdb').read_bytes()
        with pytest.raises(StoreError, match=words):
            opened(tmp_path / name)
        assert (tmp_path / name / 'data.mdb').read_bytes() == before


def test_a_second_writer_in_another_process_or_in_this_one_is_told_who_has_it(tmp_path, other_writer):
    with pytest.raises(StoreError, match=rf'being written by process {other_writer.pid} on .* \(/writer\)'):
        opened(tmp_path / 'memory')
    with opened(tmp_path / 'own'), pytest.raises(StoreError, match=f'being written by process {os.getpid()} on'):
        opened(tmp_path / 'own')
    opened(tmp_path / 'own').close()


def test_a_forked_child_neither_uses_the_memory_nor_keeps_it_from_the_next(tmp_path):
    store = opened(tmp_path)
    store.put('front', 0, {}, parts_of(0))
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            store.steps('front')
        except StoreError as error:
            os.write(tell, str(error).encode())
        store.close()
        os.kill(os.getpid(), signal.SIGSTOP)        # it outlives its parent's store
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        assert b'forked from it' in os.read(told, 1000)
        store.put('front', 1, {}, parts_of(1))
        store.close()
        with opened(tmp_path) as again:
            assert len(again.steps('front')) == 2 and again.check() == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_file_system_of_a_folder_is_known():
    assert file_system(Path('/proc')) == 'proc'


# --- statekv-memory ---------------------------------------------------------------------------------------------------
def test_info_and_check_tell_of_a_memory_that_is_being_written(tmp_path, other_writer, capsys):
    assert statekv_memory(['info', str(tmp_path / 'memory'), '--json']) == 0
    told = json.loads(capsys.readouterr().out)
    assert told['identity'] == IDENTITY and told['cameras']['front']['steps'] >= 1 and told['file_bytes'] <= QUOTA_BYTES
    assert statekv_memory(['check', str(tmp_path / 'memory')]) == 0 and 'whole' in capsys.readouterr().out


def test_info_gives_hours_from_the_stamps_of_the_headers(tmp_path, capsys):
    with opened(tmp_path) as store:
        for step in range(3):
            store.put('front', step, {'first_stamp_ns': step * 1800 * 10**9, 'last_stamp_ns': step * 1800 * 10**9}, {'v': b'1'})
    assert statekv_memory(['info', str(tmp_path)]) == 0
    assert '1.00' in (text := capsys.readouterr().out) and 'model: patrol' in text


def test_export_gives_safetensors_that_equal_what_was_put(tmp_path):
    with opened(tmp_path / 'memory') as store:
        for step in range(5):
            store.put('front/left', step, {'stamp': step}, parts_of(step))
    assert statekv_memory(['export', str(tmp_path / 'memory'), str(tmp_path / 'out'), '--steps-per-file', '2']) == 0
    files = sorted((tmp_path / 'out').iterdir())
    assert [file.name for file in files] == [f'front_left-{step:08d}.safetensors' for step in (0, 2, 4)]
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    for step in range(5):
        assert same(tensors[f'{step}.key'], parts_of(step)['key']) and bytes(tensors[f'{step}.note']) == parts_of(step)['note']


def test_the_command_says_what_it_cannot_use(tmp_path, capsys):
    opened(tmp_path / 'empty').close()
    (tmp_path / 'full').mkdir()
    with opened(tmp_path / 'one') as store:
        store.put('front', 0, {}, parts_of(0))
    for arguments, words in ((['info', tmp_path / 'nothing'], 'holds no memory'),
                             (['export', tmp_path / 'empty', tmp_path / 'out'], 'holds no steps: there is nothing to export'),
                             (['export', tmp_path / 'one', tmp_path / 'full'], 'exists: choose another folder'),
                             (['export', tmp_path / 'one', tmp_path / 'out', '--camera', 'rear'], "no camera 'rear'"),
                             (['export', tmp_path / 'one', tmp_path / 'out', '--steps-per-file', '0'], 'must be at least 1')):
        assert statekv_memory([str(argument) for argument in arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_the_command_needs_neither_torch_nor_transformers_to_look():
    code = 'import sys, statekv_ros.store.cli; print([name for name in ("torch", "transformers") if name in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
