"""Pictures of frame steps: what is kept of which frame, where it lies, what it costs, and when it is gone."""
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.errors import FrameError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.capacity import make_plan
from statekv_ros.memory.policies import parse_prefill_policy
from statekv_ros.node.camera import Camera
from statekv_ros.node.engine import Engine
from statekv_ros.node.memory_folder import identity_of, open_memory
from statekv_ros.node.pictures import Album, Darkroom
from statekv_ros.store import StoreReader
from statekv_ros.store.hours import pictures_per_hour, tier_hours
from statekv_ros.store.records import step_key
from statekv_ros.store.tier import PICTURE, DiskTier
from statekv_ros.thumbnails import likely_bytes, make_thumbnail, open_thumbnail, shrink, thumbnail_size

pytest.importorskip('rclpy', reason='rclpy is not installed')

from statekv_ros.msg import Picture  # noqa: E402
from statekv_ros.node.pictures.frames import Lookup  # noqa: E402

QUOTA = 50 * 10**6
WIDTH, QUALITY = 48, 80
NEAREST = float('inf')


class Node:
    """An engine with pictures, and a disk where there is a folder; each test takes the engine's turns itself."""

    def __init__(self, backbone, folder=None, quota=QUOTA, width=WIDTH, in_memory_bytes=10**6, **stream_options):
        self.logged = []
        tier = DiskTier(packed=stream_options.get('detailed_format', 'bf16') != 'bf16')
        self.stream = VideoStream(backbone, 'statekv(40)', below=[tier] if folder else [], **stream_options)
        self.darkroom, self.disk, streams = Darkroom(self.logged.append), None, {'front': self.stream}
        if folder:
            identity = identity_of(backbone, streams, '0 to 0', '', 0)
            self.disk, problem = open_memory(folder, identity, streams, {'front': tier}, quota, 2.0, 'auto', 'test', lambda told: None,
                                             self.logged.append)
            assert not problem
        self.camera = Camera('front', self.stream, self._decode)
        of_disk = {} if self.disk is None else {
            'load': lambda step: self.disk.picture('front', step), 'waiting': self.disk.waiting_picture('front')}
        self.album = Album(self.darkroom, self.stream, width, QUALITY, in_memory_bytes=in_memory_bytes, **of_disk)
        self.camera.album = self.album
        if self.disk is not None:
            self.disk.albums['front'] = self.album
        self.engine = Engine([self.camera], lambda *_: None, lambda: 4, 16, self.logged.append, self.disk)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.darkroom.close()
        assert self.disk is None or self.disk.close()
        assert error[0] or not self.logged, self.logged

    def see(self, frame, second: int) -> None:
        """An image, and all that comes of it."""
        self.camera.mailbox.put(SimpleNamespace(frame=frame), second * SECOND)
        self.until(lambda: not self.camera.mailbox.waiting and not (self.disk is not None and self.disk.busy('front')))

    def watch(self, frames, begin: int, end: int) -> None:
        """Frame number n is of second n + 1."""
        for number in range(begin, end):
            self.see(frames[number % len(frames)], number + 1)

    def until(self, done) -> None:
        while not done():
            self.engine.run_round()

    def shown(self) -> list[tuple[int, bytes | None]]:
        """Second and picture of each step that is held, and of the frame that waits."""
        steps, _, lasts = self.album.seen()
        found = [self.album.picture(int(step), int(last)) for step, last in zip(steps, lasts)]
        return [(int(last) // SECOND, picture and picture[1]) for last, picture in zip(lasts, found)]

    def codes(self, *seconds: float, tolerance_s: float = 0.0) -> list[int]:
        lookup = Lookup(self.album)
        return [lookup.at(int(second * SECOND), tolerance_s * SECOND or NEAREST).code for second in seconds]

    @staticmethod
    def _decode(message):
        if message.frame is None:
            raise FrameError('no image')
        return message.frame, 'front_optical'


def wanted(frames, *seconds: int) -> list[tuple[int, bytes]]:
    return [(second, make_thumbnail(frames[(second - 1) % len(frames)], WIDTH, QUALITY)) for second in seconds]


@pytest.fixture(scope='module')
def scenes() -> list[np.ndarray]:
    """40 pictures of moving blobs, 96 x 128, each unlike the others."""
    random = np.random.default_rng(3)
    made = [cv2.GaussianBlur(random.integers(0, 256, (96, 128, 3), dtype=np.uint8), (0, 0), 4) for _ in range(40)]
    return [cv2.normalize(scene, None, 0, 255, cv2.NORM_MINMAX) for scene in made]


# --- one picture ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('height, width, most, size', [
    (480, 640, 240, (180, 240)), (2160, 3840, 240, (135, 240)), (720, 1280, 320, (180, 320)), (64, 64, 240, (64, 64)),
    (1000, 10, 100, (200, 2)), (5, 4000, 100, (1, 100)), (1, 1, 1, (1, 1))])
