"""Reads rosbag2 (mcap, sqlite3): what is in it, and its images. Whatever is wrong with a bag is a BagError."""
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from statekv_ros.errors import BagError, FrameError
from statekv_ros.images import decode_compressed, decode_image
from statekv_ros.replay.cdr import MINIMUM_BYTES, header_stamp_ns
from statekv_ros.replay.salvage import StoredMessage, lacks_part_of_a_page, readable_messages

IMAGE_TYPES = ('sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage')
POSE_TYPES = ('nav_msgs/msg/Odometry', 'geometry_msgs/msg/PoseStamped', 'geometry_msgs/msg/PoseWithCovarianceStamped')
_STORAGES = {'.mcap': 'mcap', '.db3': 'sqlite3'}


@dataclass(frozen=True)
class BagImage:
    """One image of a bag. Two are equal when they hold the same, whichever bags they come from."""

    topic: str
    stamp_ns: int           # header stamp
    log_ns: int             # when it was recorded
    type: str               # one of IMAGE_TYPES; in the player also of POSE_TYPES
    cdr: bytes              # serialised, as it can be published
    bag: Path = field(compare=False)

    def message(self):
        """The message, with the attributes that rclpy's has (and data as a numpy array). Raises BagError for damaged bytes."""
        try:
            return _typestore().deserialize_cdr(self.cdr, self.type)
        except Exception as error:  # rosbags raises whatever its parsers trip over
            raise BagError(f'bag {self.bag} is damaged: the image on {self.topic} with header stamp {self.stamp_ns / 1e9:.9f} '
                           f's cannot be read ({_text(error)}): copy or record it again') from error

    def frame(self) -> np.ndarray:
        """The picture, uint8 [height, width, 3] RGB. Raises BagError for damaged bytes, FrameError for what is no picture."""
        decode = decode_compressed if self.type.endswith('CompressedImage') else decode_image
        return decode(self.message())


class TopicInfo(NamedTuple):
    """One topic of a bag."""

    name: str
    type: str
    count: int


@dataclass(frozen=True)
class BagInfo:
    """What a bag holds. start_ns and duration_ns are times of recording; both 0 for a bag without messages."""

    path: Path
    storage: str                        # 'mcap' or 'sqlite3'
    files: tuple[Path, ...]             # storage files in the order of recording
    topics: tuple[TopicInfo, ...]
    start_ns: int
    duration_ns: int
    complete: bool = True               # False: cut off, and this is what can be read of it

    @property
    def messages(self) -> int:
        """Number of messages on all topics."""
        return sum(topic.count for topic in self.topics)


def bag_info(bag: Path | str, allow_truncated: bool = False) -> BagInfo:
    """What the bag holds. Raises BagError when it is missing, empty, cut off or damaged.

    bag: a bag folder, or one .mcap or .db3 file.
    allow_truncated: describe what can still be read of a bag that was cut off, where that is anything.
    """
    bag = Path(bag)
    files = _storage_files(bag)
    try:
        _check_pages(files)
        with Reader(bag) as reader:
            topics = tuple(TopicInfo(name, info.msgtype or 'several types', info.msgcount)
                           for name, info in reader.topics.items())
            start_ns, duration_ns = (reader.start_time, reader.duration - 1) if reader.message_count else (0, 0)
    except Exception as error:  # rosbags raises whatever its parsers trip over
        return _what_is_left(bag, files, error, allow_truncated)
    return BagInfo(bag, _STORAGES[files[0].suffix], files, topics, start_ns, duration_ns)


def watchable_topics(info: BagInfo) -> tuple[dict[str, str], dict[str, str]]:
    """Message type of each image topic whose first image becomes a frame; and for each other one (depth, say) why it does not.

    Raises BagError when none does.
    """
    watchable, refused = {}, {}
    for name, kind in choose_topics(info, None).items():
        try:
            next(iterate_images(info, {name: kind})).frame()
            watchable[name] = kind
        except (BagError, FrameError) as error:
            refused[name] = str(error)
    if not watchable:
        raise BagError(f'bag {info.path} has no images that can be watched: '
                       + '; '.join(f'{name}: {reason}' for name, reason in refused.items()))
    return watchable, refused


def choose_topics(info: BagInfo, wanted: Collection[str] | None) -> dict[str, str]:
    """Message type of each wanted image topic (None: all) that has messages. BagError names the topics there are."""
    images = {topic.name: topic.type for topic in info.topics if topic.type in IMAGE_TYPES and topic.count}
    if not info.messages:
        raise BagError(f'bag {info.path} holds no messages: record again')
    if not images:
        others = ', '.join(f'{topic.name} ({topic.type}, {topic.count})' for topic in info.topics)
        raise BagError(f'bag {info.path} has no images ({" or ".join(IMAGE_TYPES)}); its topics: {others}')
    missing = [name for name in wanted or () if name not in images]
    if missing:
        raise BagError(f'bag {info.path} has no images on {", ".join(missing)}; its image topics: {", ".join(images)}')
    return {name: kind for name, kind in images.items() if not wanted or name in wanted}


def pose_topics(info: BagInfo) -> dict[str, str]:
    """Message type of each topic that tells where the robot was."""
    return {topic.name: topic.type for topic in info.topics if topic.type in POSE_TYPES and topic.count}


def read_images(bag: Path | str, topics: Collection[str] | None = None, *,
                allow_truncated: bool = False) -> Iterator[BagImage]:
    """The images of a bag in the order of recording; of the given topics, or of all image topics.

    Raises BagError at once for a bag that cannot be opened or has no such topics, later if damage turns up on the way.
    """
    info = bag_info(bag, allow_truncated)
    return iterate_images(info, choose_topics(info, topics))


