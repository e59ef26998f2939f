"""Writes pictures, and odometry beside them, as a rosbag2 (mcap, sqlite3) for `ros2 bag` and statekv-bag. The whole bag appears,
or nothing."""
import sqlite3
from collections.abc import Callable, Iterable
from heapq import merge
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.rosbag2.errors import WriterError
from rosbags.typesys import Stores, get_typestore

from statekv_ros.errors import BagError
from statekv_ros.replay.bag_options import STAMP_SECONDS, BagOptions
from statekv_ros.replay.new_folder import new_folder

if TYPE_CHECKING:   # no need of torch for a bag
    from statekv_ros.memory.pose import Pose

ODOMETRY_TOPIC = '/odom'
_PLUGINS = {'mcap': StoragePlugin.MCAP, 'sqlite3': StoragePlugin.SQLITE3}
# Version 8 and 9 differ only in how they spell QoS; 8 is read by every distribution from Iron on.
_METADATA_VERSION = 8
_NEVER = QosTime(9223372036, 854775807)
# What `ros2 bag play` will offer: reliable matches every subscriber.
_OFFERED = Qos(QosHistory.KEEP_LAST, 10, QosReliability.RELIABLE, QosDurability.VOLATILE, _NEVER, _NEVER,
               QosLiveliness.AUTOMATIC, _NEVER, False)


def write_bag(out: Path | str, frames: Iterable[tuple[int, np.ndarray]], options: BagOptions = BagOptions(), *,
              on_frame: Callable[[], None] = lambda: None, poses: Iterable['Pose'] = ()) -> int:
    """Write frames to a new bag folder and return their number.

    frames: (time since the start in ns, uint8 [height, width, 3] RGB) in order of time.
    on_frame: called after each frame, for progress.
    poses: written as odometry; their stamps are times since the start, too.

    Raises BagError when `out` exists (and may not be overwritten), when there are no frames, and on a failing disk;
    nothing is left behind then, and an older bag at `out` stays as it was.
    """
    out = Path(out)
    with new_folder(out, options.overwrite) as folder:
        try:
            with Writer(folder, version=_METADATA_VERSION, storage_plugin=_PLUGINS[options.storage]) as writer:
                count = _write_all(writer, frames, poses, options, on_frame)
                if not count:
                    raise BagError(f'there are no frames to write to {out}')
        except (OSError, sqlite3.Error, WriterError) as error:
            raise BagError(f'bag {out} cannot be written: {error}') from error
    return count


def _write_all(writer: Writer, frames, poses, options: BagOptions, on_frame) -> int:
    """Frames and poses in order of time; the number of frames."""
    store, count = get_typestore(Stores.ROS2_KILTED), 0
    write_frame, write_pose = _frame_writer(writer, store, options), None
    for time_ns, is_frame, entry in merge(((pose.stamp_ns, False, pose) for pose in poses),
                                          ((time_ns, True, picture) for time_ns, picture in frames), key=itemgetter(0, 1)):
        stamp_ns = options.start_ns + time_ns
        if stamp_ns >= STAMP_SECONDS * 10**9:
            raise BagError(f'image {count} would be stamped {stamp_ns / 1e9:g} s, but a header holds less than 2**31 seconds: '
                           'raise --rate or lower --start-stamp')
        if not is_frame:
            write_pose = write_pose or _pose_writer(writer, store)
            write_pose(stamp_ns, entry)
            continue
        write_frame(stamp_ns, entry)
        count += 1
        on_frame()
    return count


def _frame_writer(writer: Writer, store, options: BagOptions) -> Callable[[int, np.ndarray], None]:
    kind = 'sensor_msgs/msg/Image' if options.encoding == 'raw' else 'sensor_msgs/msg/CompressedImage'
    connection = writer.add_connection(options.full_topic, kind, typestore=store, offered_qos_profiles=[_OFFERED])

    def write(stamp_ns: int, picture: np.ndarray) -> None:
        header = _header(store, stamp_ns, options.frame_id)
        message = (_raw if options.encoding == 'raw' else _jpeg)(store.types[kind], header, picture, options)
        writer.write(connection, stamp_ns, store.serialize_cdr(message, kind))
    return write


def _pose_writer(writer: Writer, store) -> Callable[[int, 'Pose'], None]:
    kind, types = 'nav_msgs/msg/Odometry', store.types
    connection = writer.add_connection(ODOMETRY_TOPIC, kind, typestore=store, offered_qos_profiles=[_OFFERED])
    vector = types['geometry_msgs/msg/Vector3'](0.0, 0.0, 0.0)
    nothing = np.zeros(36)
    still = types['geometry_msgs/msg/TwistWithCovariance'](types['geometry_msgs/msg/Twist'](vector, vector), nothing)

    def write(stamp_ns: int, pose: 'Pose') -> None:
        told = types['geometry_msgs/msg/Pose'](types['geometry_msgs/msg/Point'](*pose.position),
                                               types['geometry_msgs/msg/Quaternion'](*pose.orientation))
        covariance = nothing if pose.covariance is None else np.array(pose.covariance)
        message = types[kind](_header(store, stamp_ns, pose.frame_id), 'base_link',
                              types['geometry_msgs/msg/PoseWithCovariance'](told, covariance), still)
        writer.write(connection, stamp_ns, store.serialize_cdr(message, kind))
    return write


def _header(store, stamp_ns: int, frame_id: str):
    return store.types['std_msgs/msg/Header'](
        stamp=store.types['builtin_interfaces/msg/Time'](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9), frame_id=frame_id)


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