def test_thumbnail_has_the_frames_shape_within_its_bounds_and_is_never_enlarged(height, width, most, size):
    assert thumbnail_size(height, width, most) == size
    assert open_thumbnail(make_thumbnail(np.zeros((height, width, 3), np.uint8), most, 75)).shape == (*size, 3)


@pytest.mark.parametrize('height, width', [(480, 640), (481, 641), (720, 1280), (300, 250)])
def test_thumbnail_shows_what_the_frame_shows(scenes, height, width):
    frame = cv2.resize(scenes[0], (width, height), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(frame, thumbnail_size(height, width, 120)[::-1], interpolation=cv2.INTER_AREA)
    assert cv2.PSNR(shrink(frame, 120), small) > 45 and cv2.PSNR(open_thumbnail(make_thumbnail(frame, 120, 90)), small) > 34
    assert frame.flags.writeable and np.array_equal(frame, cv2.resize(scenes[0], (width, height), interpolation=cv2.INTER_CUBIC))


def test_a_better_quality_and_a_larger_picture_are_planned_with_more_bytes():
    sizes = [likely_bytes(480, 640, *wanted) for wanted in ((160, 50), (160, 75), (240, 75), (240, 95), (640, 100))]
    assert sizes == sorted(set(sizes)) and 4_000 < sizes[1] < 5_000


# --- which frame ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('on_disk', [False, True])
def test_each_step_has_the_picture_of_its_last_frame_and_the_frame_that_waits_its_own(on_disk, backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory' if on_disk else None) as node:
        node.watch(scenes, 0, 7)
        assert node.shown() == wanted(scenes, 2, 4, 6, 7)
        node.see(scenes[7], 8)
        assert node.shown() == wanted(scenes, 2, 4, 6, 8)
        assert node.album.picture(3, 7 * SECOND) == (8 * SECOND, node.shown()[3][1]), 'asked about while it waited'
        assert node.album.picture(3, 9 * SECOND) is None and node.album.picture(9, 8 * SECOND) is None
        node.see(cv2.resize(scenes[8], (256, 96)), 9)       # of another size: both are steps of their own
        node.see(scenes[9], 10)
        assert [second for second, _ in node.shown()] == [2, 4, 6, 8, 9, 10]
        assert node.shown()[5] == wanted(scenes, 10)[0]


@pytest.mark.parametrize('on_disk', [False, True])
def test_the_newest_frames_are_at_hand_without_a_look_at_the_disk(on_disk, backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory' if on_disk else None) as node:
        album = node.album
        assert album.latest(SECOND) is None
        for count in range(1, 10):
            node.see(scenes[count - 1], count)
            lookup, newest = Lookup(album), node.shown()[-1]    # once it is made
            for second in range(1, count + 1):
                latest, found = album.latest(second * SECOND), lookup.at(second * SECOND, NEAREST)
                assert latest is None or latest == (found.stamp_ns, found.jpeg)
                assert latest is not None or second < count - count % 2 - 1, f'{second} of {count}'
            assert album.latest(count * SECOND) == (count * SECOND, newest[1])
        assert album.latest(10 * SECOND) is album.latest(SECOND) is None
        node.see(scenes[20], 8)     # a jump back: the frame that waits is a step of its own, and was first
        assert node.shown()[-1] == (8, wanted(scenes, 21)[0][1])
        assert album.latest(8 * SECOND) == (8 * SECOND, node.shown()[-1][1])
        node.engine.reset(['front'], lambda *_: None)
        node.until(lambda: not node.stream.steps)
        assert album.latest(8 * SECOND) is None


def test_a_newest_frame_whose_picture_is_not_made_yet_is_left_to_who_may_wait(backbone, scenes, monkeypatch):
    held = threading.Event()
    with Node(backbone) as node:
        monkeypatch.setattr('statekv_ros.node.pictures.darkroom.make_thumbnail',
                            lambda *arguments: held.wait(60) and make_thumbnail(*arguments))
        node.see(scenes[0], 1)
        assert node.album.latest(SECOND) is None
        held.set()
        assert node.shown() == wanted(scenes, 1) and node.album.latest(SECOND) == (SECOND, wanted(scenes, 1)[0][1])


def test_frames_that_are_refused_or_lost_leave_the_pictures_of_the_others(backbone, scenes, monkeypatch):
    with Node(backbone) as node:
        node.watch(scenes, 0, 3)
        node.see(scenes[30], 3)         # the stamp of the one that waits
        node.see(None, 4)
        assert node.camera.rejected == 2 and node.shown() == wanted(scenes, 2, 3)
        with monkeypatch.context() as patch:
            patch.setattr(node.stream, '_place', lambda *_: 1 / 0)
            node.see(scenes[3], 4)
        assert node.camera.failures == 1 and node.logged.pop() and node.shown() == wanted(scenes, 2, 3), 'the one that waits'
        node.see(scenes[4], 5)
        assert node.shown() == wanted(scenes, 2, 5)


def test_a_picture_that_cannot_be_made_costs_no_step(backbone, scenes, monkeypatch):
    with Node(backbone) as node:
        monkeypatch.setattr('statekv_ros.node.pictures.darkroom.make_thumbnail', lambda *_: 1 / 0)
        node.watch(scenes, 0, 4)
        assert node.stream.steps == 2 and node.codes(2, 4) == [Picture.NO_PICTURE] * 2
        assert node.logged and all('ZeroDivisionError' in sentence for sentence in node.logged)
        node.logged.clear()


def test_without_a_width_none_are_made(backbone, scenes):
    with Node(backbone, width=0) as node:
        node.watch(scenes, 0, 4)
        assert node.darkroom.made == 0 and node.codes(2) == [Picture.NO_PICTURE]


def test_a_step_waits_for_no_picture_and_frames_do_not_pile_up_behind_them(backbone, scenes, monkeypatch):
    held, begun, making = threading.Event(), threading.Event(), []

    def slow(*arguments) -> bytes:
        making.append(arguments)
        begun.set()
        assert held.wait(60)
        return make_thumbnail(*arguments)

    with Node(backbone) as node:
        monkeypatch.setattr('statekv_ros.node.pictures.darkroom.make_thumbnail', slow)
        node.see(scenes[0], 1)
        assert begun.wait(60) and len(making) == 1 and len(node.stream.pending) == 1, 'the frame is in, its picture is not made'
        behind = threading.Thread(target=node.see, args=(scenes[1], 2))
        behind.start()
        behind.join(0.3)
        assert behind.is_alive() and len(making) == 1, 'one picture at a time of each camera'
        held.set()
        behind.join()
        assert node.shown() == wanted(scenes, 2)


def test_a_picture_that_is_drawn_for_people_holds_up_nobody_who_looks_one_up():
    darkroom, drawn, looked_up = Darkroom(print), threading.Event(), threading.Event()
    assert darkroom.draw(lambda: drawn.wait(60)) and darkroom.show(looked_up.set)
    assert looked_up.wait(30) and not drawn.is_set()
    drawn.set()
    darkroom.close()
    assert not darkroom.draw(print) and not darkroom.show(print)


# --- where it lies ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('form', ['bf16', 'int4'])
def test_on_disk_a_restart_has_them_equal_to_the_byte_and_main_memory_none(form, backbone, scenes, tmp_path):
    shown = []
    for life in range(3):
        with Node(backbone, tmp_path / 'memory', detailed_format=form) as node:
            if life == 0:
                node.watch(scenes, 0, 31)
                assert set(node.album._pictures) == {15}, 'only of the frame that waits'
                assert [second for second, _ in node.shown()] == [*range(2, 32, 2), 31]
            if life == 2:
                node.see(scenes[31], 32)
                shown[0] = [*shown[0][:-1], *wanted(scenes, 32)]
            shown.append(node.shown())
    assert shown[0][:-1] == shown[1][:-1] and shown[0] == shown[2] and shown[1][-1] == wanted(scenes, 31)[0]


def test_a_step_in_few_bits_keeps_its_picture_when_the_rest_of_it_goes(backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory', detailed_format='int4') as node:
        node.disk._streams['front'].saving.cycle = 4
        for number in range(80):
            node.watch(scenes, number, number + 1)
            node.stream.saving.cycle = 4
        assert node.shown() == wanted(scenes, *range(2, 82, 2))
        parts = node.disk._store.record('front', 2).parts
        assert 'key' not in parts and PICTURE in parts


def test_what_the_disk_forgets_has_no_picture_and_the_file_keeps_to_its_quota(backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory', quota=2 * 10**6, device_cache_bytes=300_000) as node:
        node.watch(scenes, 0, 300)
        held = node.shown()[1:]      # what left last is noticed with the next step
        assert 200 < node.stream.forgotten_frames < 300 and len(held) > 10
        assert held == wanted(scenes, *(second for second, _ in held))
        assert node.codes(1, held[0][0] - 4, held[0][0], 300, 301, .5) == [
            Picture.FORGOTTEN, Picture.FORGOTTEN, Picture.FOUND, Picture.FOUND, Picture.IN_FUTURE, Picture.TOO_EARLY]
        assert (tmp_path / 'memory' / 'data.mdb').stat().st_size <= 2 * 10**6
    with Node(backbone, tmp_path / 'memory', quota=2 * 10**6, device_cache_bytes=300_000) as node:
        assert node.shown()[-len(held):] == held and node.codes(1) == [Picture.FORGOTTEN]


def test_in_main_memory_they_are_bounded_and_go_with_the_oldest_steps(backbone, scenes):
    with Node(backbone, in_memory_bytes=10_000, device_cache_bytes=900_000) as node:
        node.watch(scenes, 0, 80)
        held = node.shown()
        kept = [second for second, picture in held if picture]
        assert 10 < len(held) < 40 and held[-1][0] == 80, 'the detailed cache has forgotten some'
        assert kept == [second for second, _ in held][-len(kept):] and 0 < len(kept) < len(held)
        assert node.album._bytes <= 10_000 == node.album._most_bytes and len(node.album._pictures) == len(kept)
        assert held[-len(kept):] == wanted(scenes, *kept)
        assert node.codes(1, held[0][0], kept[0]) == [Picture.FORGOTTEN, Picture.NO_PICTURE, Picture.FOUND]


@pytest.mark.parametrize('on_disk', [False, True])
def test_a_reset_forgets_them(on_disk, backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory' if on_disk else None) as node:
        node.watch(scenes, 0, 7)
        told = []
        node.engine.reset(['front'], lambda *result: told.append(result))
        node.until(lambda: told)
        assert told == [(7, '')] and node.shown() == [] and node.codes(2) == [Picture.NOTHING_SEEN] and not node.album._pictures
        node.watch(scenes, 20, 23)
        assert node.shown() == wanted(scenes, 22, 23)
        assert node.album.picture(0, 2 * SECOND) is None, 'a step of that number was there before'


def test_a_picture_that_is_damaged_is_said_and_costs_nothing_else(backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory') as node:
        node.watch(scenes, 0, 6)
        record = node.disk._store.record('front', 1)
        broken = replace(record, parts={**record.parts, PICTURE: replace(record.parts[PICTURE], crc=1)})
        with node.disk._store._environment.begin(write=True) as transaction:
            transaction.put(step_key('front', 1), broken.encode(), db=node.disk._store._records)
        found = Lookup(node.album).at(4 * SECOND, NEAREST)
        assert found.code == Picture.NO_PICTURE and 'no longer what was stored' in found.error
        assert node.codes(2, 6) == [Picture.FOUND] * 2


def test_a_memory_without_pictures_goes_on_and_says_so(backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory', width=0) as node:
        node.watch(scenes, 0, 4)
    with Node(backbone, tmp_path / 'memory') as node:
        node.watch(scenes, 4, 8)
        assert node.codes(2, 4, 6, 8) == [Picture.NO_PICTURE] * 2 + [Picture.FOUND] * 2


# --- what it costs ----------------------------------------------------------------------------------------------------

def in_file(store) -> int:
    """Bytes of the file's pages that hold something."""
    with store._environment.begin() as transaction:
        tables = [transaction.stat(table) for table in (store._records, store._values)]
    return sum(table['psize'] * sum(table[f'{kind}_pages'] for kind in ('branch', 'leaf', 'overflow')) for table in tables)


def test_the_disk_takes_for_pictures_what_was_measured_of_the_first_ones(backbone, tmp_path):
    """The plan from the mean of the first 40 pictures, as /diagnostics tells it, against what 120 more take."""
    random = np.random.default_rng(0)
    frames = [cv2.resize(random.integers(0, 256, (18 + number % 30, 40, 3), dtype=np.uint8), (176, 128)) for number in range(139)]
    taken = {}
    for width in (0, 176):
        with Node(backbone, tmp_path / f'memory {width}', quota=10**9, width=width) as node:
            node.watch(frames, 0, 80)
            before, mean = in_file(node.disk._store), node.darkroom.facts()['picture_disk_kb']
            node.watch(frames, 80, 320)
            taken[width] = in_file(node.disk._store) - before
    assert taken[176] - taken[0] == pytest.approx(120 * mean * 1e3, rel=.03)


def own_memory() -> float:
    """MB of this process's own memory, what it has mapped of files left out."""
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(status['RssAnon'].split()[0]) * 1024 / 1e6


def test_main_memory_does_not_grow_with_pictures_that_the_disk_has(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), dtype=np.uint8)
    with Node(load_backbone('patrol', 'cpu', 'float32'), tmp_path / 'memory', 10**9, 640, device_cache_bytes=10**6) as node:
        node.watch(noise, 0, 100)
        before = own_memory()
        node.watch(noise, 100, 400)
        assert 150 * node.darkroom.facts()['picture_kb'] / 1e3 > 25, 'MB of pictures were written since'
        assert own_memory() - before < 8 and not node.album._pictures


def test_a_plan_counts_pictures_as_what_they_take_of_the_disk(backbone):
    size = backbone.size(480, 640)
    plan = make_plan(size, parse_prefill_policy('statekv(40)'), 2.0)
    with_pictures, without = (tier_hours(plan, 0, 0, 10**9, picture) for picture in (9_500, 0))
    more = with_pictures.disk_bytes_per_hour - without.disk_bytes_per_hour
    assert more == pictures_per_hour(plan, 9_500) == pytest.approx(3600 * (9_500 + 2048), rel=.03)
    assert with_pictures.disk < without.disk
    assert with_pictures.disk_written_bytes_per_s - without.disk_written_bytes_per_s == 9_500


# --- by stamp ---------------------------------------------------------------------------------------------------------

def test_the_nearest_picture_is_found_within_the_tolerance_and_says_its_own_stamp(backbone, scenes):
    with Node(backbone) as node:
        node.watch(scenes, 0, 4)
        for number in range(20, 24):
            node.see(scenes[number], number + 1)
        lookup = Lookup(node.album)
        found = [lookup.at(int(second * SECOND), NEAREST) for second in (1, 1.5, 2, 2.4, 9, 15)]
        assert [picture.stamp_ns // SECOND for picture in found] == [2, 2, 2, 2, 4, 22]
        assert node.codes(1.5, 2.4, 9, tolerance_s=1) == [Picture.FOUND, Picture.FOUND, Picture.TOO_FAR]
        assert 'raise tolerance_s' in lookup.at(9 * SECOND, SECOND).error


def test_of_stamps_that_were_seen_twice_the_newest_segments_picture_is_shown(backbone, scenes):
    with Node(backbone) as node:
        node.watch(scenes, 0, 4)
        node.see(scenes[10], 1)         # a bag that begins anew
        node.see(scenes[11], 2)
        assert Lookup(node.album).at(2 * SECOND, NEAREST).jpeg == wanted(scenes, 12)[0][1]
        assert Lookup(node.album).at(4 * SECOND, NEAREST).jpeg == wanted(scenes, 4)[0][1]


def test_of_a_span_pictures_are_spread_evenly_and_bytes_are_bounded(backbone, scenes):
    with Node(backbone) as node:
        node.watch(scenes, 0, 40)
        lookup = Lookup(node.album)
        assert [found.stamp_ns // SECOND for found in lookup.between(None, None, 4)] == [2, 14, 28, 40]
        assert [found.stamp_ns // SECOND for found in lookup.between(9 * SECOND, 14 * SECOND, 99)] == [10, 12, 14]
        assert [found.stamp_ns // SECOND for found in lookup.between(9 * SECOND, 9 * SECOND, 1)] == [10]
        bounded = Lookup(node.album, most_bytes=3000).between(None, None, 20)
        assert sum(len(found.jpeg) for found in bounded) <= 3000
        assert {found.code for found in bounded} == {Picture.FOUND, Picture.LEFT_OUT}


def test_what_is_on_disk_is_whole_and_has_a_picture_for_each_step(backbone, scenes, tmp_path):
    with Node(backbone, tmp_path / 'memory') as node:
        node.watch(scenes, 0, 9)
    with StoreReader.look(tmp_path / 'memory') as store:
        assert store.check() == []
        assert [step for step, record in store.records('front').items() if PICTURE in record.parts] == [-2, 0, 1, 2, 3]
