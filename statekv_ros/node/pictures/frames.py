"""~/frames: pictures by their stamps, or out of a time span."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.task import Future

from statekv_ros.errors import Code, QuestionError, StateKVError, StoreError
from statekv_ros.msg import Picture
from statekv_ros.node import messages
from statekv_ros.node.engine import Engine
from statekv_ros.node.pictures.album import Album, Seen
from statekv_ros.node.services import DEEP, Services, named
from statekv_ros.srv import Frames

_OF_A_SPAN = 16     # pictures, unless the request says


@dataclass(frozen=True)
class Found:
    """A picture and its own header stamp (ns); or a code of msg/Picture and a sentence."""
    asked_ns: int
    code: int = Picture.FOUND
    error: str = ''
    stamp_ns: int = 0
    jpeg: bytes = b''


class Lookup:
    """Looks pictures of one camera up, at one moment."""

    def __init__(self, album: Album, most_bytes: int = Frames.Request.MOST_BYTES):
        """most_bytes: of all that it finds together."""
        self._album, self._most_bytes, self._left = album, most_bytes, most_bytes
        self._steps, self._firsts, self._lasts = album.seen()

    def at(self, stamp_ns: int, tolerance_ns: float) -> Found:
        """The picture nearest to a stamp, no further from it than that; of segments that have the same stamps, the newest's."""
        if not len(self._steps):
            return Found(stamp_ns, Picture.NOTHING_SEEN, 'no frame is in memory: ask again after the first one')
        begin, end = int(self._firsts.min()), int(self._lasts.max())
        if stamp_ns > end:
            return Found(stamp_ns, Picture.IN_FUTURE, f'the newest frame is of {end} ns')
        if stamp_ns < begin:
            forgotten_ns = self._album.forgotten_ns
            return Found(stamp_ns, Picture.TOO_EARLY, f'the first frame was of {forgotten_ns or begin} ns') \
                if stamp_ns < (forgotten_ns or begin) else \
                Found(stamp_ns, Picture.FORGOTTEN, f'frames before {begin} ns are forgotten: raise "disk_cache_gb", or with no '
                                                   '"memory_dir" "device_cache_mb" or "host_cache_mb", to hold more')
        away = np.maximum(np.maximum(self._firsts - stamp_ns, stamp_ns - self._lasts), 0)
        index = len(away) - 1 - int(np.argmin(away[::-1]))
        if away[index] > tolerance_ns:
            return Found(stamp_ns, Picture.TOO_FAR, f'the nearest picture is {away[index] / 1e9:.3f} s away, of '
                                                    f'{self._lasts[index]} ns: raise tolerance_s')
        return self._found(stamp_ns, index)

    def between(self, begin_ns: int | None, end_ns: int | None, count: int) -> list[Found]:
        """So many, evenly spread over a span (None: unbounded) that a step belongs to when it touches it, oldest first.

        Raises:
            QuestionError: no frame is in the span.
        """
        inside = np.ones(len(self._steps), bool)
        if begin_ns is not None:
            inside &= self._lasts >= begin_ns
        if end_ns is not None:
            inside &= self._firsts <= end_ns
        chosen = np.flatnonzero(inside)
        if not len(chosen):
            held = f'the memory covers header stamps {self._firsts.min()} to {self._lasts.max()} ns' if len(inside) else \
                'nothing is in memory'
            raise QuestionError(f'no frame between {begin_ns} and {end_ns} ns: {held}', Code.NOTHING_SEEN)
        spread = np.unique(np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int))
        return [self._found(int(self._lasts[index]), index) for index in chosen[spread]]

    def _found(self, stamp_ns: int, index: int) -> Found:
        row = Seen(*(int(column[index]) for column in (self._steps, self._firsts, self._lasts)))
        try:
            picture = self._album.picture(row.step, row.last_ns)
        except StoreError as error:
            return Found(stamp_ns, Picture.NO_PICTURE, str(error))
        if picture is None:
            return Found(stamp_ns, Picture.NO_PICTURE, f'the frame of {row.last_ns} ns has no picture: "thumbnail.width" was 0, '
                                                       'or the picture was dropped to make room (docs/pictures.md)')
        if len(picture[1]) > self._left:
            return Found(stamp_ns, Picture.LEFT_OUT, f'a reply has at most {self._most_bytes} bytes of pictures: ask again for '
                                                     'this one')
        self._left -= len(picture[1])
        return Found(stamp_ns, stamp_ns=picture[0], jpeg=picture[1])


