"""Several cameras in one engine: who is stepped with whom, and that each remembers what it would have alone."""
import random
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import SECOND
from engine_bench import Bench, failing
from statekv_ros.errors import FrameError
from statekv_ros.memory import VideoStream
from statekv_ros.node.mailbox import Arrival
from test_together import assert_alike, picture

NAMES = ('front', 'rear', 'side')


def message(name: str, frame: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(frame=frame, header=SimpleNamespace(frame_id=name))


class Several(Bench):
    """A bench that writes down with how many others each step went, and has a twin of each stream that is stepped alone."""

    def __init__(self, backbone, names=NAMES):
        super().__init__(backbone, [], names)
        self.told: list[tuple[str, int]] = []
        self.engine._frame_steps._on_step = lambda camera, report, waited_ms: self.told.append((camera.name, report.cameras))
        self.alone = {name: VideoStream(backbone, 'statekv(40)') for name in names}
        self.stamps = dict.fromkeys(names, 0)

    def see(self, name: str, frame: np.ndarray) -> None:
        """An image arrives, and is stepped by the twin at once."""
        self.stamps[name] += SECOND // 10
        self.engine.cameras[name].mailbox.put(message(name, frame), self.stamps[name])
        self.alone[name].step(frame, self.stamps[name])

    def round(self, *frame) -> list[tuple[str, int]]:
        """A turn; `frame`: arguments of a picture that each camera sees before."""
        for name in self.engine.cameras if frame else ():
            self.see(name, picture(*frame))
        self.told.clear()
        self.engine.run_round()
        return list(self.told)

    def check(self) -> None:
        for name, camera in self.engine.cameras.items():
            assert_alike(camera.stream, self.alone[name])


def test_a_batch_is_what_waits_at_that_moment(backbone):
    """Two frames make a step: cameras that are at the same one of them share it, whoever pauses."""
    bench = Several(backbone)
    for index, (seeing, told) in enumerate([
            (NAMES, []), (NAMES, [('front', 3), ('rear', 3), ('side', 3)]), (('front', 'rear'), []),
            (('front', 'rear'), [('front', 2), ('rear', 2)]), (('side',), []), (('rear', 'side'), [('side', 1)]),
            (('front', 'rear', 'side'), [('rear', 1)]), (('front', 'side'), [('front', 2), ('side', 2)])]):
        for name in seeing:
            bench.see(name, picture(index))
        assert bench.round() == told
    bench.check()


def test_cameras_of_one_size_share_a_step_and_an_image_is_taken_no_sooner_than_its_turn(backbone, monkeypatch):
    """While those of one size are stepped, a newer image of another size still replaces the one that waits."""
    bench = Several(backbone, ('a', 'b', 'c', 'd'))
    sizes = {'a': (64, 64), 'b': (96, 64), 'c': (64, 64), 'd': (96, 64)}
    for index in range(4):
        for name, size in sizes.items():
            bench.see(name, picture(index, *size))
        told = bench.round()
    assert told == [('a', 2), ('c', 2), ('b', 2), ('d', 2)]
    taken = []
    take_in = bench.engine.cameras['a'].stream.take_in

    def newer_comes(*frame):
        bench.see('d', picture(99, 96, 64))
        return take_in(*frame)

    monkeypatch.setattr(bench.engine.cameras['a'].stream, 'take_in', newer_comes)
    monkeypatch.setattr(Arrival, 'waited_ms', property(lambda arrival: taken.append(arrival.stamp_ns) or 0.0))
    for name, size in sizes.items():
        bench.see(name, picture(5, *size))
    bench.round()
    assert taken == [bench.stamps['a'], bench.stamps['c'], bench.stamps['b'], bench.stamps['d']]
    assert bench.engine.cameras['d'].mailbox.dropped == 1


def test_a_camera_that_changes_its_resolution_within_a_batch(backbone):
    """Its half step becomes a step of its own, the others' go on together; then it is with those of its new size."""
    bench = Several(backbone)
    for index in range(4):
        bench.round(index)
    assert bench.round(4) == []
    for name in NAMES:
        bench.see(name, picture(5, *((96, 64) if name == 'rear' else (64, 64))))
    assert bench.round() == [('front', 2), ('rear', 1), ('side', 2)]
    assert bench.round(6, 96, 64) == [('rear', 1)]
    bench.see('front', picture(7, 96, 64))
    bench.see('side', picture(7, 96, 64))
    assert bench.round() == [('front', 2), ('side', 2)]
    bench.check()
    for index in range(20):
        for name in NAMES:
            bench.see(name, picture(index, *random.Random(3 * index + len(name)).choice([(64, 64), (96, 64), (40, 90)])))
        bench.round()
    bench.check()
    assert not bench.errors


@pytest.mark.parametrize('error, count', [(FrameError('step is 3 bytes'), 'rejected'), (ZeroDivisionError('oops'), 'failures')])
def test_an_image_that_cannot_be_decoded_keeps_no_other_camera_from_its_step(error, count, backbone):
    bench = Several(backbone)
    bench.round(0)
    camera = bench.engine.cameras['rear']

    def broken(message):
        raise error

    decode, camera.decode = camera.decode, broken
    for name in NAMES:
        bench.engine.cameras[name].mailbox.put(message(name, picture(1)), SECOND)
    assert bench.round() == [('front', 2), ('side', 2)]
    assert getattr(camera, count) == 1 and str(error) in camera.last_error and len(camera.stream.pending) == 1
    camera.decode = decode


def test_a_step_that_fails_in_a_batch_is_its_own_cameras_alone(backbone):
    bench = Several(backbone)
    for index in range(3):
        bench.round(index)
    failing(bench.engine.cameras['rear'].stream, 2)     # in the batch, and then alone
    assert bench.round(3) == [('front', 1), ('side', 1)]
    cameras = bench.engine.cameras
    assert [(camera.failures, camera.frames_failed, camera.frames_processed) for camera in cameras.values()] == [
        (0, 0, 4), (1, 1, 3), (0, 0, 4)]
    assert len(bench.errors) == 1 and 'frame step of camera rear failed' in bench.errors[0] and 'oops' in bench.errors[0]
    for name in ('front', 'side'):
        assert_alike(cameras[name].stream, bench.alone[name])


def test_a_callback_that_raises_for_one_camera_keeps_none_from_being_counted(backbone):
    bench = Several(backbone)

    def on_step(camera, report, waited_ms):
        bench.told.append((camera.name, report.cameras))
        if camera.name == 'front':
            raise ZeroDivisionError('of a callback')

    bench.engine._frame_steps._on_step = on_step
    bench.round(0)
    with pytest.raises(ZeroDivisionError, match='of a callback'):
        bench.round(1)
    assert bench.told == [('front', 3), ('rear', 3), ('side', 3)]
    assert [camera.frames_processed for camera in bench.engine.cameras.values()] == [2, 2, 2]


@pytest.mark.parametrize('cameras', [2, 5, 8])
def test_cameras_that_come_and_go_with_questions_and_resets_in_between(cameras, backbone):
    names, dice = [f'camera{number}' for number in range(cameras)], random.Random(cameras)
    bench = Several(backbone, names)
    sizes = {name: dice.choice([(64, 64), (96, 64)]) for name in names}
    most = 0
    for turn in range(40):
        for name in names:
            if dice.random() < .8:
                bench.see(name, picture(turn, *sizes[name]))
        if dice.random() < .2:
            bench.ask(cameras=[names[0]], max_tokens=6)
        if dice.random() < .1:
            name = dice.choice(names)
            bench.engine.reset([name], lambda *told: None)
            bench.round()
            bench.alone[name].reset()
        most = max([most, *(together for _, together in bench.round())])
    bench.rounds(lambda: not bench.engine.active)
    bench.check()
    assert most >= cameras // 2 and not bench.errors
    assert all(outcome.answers or 'nothing has been seen' in outcome.error or 'reset' in outcome.error
               for outcome in bench.outcomes)
