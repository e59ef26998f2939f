"""Pictures of what answers looked at: for their messages, and tiled as ~/evidence_image."""
from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image

from statekv_ros.errors import StoreError
from statekv_ros.memory import Evidence
from statekv_ros.node.camera import Camera
from statekv_ros.node.messages import Pictures
from statekv_ros.node.pictures.darkroom import Darkroom
from statekv_ros.node.questions import CameraAnswer
from statekv_ros.srv import Frames
from statekv_ros.thumbnails import open_thumbnail

TILE_WIDTH, TILE_HEIGHT, COLUMNS, MOST_TILES = 320, 240, 3, 9
_HEAD, _LABEL = 24, (6, 232)    # height of a line of text; where that of a tile begins
_GREY, _WHITE = (40, 40, 40), (255, 255, 255)


def evidence_pictures(cameras: Mapping[str, Camera], looked_at: Iterable[tuple[str, Sequence[Evidence]]],
                      most_bytes: int = Frames.Request.MOST_BYTES) -> Pictures:
    """Those that are kept of the steps of cameras, as far as all of them are no more bytes."""
    found = {}
    for name, steps in looked_at:
        album = cameras[name].album
        for step in steps if album is not None else ():
            try:
                picture = album.picture(step.step, step.last_stamp_ns)
            except StoreError:      # damaged: no picture, as others have none; `statekv-memory check` tells
                continue
            if picture is not None and (most_bytes := most_bytes - len(picture[1])) >= 0:
                found[name, step.step] = picture
    return found


def tile(answers: Sequence[CameraAnswer], pictures: Pictures) -> np.ndarray:
    """Question, answers, and the most attended steps with stamp and share: uint8 [height, width, 3] RGB.

    Pictures are scaled to fit; where there is none the tile says so.
    """
    steps = [(step, answer.camera) for answer in answers for step in answer.result.evidence]
    steps.sort(key=lambda pair: -pair[0].share)
    tiles = [_tile(pictures.get((camera, step.step)), f'{step.last_stamp_ns / 1e9:.2f} s  {step.share:.0%}  {camera}')
             for step, camera in steps[:MOST_TILES]]
    columns = max(1, min(COLUMNS, len(tiles)))
    tiles += [_tile(None, '')] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[begin:begin + columns]) for begin in range(0, len(tiles), columns)]
    lines = [answers[0].result.question, *(f'{answer.camera}: {answer.result.text}' for answer in answers)]
    head = np.full((_HEAD * len(lines), columns * TILE_WIDTH, 3), _GREY, np.uint8)
    for number, line in enumerate(lines):
        _write(head, line, (6, _HEAD * number + 17))
    return np.vstack([head, *rows])


def _tile(picture: tuple[int, bytes] | None, label: str) -> np.ndarray:
    drawn = np.full((TILE_HEIGHT, TILE_WIDTH, 3), _GREY, np.uint8)
    if picture is not None:
        shown = open_thumbnail(picture[1])
        scale = min(TILE_WIDTH / shown.shape[1], TILE_HEIGHT / shown.shape[0])
        width, height = (max(1, round(side * scale)) for side in shown.shape[1::-1])
        drawn[:height, :width] = cv2.resize(shown, (width, height), interpolation=cv2.INTER_LINEAR)
    elif label:
        _write(drawn, 'no picture', (110, 120))
    drawn[-_HEAD:] //= 3        # text is read on light pictures, too
    _write(drawn, label, _LABEL)
    return drawn


def _write(picture: np.ndarray, line: str, place: tuple[int, int]) -> None:
    """In OpenCV's font, which knows ASCII only."""
    line = ''.join(letter if letter.isascii() and letter.isprintable() else '?' for letter in line[:picture.shape[1] // 8])
    cv2.putText(picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, .5, _WHITE, 1, cv2.LINE_AA)


class EvidenceImage:
    """~/evidence_image: the newest answer's evidence, made while somebody subscribes. Of answers that come faster than pictures
    are made, the newest is shown."""

    def __init__(self, node: LifecycleNode, darkroom: Darkroom):
        self._darkroom, self._log = darkroom, node.get_logger().error
        self._publisher = node.create_lifecycle_publisher(Image, '~/evidence_image', QoSProfile(depth=1))
        self._lock = threading.Lock()
        self._newest: Callable[[], Image] | None = None

    def show(self, cameras: Mapping[str, Camera], answers: Sequence[CameraAnswer], asked: Time) -> None:
        """Have it made and published; neither waits nor raises. `asked`: the node's time of asking."""
        if not answers or not self._publisher.get_subscription_count():
            return
        with self._lock:
            idle, self._newest = self._newest is None, lambda: _message(cameras, answers, asked)
        if idle:
            self._darkroom.draw(self._publish)

    def _publish(self) -> None:
        with self._lock:
            make, self._newest = self._newest, None
        self._publisher.publish(make())


def _message(cameras: Mapping[str, Camera], answers: Sequence[CameraAnswer], asked: Time) -> Image:
    picture = tile(answers, evidence_pictures(
        cameras, ((answer.camera, answer.result.evidence[:MOST_TILES]) for answer in answers)))
    height, width = picture.shape[:2]
    message = Image(height=height, width=width, encoding='rgb8', step=3 * width, data=array('B', picture.tobytes()))
    message.header.stamp, message.header.frame_id = asked, cameras[answers[0].camera].frame_id
    return message
