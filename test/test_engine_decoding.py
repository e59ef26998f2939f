"""Images that come while a step is computed are decoded beside it, and none is taken for it that a newer one has replaced."""
import threading
from types import SimpleNamespace

import cv2
import pytest

from conftest import SECOND
from statekv_ros.images import decode_compressed
from statekv_ros.memory import VideoStream
from statekv_ros.node.camera import Camera
from statekv_ros.node.engine import Engine


class Busy:
    """An engine whose camera sends JPEGs, some of them in the middle of a step.

    Attributes:
        decoded: stamp (s) of each image that was decoded, and whether it was the engine's own thread that did.
    """

    def __init__(self, backbone, frames, names=('front',)):
        self.decoded: list[tuple[int, bool]] = []
        self.logged: list[str] = []
        self.frames, self.meanwhile = frames, []
        cameras = []
        for name in names:
            camera = Camera(name, VideoStream(backbone, 'statekv(40)'), self._decode)
            cameras.append(camera)
        self.engine = Engine(cameras, lambda *_: None, lambda: 4, 16, self.logged.append)
        for camera in cameras:
            camera.stream.cancelled = self._layer

    def send(self, second: int, name: str = 'front', cut: bool = False) -> None:
        data = cv2.imencode('.jpg', self.frames[second % len(self.frames)])[1].tobytes()
        message = SimpleNamespace(format='jpeg', data=data[:len(data) // 2] if cut else data, second=second)
        self.engine.cameras[name].mailbox.put(message, second * SECOND)
        self.engine.note_image(name)

    def step(self, *meanwhile) -> None:
        """The engine's next turn; `meanwhile`: called one after the other in the first step of it."""
        self.meanwhile = list(meanwhile)
        self.engine.run_round()
        assert not self.meanwhile, 'there was no step'

    def settled(self) -> None:
        """What is decoded beside the step is done with."""
        self.engine._frame_steps.ahead._thread.submit(lambda: None).result()

    def _layer(self) -> bool:
        while self.meanwhile:
            self.meanwhile.pop(0)()
        return False

    def _decode(self, message):
        self.decoded.append((message.second, threading.current_thread() is threading.main_thread()))
        return decode_compressed(message), 'camera'


@pytest.fixture
def busy(backbone, frames):
    made = Busy(backbone, frames)
    made.send(1)
    made.step()             # a model of two frames a step waits for its partner
    made.send(2)
    yield made
    made.engine.stop()
    assert not made.logged


def test_image_that_came_during_a_step_was_decoded_beside_it_and_is_what_it_would_have_been(busy, backbone, frames):
    busy.step(lambda: busy.send(3), busy.settled)
    busy.send(4)            # no step is being computed: the engine does it itself
    busy.engine.cameras['front'].mailbox.take()
    busy.send(5)
    busy.step()
    assert busy.decoded[:3] == [(1, True), (2, True), (3, False)] and busy.decoded[3:] == [(5, True)]


def test_decoded_image_is_the_one_that_is_stepped(busy, backbone, frames):
    alone = Busy(backbone, frames)
    for second in range(1, 9):
        alone.send(second)
        alone.step()
    for second in range(3, 9):
        busy.step(*([lambda: busy.send(second), busy.settled] if second % 2 else []))
        if not second % 2:
            busy.send(second)
    busy.step()
    assert {second for second, own in busy.decoded if not own} == {3, 5, 7}
    ours, right = (made.engine.cameras['front'].stream for made in (busy, alone))
    assert ours.last_stamp_ns == right.last_stamp_ns == 8 * SECOND
    assert ours.answer('where?', max_tokens=4).token_ids == right.answer('where?', max_tokens=4).token_ids
    alone.engine.stop()


def test_newest_image_wins_over_one_that_is_decoded_already(busy):
    busy.step(lambda: busy.send(3), busy.settled, lambda: busy.send(4, cut=False))
    busy.step()
    camera = busy.engine.cameras['front']
    assert camera.stream.last_stamp_ns == 4 * SECOND and camera.mailbox.dropped == 1 and camera.frames_processed == 3
    assert [second for second, _ in busy.decoded] == [1, 2, 3, 4]


def test_image_that_cannot_be_decoded_counts_when_it_is_taken_and_not_when_it_was_replaced(busy):
    busy.step(lambda: busy.send(3, cut=True), busy.settled, lambda: busy.send(4))
    busy.step()
    camera = busy.engine.cameras['front']
    assert (camera.rejected, camera.frames_processed) == (0, 3)
    busy.send(5)
    busy.step(lambda: busy.send(6, cut=True), busy.settled)
    busy.step()
    assert (camera.rejected, camera.frames_processed) == (1, 4) and 'cut off' in camera.last_error
    assert busy.decoded.count((6, False)) == 1


def test_camera_that_is_much_faster_than_its_steps_is_decoded_beside_them_twice_at_most(busy):
    busy.step(*(part for second in range(3, 12) for part in (lambda second=second: busy.send(second), busy.settled)))
    busy.step()
    assert [second for second, own in busy.decoded if not own] == [3, 4] and busy.decoded[-1] == (11, True)
    assert busy.engine.cameras['front'].stream.last_stamp_ns == 11 * SECOND


def test_stopped_engine_decodes_nothing_more(busy):
    busy.step(busy.engine.stop, lambda: busy.send(3))
    assert (3, False) not in busy.decoded