def iterate_images(info: BagInfo, topics: dict[str, str]) -> Iterator[BagImage]:
    """As `read_images`, for a bag and topics that were looked at already; those of `pose_topics` come as they are, too."""
    stored = _stored_messages(info, topics) if info.complete else _salvaged_messages(info, topics)
    for number, message in enumerate(stored):
        if len(message.cdr) < MINIMUM_BYTES:
            raise BagError(f'bag {info.path} is damaged: image {number} on {message.topic} has only '
                           f'{len(message.cdr)} bytes')
        yield BagImage(message.topic, header_stamp_ns(message.cdr), message.log_ns, message.type, message.cdr, info.path)


def _stored_messages(info: BagInfo, topics: dict[str, str]) -> Iterator[StoredMessage]:
    count = 0
    try:
        with Reader(info.path) as reader:
            connections = [c for c in reader.connections if c.topic in topics]
            for connection, log_ns, cdr in reader.messages(connections):
                yield StoredMessage(connection.topic, connection.msgtype, log_ns, bytes(cdr))
                count += 1
    except Exception as error:  # see bag_info
        raise BagError(f'bag {info.path} is damaged after {count} images: {_text(error)}; '
                       f'{_rescue(info.files)}') from error


def _salvaged_messages(info: BagInfo, topics: dict[str, str]) -> Iterator[StoredMessage]:
    for file in info.files:
        yield from (message for message in readable_messages(file) if message.topic in topics)


def _storage_files(bag: Path) -> tuple[Path, ...]:
    if not bag.exists():
        raise BagError(f'bag {bag} does not exist: give a bag folder, or one .mcap or .db3 file')
    if bag.is_file():
        if bag.suffix not in _STORAGES:
            raise BagError(f'{bag} is not a bag: give a bag folder, or one .mcap or .db3 file')
        files = (bag,)
    else:
        # Recordings are split into name_0, name_1, ..., name_10.
        files = tuple(sorted((file for file in bag.iterdir() if file.suffix in _STORAGES),
                             key=lambda file: [int(part) if part.isdigit() else part for part in
                                               re.split(r'(\d+)', file.name)]))
        compressed = [file.name for file in bag.glob('*.zstd')]
        if not files and not compressed:
            raise BagError(f'{bag} is not a bag: it holds no .mcap or .db3 file')
        files = files or tuple(bag / name.removesuffix('.zstd') for name in compressed)
        if not (bag / 'metadata.yaml').is_file():
            raise BagError(f'bag {bag} has no metadata.yaml (the recorder was killed, or the copy is incomplete): '
                           f'{_reindex(bag, files)}')
    for file in files:
        if file.is_file() and not file.stat().st_size:
            raise BagError(f'bag file {file} is empty (0 bytes): copy or record it again')
    return files


def _what_is_left(bag: Path, files: tuple[Path, ...], error: Exception, allow_truncated: bool) -> BagInfo:
    """Why the bag did not open, as a BagError; or, if allowed, what can be read of it."""
    broken = [file for file in files if file.is_file() and not _opens(file)]
    if not any(file.is_file() for file in files):
        raise BagError(f'compressed bag {bag} cannot be read: {_text(error)}; copy or record it again') from error
    if not broken:
        raise BagError(f'bag {bag} has a metadata.yaml that does not fit its files: {_text(error)}; '
                       f'{_reindex(bag, files)}') from error
    counts, first_ns, last_ns = Counter(), None, None
    for message in (message for file in files for message in readable_messages(file)):
        counts[message.topic, message.type] += 1
        first_ns = message.log_ns if first_ns is None else min(first_ns, message.log_ns)
        last_ns = message.log_ns if last_ns is None else max(last_ns, message.log_ns)
    names = ', '.join(map(str, broken))
    if not counts:
        raise BagError(f'bag file {names} is cut off or damaged and nothing of it can be read: {_text(error)}; '
                       'copy or record it again') from error
    duration_ns = last_ns - first_ns
    if not allow_truncated:
        raise BagError(f'bag file {names} is cut off or damaged: {_text(error)}; --allow-truncated reads '
                       f'what is left ({counts.total()} messages, {duration_ns / 1e9:.1f} s), '
                       f'or {_rescue(broken)}') from error
    topics = tuple(TopicInfo(name, kind, count) for (name, kind), count in sorted(counts.items()))
    return BagInfo(bag, _STORAGES[files[0].suffix], files, topics, first_ns, duration_ns, complete=False)


def _opens(file: Path) -> bool:
    try:
        _check_pages([file])
        with Reader(file):
            return True
    except Exception:  # see bag_info
        return False


def _check_pages(files: Collection[Path]) -> None:
    for file in files:
        if file.is_file() and lacks_part_of_a_page(file):
            raise BagError('the file ends in the middle of a page')


def _reindex(bag: Path, files: tuple[Path, ...]) -> str:
    return (f'run "ros2 bag reindex -s {_STORAGES[files[0].suffix]} {bag}", or give a storage file itself '
            f'({files[0]})')


def _rescue(files: Collection[Path]) -> str:
    first = min(files)
    if first.suffix == '.mcap':
        return f'repair it: mcap recover {first} -o REPAIRED.mcap'
    return f'repair it: sqlite3 {first} .recover | sqlite3 REPAIRED.db3'


def _text(error: Exception) -> str:
    return ' '.join(str(error).split()).rstrip('.') or type(error).__name__


@cache
def _typestore():
    return get_typestore(Stores.ROS2_KILTED)
