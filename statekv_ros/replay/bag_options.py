"""What a new bag is like, checked before anything is read or written."""
import math
import re
from dataclasses import dataclass
from decimal import Decimal

from statekv_ros.errors import BagError

STORAGES = ('mcap', 'sqlite3')
ENCODINGS = ('raw', 'jpeg')
FOLDER_RATE_HZ = 10.0
MIN_RATE_HZ, MAX_RATE_HZ = 1e-9, 1e6
STAMP_SECONDS = 2**31           # a header stamp holds seconds below this
_TOPIC = re.compile(r'(/[A-Za-z_][A-Za-z0-9_]*)+')
_TOPIC_CHARACTERS = 247         # RMW_TOPIC_MAX_NAME_LENGTH


def check_topic(name: str) -> None:
    """Raises BagError when ROS refuses a topic of this name."""
    if not _TOPIC.fullmatch(name) or len(name) > _TOPIC_CHARACTERS:
        raise BagError(f'topic must be an absolute name like /camera/image_raw, of letters, digits and underscores, no part '
                       f'beginning with a digit, at most {_TOPIC_CHARACTERS} characters, got {name!r}')


def check_rate(rate_hz: float) -> None:
    """Raises BagError for images per second that no stamps can have."""
    if not (math.isfinite(rate_hz) and MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ):
        raise BagError(f'rate must be a positive number of frames per second, from {MIN_RATE_HZ:g} to {MAX_RATE_HZ:g}, got '
                       f'{rate_hz}')


@dataclass(frozen=True)
class BagOptions:
    """How `write_bag` lays out a bag. With encoding 'jpeg' the topic gets the ending /compressed that ROS expects."""

    topic: str = '/camera/image_raw'
    storage: str = 'mcap'           # 'mcap' or 'sqlite3'
    encoding: str = 'raw'           # 'raw' (rgb8) or 'jpeg'
    jpeg_quality: int = 90          # 1..100
    frame_id: str = 'camera'
    start_ns: int = 10**9           # header stamp of the start; positive, since a stamp of zero means "no stamp"
    overwrite: bool = False

    def __post_init__(self):
        if self.storage not in STORAGES:
            raise BagError(f'storage must be one of {", ".join(STORAGES)}, got {self.storage!r}')
        if self.encoding not in ENCODINGS:
            raise BagError(f'encoding must be one of {", ".join(ENCODINGS)}, got {self.encoding!r}')
        if not 1 <= self.jpeg_quality <= 100:
            raise BagError(f'jpeg quality must be from 1 to 100, got {self.jpeg_quality}')
        if not 0 < self.start_ns < STAMP_SECONDS * 10**9:
            raise BagError(f'start stamp must be from above 0 to 2**31 seconds, got {Decimal(self.start_ns) / 10**9:g} s')
        if not self.frame_id.isprintable():     # a NUL ends a ROS string, half a character is no text
            raise BagError(f'frame id must be printable text, got {self.frame_id!a}')
        check_topic(self.full_topic)

    @property
    def full_topic(self) -> str:
        """The topic in the bag."""
        if self.encoding == 'jpeg' and not self.topic.endswith('/compressed'):
            return f'{self.topic}/compressed'
        return self.topic
