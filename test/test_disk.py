"""The memory on disk beside the engine: who waits for whom, what the quota takes, and what a folder may hold."""
import json
from types import SimpleNamespace

import lmdb
import pytest
import torch

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import ParameterError, StoreError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.saved.restoring import restore
from statekv_ros.memory.saved.saving import Saving
from statekv_ros.node import disk
from statekv_ros.node.camera import Camera
from statekv_ros.node.engine import Engine
from statekv_ros.node.memory_folder import identity_of, open_memory
from statekv_ros.node.questions import Question
from statekv_ros.store import StoreReader
from statekv_ros.store.reader import FORMAT_VERSION
from statekv_ros.store.tier import DiskTier

QUOTA = 50 * 10**6


class Node:
    """An engine with its disk; each test takes the engine's turns itself."""

    def __init__(self, backbone, folder, cameras=('front',), quota=QUOTA, mode='auto', policy='statekv(40)',
                 **stream_options):
        self.told, self.logged, self.outcomes, self.resets = [], [], [], []
        self.tiers = {name: DiskTier(packed=stream_options.get('detailed_format', 'bf16') != 'bf16') for name in cameras}
        self.streams = {name: VideoStream(backbone, policy, below=[self.tiers[name]], **stream_options) for name in cameras}
        identity = identity_of(backbone, self.streams, '0 to 0', '', 0)
        self.disk, self.problem = open_memory(folder, identity, self.streams, self.tiers, quota, 2.0, mode, 'test',
                                              self.told.append, self.logged.append)
        cameras = [Camera(name, stream, lambda message: (message.frame, name)) for name, stream in self.streams.items()]
        self.engine = Engine(cameras, lambda *_: None, lambda: 4, 16, self.logged.append, self.disk)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.disk is not None:
            assert self.disk.close()

    def put(self, frames, number: int, camera: str = 'front') -> None:
        """An image arrives."""
        self.engine.cameras[camera].mailbox.put(SimpleNamespace(frame=frames[number % len(frames)]), (number + 1) * SECOND)

    def watch(self, frames, begin: int, end: int, camera: str = 'front') -> None:
        """Images, each on disk before the next."""
        for number in range(begin, end):
            self.put(frames, number, camera)
            self.until(lambda: not self.engine.cameras[camera].mailbox.waiting and not self.disk.busy(camera))

    def until(self, done) -> None:
        while not done():
            self.engine.run_round()

    def ask(self) -> None:
        self.engine.ask(Question('is the door open?', ['front'], {'max_tokens': 3}, 600.0, self.outcomes.append))


@pytest.fixture
def tiny(backbone):
    return backbone


def test_an_image_waits_for_the_step_before_it_to_be_on_disk_and_answers_do_not(tiny, frames, tmp_path, monkeypatch):
    with Node(tiny, tmp_path / 'memory') as node:
        node.watch(frames, 0, 3)
        with node.disk._store._changing:        # a disk that takes its time: no commit can begin
            node.put(frames, 3)
            node.until(lambda: node.streams['front'].steps == 2)
            assert node.disk.busy('front')
            node.put(frames, 4)
            node.ask()
            node.until(lambda: node.outcomes)
            assert not node.outcomes[0].error
            node.engine.run_round()
            monkeypatch.setattr(disk, '_LONG_S', 0.0)
            assert 'has been written to for' in node.disk.problem
            assert node.engine.cameras['front'].mailbox.waiting and node.streams['front'].frames == 4
        node.until(lambda: node.streams['front'].frames == 5 and not node.disk.busy('front'))
        assert not node.disk.problem
    with StoreReader.look(tmp_path / 'memory') as store:
        assert [step for step, _ in store.steps('front')] == [-2, -1, 0, 1]


def test_a_reset_is_over_when_the_disk_has_forgotten_too(tiny, frames, tmp_path):
    with Node(tiny, tmp_path / 'memory', ('front', 'rear')) as node:
        for camera in node.streams:
            node.watch(frames, 0, 5, camera)
        with node.disk._store._changing:
            node.engine.reset(['front'], lambda *told: node.resets.append(told))
            node.engine.run_round()
            assert node.streams['front'].frames == 0 and not node.resets
        node.until(lambda: node.resets)
        assert node.resets == [(5, '')] and node.disk._store.cameras() == ['rear']


