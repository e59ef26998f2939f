"""One camera's way in: subscription, stamp checks and sampling. The callback only judges the stamp and fills the mailbox."""
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image

from statekv_ros.images import decode_compressed, decode_image
from statekv_ros.node.engine import Camera
from statekv_ros.node.messages import to_ns
from statekv_ros.sampling import Sampler, Verdict


def message_type(topic: str, transport: str) -> type:
    """The image message of a topic; `transport` is auto, raw or compressed."""
    if transport == 'auto':
        transport = 'compressed' if topic.endswith('/compressed') else 'raw'
    return CompressedImage if transport == 'compressed' else Image


def decoder(kind: type, max_pixels: int, frame_size: Callable[[int, int], tuple[int, int]]) -> Callable[[Any], np.ndarray]:
    """From a camera's messages of this type to frames, uint8 [height, width, 3] RGB, or a FrameError; arguments as of
    `images.decode_compressed`."""
    if kind is Image:
        return partial(decode_image, max_pixels=max_pixels)
    return partial(decode_compressed, max_pixels=max_pixels, frame_size=frame_size)


class CameraInput:
    """Feeds one camera's mailbox from its topic.

    Attributes:
        camera: the engine's side of this camera.
        sampler: counts and stamp checks.
        newest_ns: node time (ns) of the newest image with a new stamp; None before the first.
    """

    def __init__(self, node, camera: Camera, topic: str, kind: type, rate_hz: float, reliability: str,
                 notify: Callable[[], None]):
        self.camera = camera
        self.sampler = Sampler(rate_hz)
        self.newest_ns: int | None = None
        self._node, self._notify = node, notify
        self._topic, self._kind = topic, kind
        # Newest wins, so a queue would only hold images that are replaced anyway.
        self._qos = QoSProfile(depth=2, reliability=ReliabilityPolicy.RELIABLE) if reliability == 'reliable' \
            else qos_profile_sensor_data
        self._subscription = None

    @property
    def topic(self) -> str:
        """The topic's full name, remappings applied."""
        return self._node.resolve_topic_name(self._topic)

    def open(self) -> None:
        """Begin to receive images."""
        self._subscription = self._node.create_subscription(self._kind, self._topic, self._receive, self._qos)

    def close(self) -> None:
        """Receive no more images; what waits in the mailbox is still watched."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None

    def counts(self) -> dict[str, int]:
        """The counters of FrameTiming."""
        return {'frames_in': self.sampler.frames_in + self.sampler.refused, 'frames_sampled': self.sampler.sampled,
                'frames_processed': self.camera.frames_processed, 'dropped': self.camera.mailbox.dropped,
                'lost': self.sampler.lost, 'rejected': self.camera.rejected + self.sampler.refused}

    def _receive(self, message) -> None:
        stamp_ns = to_ns(message.header.stamp)
        verdict = self.sampler.judge(stamp_ns)
        if verdict in (Verdict.NO_STAMP, Verdict.DUPLICATE):
            self.camera.last_error = verdict.value
            return
        self.newest_ns = self._node.get_clock().now().nanoseconds
        if verdict is Verdict.SAMPLE:
            self.camera.mailbox.put(message, stamp_ns)
            self._notify()
