"""An album for each camera, on the disk where there is one."""
from functools import partial

from statekv_ros.node.disk import Disk
from statekv_ros.node.camera import Camera
from statekv_ros.node.pictures.album import Album
from statekv_ros.node.pictures.darkroom import Darkroom


def open_album(darkroom: Darkroom, camera: Camera, disk: Disk | None, width: int, quality: int) -> Album:
    """`width`, `quality`: of the thumbnails, see `Album`."""
    if disk is None:
        return Album(darkroom, camera.stream, width, quality)
    disk.albums[camera.name] = Album(darkroom, camera.stream, width, quality, partial(disk.picture, camera.name),
                                     disk.waiting_picture(camera.name))
    return disk.albums[camera.name]