@pytest.mark.parametrize('policy', ['statekv(40)', 'window(4)'])
def test_a_quiet_cameras_context_outlives_its_steps_when_another_fills_the_quota(policy, tiny, frames, tmp_path):
    with Node(tiny, tmp_path / 'memory', ('front', 'rear'), 2 * 10**6, policy=policy) as node:
        node.watch(frames, 0, 40, 'rear')
        node.watch(frames, 0, 320, 'front')
        assert [step for step, _ in node.disk._store.steps('rear') if step >= 0] == []
        before = {name: stream.carried.copy() for name, stream in node.streams.items()}
        assert not node.logged
    with Node(tiny, tmp_path / 'memory', ('front', 'rear'), 2 * 10**6, policy=policy) as node:
        assert not node.problem and not node.logged
        assert node.streams['rear'].frames == 0 and node.streams['rear'].forgotten_frames == 40
        for name, stream in node.streams.items():
            for one, other in zip(before[name], stream.carried.copy(), strict=True):
                assert torch.equal(one, other)
        node.watch(frames, 40, 44, 'rear')
    with Node(tiny, tmp_path / 'memory', ('front', 'rear'), 2 * 10**6, policy=policy) as node:
        assert node.streams['rear'].frames == 4


def damage_end(folder) -> None:
    data = folder / 'data.mdb'
    with data.open('r+b') as file:
        file.truncate(data.stat().st_size // 2)


def make_newer(folder) -> None:
    with lmdb.open(str(folder), max_dbs=2) as environment, environment.begin(write=True) as transaction:
        about = json.loads(transaction.get(b'about'))
        transaction.put(b'about', json.dumps({**about, 'version': about['version'] + 1}).encode())


@pytest.mark.parametrize('spoil,words', [(damage_end, 'is damaged'), (make_newer, f'has format version {FORMAT_VERSION + 1}')])
def test_a_folder_that_cannot_be_understood_is_left_and_what_was_begun_beside_it_is_found(spoil, words, tiny, frames, tmp_path):
    folder = tmp_path / 'memory'
    with Node(tiny, folder) as node:
        node.watch(frames, 0, 12)
    spoil(folder)
    as_it_was = (folder / 'data.mdb').read_bytes()
    for begin in (0, 4):
        with Node(tiny, folder) as node:
            assert node.streams['front'].frames == begin
            assert words in node.problem and 'a new memory was begun in' in node.problem and words in node.logged[0]
            node.watch(frames, begin, begin + 4)
    with pytest.raises(StoreError, match=words):
        Node(tiny, folder, mode='require')
    assert (folder / 'data.mdb').read_bytes() == as_it_was


def test_never_leaves_what_is_there_and_begins_beside_it(tiny, frames, tmp_path):
    folder = tmp_path / 'memory'
    for _ in range(2):
        with Node(tiny, folder, mode='never') as node:
            assert node.streams['front'].frames == 0 and not node.problem
            node.watch(frames, 0, 4)
    with Node(tiny, folder) as node:
        assert node.streams['front'].frames == 4
    assert (folder / 'began-1' / 'data.mdb').exists()


def test_a_quota_that_cannot_work_is_refused_by_its_parameter(tiny, tmp_path):
    with pytest.raises(ParameterError, match='disk_cache_gb'):
        Node(tiny, tmp_path / 'memory', quota=1000)


def test_a_step_larger_than_the_quota_is_told_once_and_watching_goes_on(tiny, frames, tmp_path):
    with Node(tiny, tmp_path / 'memory', quota=2**20, policy='statekv(2000)') as node:
        node.watch(frames * 4, 0, 120)
        assert node.streams['front'].frames == 120
        assert 'raise it (parameter "disk_cache_gb")' in node.disk.problem and len(node.logged) == 1


def test_a_models_fingerprint_is_of_its_weights_and_not_of_its_folder_or_dtype(tmp_path):
    folders = [write_tiny_checkpoint(tmp_path / name, seed=seed) for name, seed in (('one', 0), ('two', 0), ('three', 1))]
    one, two, three = (load_backbone(str(folder), 'cpu', 'float32').fingerprint for folder in folders)
    assert one == two == load_backbone(str(folders[0]), 'cpu', 'bfloat16').fingerprint
    assert one != three and one.startswith('qwen3_vl ')


def test_half_precision_comes_back_to_the_bit(tmp_path, frames):
    backbone = load_backbone(str(write_tiny_checkpoint(tmp_path / 'tiny')), 'cpu', 'bfloat16')
    with Node(backbone, tmp_path / 'memory') as node:
        node.watch(frames, 0, 9)
        stream = VideoStream(backbone, 'statekv(40)')
        stream.saving = Saving()
        restore(stream, node.disk._store, 'front')
        for one, other in zip(node.streams['front'].carried.copy(), stream.carried.copy(), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(node.streams['front'].detailed.views(), stream.detailed.views(), strict=True):
            assert torch.equal(one.key, other.key) and torch.equal(one.value, other.value)