class FramesService:
    """Serves ~/frames."""

    def __init__(self, node: Node, group: CallbackGroup, services: Services):
        """group: a reentrant one."""
        self._services = services
        node.create_service(Frames, '~/frames', self._frames, qos_profile=DEEP, callback_group=group)

    async def _frames(self, request: Frames.Request, response: Frames.Response) -> Frames.Response:
        looked_up = Future()
        try:
            engine = self._services.engine()
            names = named(engine, request.camera)
            if len(names) > 1:
                raise QuestionError(f'pictures are of one camera, got camera {request.camera!r}: name one of {", ".join(names)}',
                                    Code.UNKNOWN_CAMERA)
            _check(request)
            found = _latest(engine.cameras[names[0]].album, request)
            if found is None:
                self._services.look_up(lambda: _look_up(engine, names[0], request), looked_up)
                found = await looked_up
        except StateKVError as error:
            response.error, response.error_code = str(error), error.code
            return response
        frame_id = engine.cameras[names[0]].frame_id
        response.pictures = [_message(picture, frame_id) for picture in found]
        response.success = True
        return response


def _check(request: Frames.Request) -> None:
    most = request.MOST_IMAGES
    if len(request.stamps) > most:
        raise QuestionError(f'{len(request.stamps)} stamps are more than a reply has pictures, {most}: ask in parts')
    if request.max_images > most:
        raise QuestionError(f'max_images must be at most {most}, got {request.max_images}')
    if not 0 <= request.tolerance_s < float('inf'):
        raise QuestionError('tolerance_s must be 0 (as far as the nearest is) or a positive number of seconds, got '
                            f'{request.tolerance_s}')
    begin, end = messages.to_ns(request.from_stamp), messages.to_ns(request.to_stamp)
    if request.stamps and (begin or end or request.max_images):
        raise QuestionError('stamps are given, and a span or max_images, too: ask for one of them')
    if end and end < begin:
        raise QuestionError(f'time span ends at {end} ns, before it begins at {begin} ns')


def _latest(album: Album, request: Frames.Request) -> list[Found] | None:
    """What a page asks for all the time, the picture of the newest frame, is at hand: another thread, and two more turns of the
    executor, would take the node longer than all the rest. None where something else is asked for."""
    if len(request.stamps) != 1:
        return None
    asked_ns = messages.to_ns(request.stamps[0])
    picture = album.latest(asked_ns)
    return None if picture is None else [Found(asked_ns, stamp_ns=picture[0], jpeg=picture[1])]


def _look_up(engine: Engine, camera: str, request: Frames.Request) -> list[Found]:
    lookup = Lookup(engine.cameras[camera].album)
    if request.stamps:
        tolerance_ns = request.tolerance_s * 1e9 or float('inf')
        return [lookup.at(messages.to_ns(stamp), tolerance_ns) for stamp in request.stamps]
    return lookup.between(messages.to_ns(request.from_stamp) or None, messages.to_ns(request.to_stamp) or None,
                          request.max_images or _OF_A_SPAN)


def _message(found: Found, frame_id: str) -> Picture:
    picture = Picture(stamp=messages.to_stamp(found.asked_ns), code=found.code, error=found.error)
    if found.jpeg:
        picture.image = messages.jpeg(found.stamp_ns, found.jpeg, frame_id)
    return picture
