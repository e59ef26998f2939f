"""The images of `images` by the million: into the callback of a camera's subscription, and out of its mailbox as the engine
takes them.

No DDS lies between, so that each image is judged by itself: it is counted once, and it is watched, left out or refused.
"""
from functools import cache

import numpy as np
import rclpy
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from campaign.images import any_image
from campaign.record import Record
from campaign.subject import PARAMETERS
from campaign.workers import run_trials
from live import new_domain
from statekv_ros.backbones import load_backbone
from statekv_ros.errors import FrameError
from statekv_ros.images import MAX_PIXELS
from statekv_ros.node.camera import Camera
from statekv_ros.node.camera_input import CameraInput, decoder
from statekv_ros.node.messages import to_stamp

WANTED = 50_000
_AT_ONCE, _LIMIT_S = 200, 120.0     # trials of the worker together, and how long these may take on a busy machine
_WARM_UP = 10_000
_PERIOD_NS = 10**7
_FIRST_NS = 10**12


def run(record: Record) -> None:
    """All trials in a worker, whose memory must not grow."""
    run_trials(record, take_in, (new_domain(),), _LIMIT_S, min(_WARM_UP, record.wanted // 4), _AT_ONCE)


def take_in(record: Record, number: int, domain: int) -> None:
    """One message through a camera's callback, its mailbox and its decoder."""
    name, message, given = any_image(record.random(number), number)
    compressed = name.startswith('jpeg')
    entry = _inputs(domain)[CompressedImage if compressed else Image]
    if not isinstance(message, bytes) and not message.header.stamp.sec and not message.header.stamp.nanosec:
        message.header.stamp = to_stamp(_FIRST_NS + number * _PERIOD_NS)
    before = _counted(entry)
    try:
        entry._receive(message if isinstance(message, bytes) else serialize_message(message))
        arrival = entry.camera.mailbox.take()
        frame = None if arrival is None else entry.camera.decode(arrival.message)[0]
    except FrameError as error:
        entry.camera.rejected += 1      # as the engine does
        record.note_refusal(str(error), number, given)
    except Exception as error:
        record.fail(f'raw {type(error).__name__}', number, given, f'{type(error).__name__}: {error}')
    else:
        _judge(record, number, given, entry, message, frame)
    if (counted := _counted(entry) - before) != 1:
        record.fail('not counted once', number, given, f'counted {counted} times: {entry.counts()}')


def _judge(record: Record, number: int, given: str, entry: CameraInput, message, frame: np.ndarray | None) -> None:
    """A frame must be a picture as the memory takes it, that of a good image its pixels; else the camera has said why not."""
    if frame is None:
        record.note(f'left out: {entry.camera.last_error}')
        return
    if frame.dtype != np.uint8 or frame.shape[2:] != (3,) or not 0 < frame.size <= 3 * MAX_PIXELS:
        record.fail('no picture', number, given, f'{frame.dtype} {frame.shape}')
    elif given == 'a good image' and isinstance(message, Image) and frame.tobytes() != bytes(message.data):
        record.fail('other pixels', number, given, f'{frame.shape}')
    else:
        record.note('a good image watched' if given == 'a good image' else 'watched')


def _counted(entry: CameraInput) -> int:
    return entry.counts()['frames_in']


@cache
def _inputs(domain: int) -> dict[type, CameraInput]:
    """A camera of each kind, as the node makes them, in the worker."""
    rclpy.init(args=[], domain_id=domain)
    node = rclpy.create_node('intake')
    frame_size = load_backbone(PARAMETERS['model'], 'cpu').frame_size
    cameras = {kind: Camera(kind.__name__, None, decoder(kind, MAX_PIXELS, frame_size)) for kind in (Image, CompressedImage)}
    return {kind: CameraInput(node, camera, f'/{camera.name}', kind, 1000.0, 'reliable', lambda: None)
            for kind, camera in cameras.items()}
