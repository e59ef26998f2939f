"""Writes pictures as a rosbag2 (mcap, sqlite3) for `ros2 bag` and statekv-bag. The whole bag appears, or nothing."""
import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.rosbag2.errors import WriterError
from rosbags.typesys import Stores, get_typestore

from statekv_ros.errors import BagError

STORAGES = {'mcap': StoragePlugin.MCAP, 'sqlite3': StoragePlugin.SQLITE3}
ENCODINGS = ('raw', 'jpeg')
# Version 8 and 9 differ only in how they spell QoS; 8 is read by every distribution from Iron on.
_METADATA_VERSION = 8
_NEVER = QosTime(9223372036, 854775807)
# What `ros2 bag play` will offer: reliable matches every subscriber.
_OFFERED = Qos(QosHistory.KEEP_LAST, 10, QosReliability.RELIABLE, QosDurability.VOLATILE, _NEVER, _NEVER,
               QosLiveliness.AUTOMATIC, _NEVER, False)


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
        if not 0 < self.start_ns < 2**31 * 10**9:
            raise BagError(f'start stamp must be from above 0 to 2**31 seconds, got {self.start_ns / 1e9:g} s')
        if not self.topic.startswith('/') or self.topic.endswith('/') or ' ' in self.topic:
            raise BagError(f'topic must be an absolute name like /camera/image_raw, got {self.topic!r}')

    @property
    def full_topic(self) -> str:
        """The topic in the bag."""
        if self.encoding == 'jpeg' and not self.topic.endswith('/compressed'):
            return f'{self.topic}/compressed'
        return self.topic


def write_bag(out: Path | str, frames: Iterable[tuple[int, np.ndarray]], options: BagOptions = BagOptions(), *,
              on_frame: Callable[[], None] = lambda: None) -> int:
    """Write frames to a new bag folder and return their number.

    frames: (time since the start in ns, uint8 [height, width, 3] RGB) in order of time.
    on_frame: called after each frame, for progress.

    Raises BagError when `out` exists (and may not be overwritten), when there are no frames, and on a failing disk;
    nothing is left behind then, and an older bag at `out` stays as it was.
    """
    out = Path(out)
    with new_folder(out, options.overwrite) as folder:
        try:
            with Writer(folder, version=_METADATA_VERSION, storage_plugin=STORAGES[options.storage]) as writer:
                count = _write_frames(writer, frames, options, on_frame)
                if not count:
                    raise BagError(f'there are no frames to write to {out}')
        except (OSError, sqlite3.Error, WriterError) as error:
            raise BagError(f'bag {out} cannot be written: {error}') from error
    return count


def _write_frames(writer: Writer, frames, options: BagOptions, on_frame) -> int:
    store = get_typestore(Stores.ROS2_KILTED)
    kind = 'sensor_msgs/msg/Image' if options.encoding == 'raw' else 'sensor_msgs/msg/CompressedImage'
    connection = writer.add_connection(options.full_topic, kind, typestore=store, offered_qos_profiles=[_OFFERED])
    count = 0
    for time_ns, picture in frames:
        stamp_ns = options.start_ns + time_ns
        header = store.types['std_msgs/msg/Header'](
            stamp=store.types['builtin_interfaces/msg/Time'](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9),
            frame_id=options.frame_id)
        message = (_raw if options.encoding == 'raw' else _jpeg)(store.types[kind], header, picture, options)
        writer.write(connection, stamp_ns, store.serialize_cdr(message, kind))
        count += 1
        on_frame()
    return count


def _raw(message_type, header, picture: np.ndarray, options: BagOptions):
    height, width, _ = picture.shape
    return message_type(header=header, height=height, width=width, encoding='rgb8', is_bigendian=0, step=3 * width,
                        data=np.ascontiguousarray(picture).reshape(-1))


def _jpeg(message_type, header, picture: np.ndarray, options: BagOptions):
    quality = [cv2.IMWRITE_JPEG_QUALITY, options.jpeg_quality]
    done, data = cv2.imencode('.jpg', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)
    if not done:
        raise BagError(f'a picture of shape {picture.shape} cannot be compressed as JPEG: use encoding raw')
    return message_type(header=header, format='bgr8; jpeg compressed bgr8', data=data.reshape(-1))


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A path that does not exist yet, moved to `out` at the end of the block; removed if the block fails. Raises BagError."""
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise BagError(f'{out} exists: choose another name, or overwrite it with --overwrite')
        if not _may_replace(out):
            raise BagError(f'{out} exists and is not a bag, so it is not overwritten: choose another name')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, so that the move at the end cannot fail half way; in a folder of its own, so that the storage
        # file, which is named after the bag, gets the right name at once.
        workplace = Path(tempfile.mkdtemp(prefix=f'.{out.name}.partial-', dir=out.parent))
    except OSError as error:
        raise BagError(f'bag {out} cannot be written: {error}') from error
    try:
        folder = workplace / out.name
        yield folder
        _move_into_place(folder, out, workplace / f'{out.name}.old')
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _move_into_place(folder: Path, out: Path, old: Path) -> None:
    try:
        if out.exists():
            out.rename(old)
        folder.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise BagError(f'bag {out} cannot be moved into place: {error}') from error


def _may_replace(out: Path) -> bool:
    """Whether `out` is a bag folder (or an empty one), and nothing a user would miss."""
    if not out.is_dir() or out.is_symlink():
        return False
    names = [entry.name for entry in out.iterdir()]
    return all(name == 'metadata.yaml' or name.endswith(('.mcap', '.db3', '.db3-shm', '.db3-wal')) for name in names)
