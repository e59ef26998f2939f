"""One camera's way in: subscription, stamp checks and sampling. The callback only judges the stamp and fills the mailbox."""
import struct
from collections.abc import Callable
from functools import partial

import numpy as np
from rclpy.qos import QoSCompatibility, QoSProfile, ReliabilityPolicy, qos_check_compatible, qos_profile_sensor_data
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image

from statekv_ros.errors import FrameError
from statekv_ros.images import decode_compressed, decode_image
from statekv_ros.node.camera import Camera
from statekv_ros.sampling import Sampler, Verdict

_TRANSPORTS = {'raw': Image, 'compressed': CompressedImage}
_NS = 10**9


def message_type(topic: str, transport: str) -> type:
    """The image message of a topic; `transport` is auto, raw or compressed."""
    if transport == 'auto':
        transport = 'compressed' if topic.endswith('/compressed') else 'raw'
    return _TRANSPORTS[transport]


def type_name(kind: type) -> str:
    """As the graph tells it."""
    return f'sensor_msgs/msg/{kind.__name__}'


def header_stamp_ns(raw: bytes) -> int:
    """Header stamp, in nanoseconds, of a serialized message that begins with a header: four bytes of encapsulation, the second
    of which tells the byte order, then seconds and nanoseconds.

    Raises:
        FrameError: too short, or numbers that are no time.
    """
    if len(raw) < 12:
        raise FrameError(f'a message of {len(raw)} bytes is no image: it was damaged on its way, or another program sends it')
    seconds, nanoseconds = struct.unpack_from('<iI' if raw[1] & 1 else '>iI', raw, 4)
    if seconds < 0 or nanoseconds >= _NS:
        raise FrameError(f'header stamp is no time ({seconds} s and {nanoseconds} ns): the camera driver must set it')
    return seconds * _NS + nanoseconds


def decoder(kind: type, max_pixels: int,
            frame_size: Callable[[int, int], tuple[int, int]]) -> Callable[[bytes], tuple[np.ndarray, str]]:
    """For the engine: from a serialized `kind` to uint8 [height, width, 3] RGB and its frame_id, or a FrameError; the other
    arguments as of `images.decode_compressed`."""
    decode = partial(decode_image, max_pixels=max_pixels) if kind is Image else \
        partial(decode_compressed, max_pixels=max_pixels, frame_size=frame_size)

    def decode_raw(raw: bytes) -> tuple[np.ndarray, str]:
        try:
            message = deserialize_message(raw, kind)
        except Exception as error:  # whatever the middleware raises: these bytes are no such message
            raise FrameError(f'a message of {len(raw)} bytes is no {type_name(kind)}: {error}') from error
        return decode(message), message.header.frame_id

    return decode_raw


class CameraInput:
    """Feeds one camera's mailbox from its topic.

    Messages stay serialized until the engine takes one: those that are not sampled cost no conversion, and one that cannot be
    converted is counted, where rclpy would drop it without a word.

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

    @property
    def about(self) -> str:
        """What it is, where it cannot be opened."""
        return f'topic {self.topic} of camera {self.camera.name}'

    @property
    def parameters(self) -> str:
        """What it follows from."""
        return f'"{self.camera.name}.topic" and "{self.camera.name}.transport"'

    def open(self) -> None:
        """Begin to receive images. Raises RCLError when the middleware refuses the topic."""
        self._subscription = self._node.create_subscription(self._kind, self._topic, self._receive, self._qos, raw=True)

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

    def obstacle(self) -> str:
        """What on the graph keeps images away, and the remedy; '' when nothing does. For a camera that is silent."""
        publishers = self._node.get_publishers_info_by_topic(self._topic)
        if not publishers:
            return 'nobody publishes it'
        name, wanted, sent = self.camera.name, type_name(self._kind), sorted({p.topic_type for p in publishers})
        if wanted not in sent:
            fitting = [transport for transport, kind in _TRANSPORTS.items() if type_name(kind) in sent]
            remedy = f'set the parameter "{name}.transport" to {fitting[0]}' if fitting else \
                f'set the parameter "{name}.topic" to a topic with images'
            return f'{" and ".join(sent)} is published there, {wanted} was expected: {remedy}'
        verdicts = [qos_check_compatible(p.qos_profile, self._qos) for p in publishers if p.topic_type == wanted]
        if all(verdict == QoSCompatibility.ERROR for verdict, _ in verdicts):
            why = verdicts[0][1].removeprefix('ERROR: ').strip('; ')
            return (f'its publisher\'s QoS does not fit ({why}): set the parameter "{name}.reliability" '
                    'to best_effort')
        return ''

    def _receive(self, raw: bytes) -> None:
        try:
            stamp_ns = header_stamp_ns(raw)
        except FrameError as error:
            self.sampler.refused += 1
            self.camera.last_error = str(error)
            return
        verdict = self.sampler.judge(stamp_ns)
        if verdict in (Verdict.NO_STAMP, Verdict.DUPLICATE):
            self.camera.last_error = verdict.value
            return
        self.newest_ns = self._node.get_clock().now().nanoseconds
        if verdict is Verdict.SAMPLE:
            self.camera.mailbox.put(raw, stamp_ns)
            self._notify()
