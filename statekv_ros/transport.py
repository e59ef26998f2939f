"""The Fast DDS profile that lets big images through shared memory. No ROS is imported: call it before rclpy.init().

With Fast DDS's defaults nearly all big best-effort images are lost between processes (`statekv-bench transport` shows
it); config/fastdds_shm.xml gives shared memory segments that hold many of them.
"""
import enum
import os
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from statekv_ros.share import find_share

PROFILE_NAME = 'fastdds_shm.xml'
# Fast DDS 3 (Kilted and later) reads the first name and warns of the second, which Fast DDS 2 (Jazzy) reads.
PROFILE_VARIABLES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')
_FAST_DDS_2 = ('humble', 'iron', 'jazzy')
# What else makes the transports the user's own choice.
_USER_VARIABLES = (*PROFILE_VARIABLES, 'FASTDDS_BUILTIN_TRANSPORTS')
_USER_FILES = ('DEFAULT_FASTDDS_PROFILES.xml', 'DEFAULT_FASTRTPS_PROFILES.xml')     # read from the working directory
_SHARED_MEMORY = '/dev/shm'
_OVERHEAD_BYTES = 4 << 20       # of a process, beside its segment: headers, locks and ports


class ProfileSource(enum.Enum):
    """Whose transport settings this process runs with."""

    SHIPPED = 'shipped'             # ours, now named in the environment
    USER = 'user'                   # the user has set something: left alone
    MISSING = 'missing'             # ours was not found: Fast DDS's defaults, big best-effort images will be lost
    OTHER = 'other middleware'      # not Fast DDS: nothing to do


@dataclass(frozen=True)
class TransportProfile:
    """What `use_shipped_profile` found and did."""

    source: ProfileSource
    path: Path | None               # the profile in use, where it is a file
    detail: str                     # one sentence for logs and diagnostics


def find_shipped_profile() -> Path | None:
    """Path of fastdds_shm.xml: beside the source tree, in the package's installed share folder, or None."""
    return find_share(f'config/{PROFILE_NAME}')


def profile_variable() -> str:
    """The environment variable in which this ROS distribution's Fast DDS looks for a profile."""
    return PROFILE_VARIABLES[os.environ.get('ROS_DISTRO') in _FAST_DDS_2]


def use_shipped_profile() -> TransportProfile:
    """Name the shipped profile in this process's environment, unless the user has set transports in any way.

    Must run before rclpy.init(): Fast DDS reads the environment once. Child processes inherit it.
    """
    middleware = os.environ.get('RMW_IMPLEMENTATION', '')
    if middleware and 'fastrtps' not in middleware:
        return TransportProfile(ProfileSource.OTHER, None, f'RMW_IMPLEMENTATION is {middleware}: the Fast DDS profile '
                                'does not apply')
    shipped = find_shipped_profile()
    for name in _USER_VARIABLES:
        value = os.environ.get(name)
        if value and shipped and name in PROFILE_VARIABLES and Path(value).resolve() == shipped.resolve():
            return TransportProfile(ProfileSource.SHIPPED, shipped, f'shipped profile {shipped}, already set')
        if value:
            path = Path(value) if name in PROFILE_VARIABLES else None
            return TransportProfile(ProfileSource.USER, path, f'{name}={value} is set by the user and left as it is')
    for name in _USER_FILES:
        if Path(name).is_file():
            return TransportProfile(ProfileSource.USER, Path(name).resolve(),
                                    f'{name} in the working directory is read by Fast DDS and left as it is')
    if shipped is None:
        return TransportProfile(ProfileSource.MISSING, None, f'{PROFILE_NAME} was not found: big best-effort images '
                                f'will be lost; reinstall the package, or set {profile_variable()}')
    os.environ[profile_variable()] = str(shipped)
    return TransportProfile(ProfileSource.SHIPPED, shipped, f'shipped profile {shipped}')


def segment_bytes(profile: Path) -> int:
    """Bytes of shared memory of one process under this Fast DDS profile; 0 if it names none or is unreadable."""
    try:
        elements = ElementTree.parse(profile).iter()
        return sum(int(element.text) for element in elements if element.tag.rpartition('}')[2] == 'segment_size')
    except (OSError, ElementTree.ParseError, ValueError, TypeError):
        return 0


def shared_memory_problem(processes: int = 3, folder: str = _SHARED_MEMORY) -> str | None:
    """Why shared memory is too small for the profile in use and what to do; None when all is well.

    processes: ROS processes that share the memory, by default a camera (or player), the node and a client.
    """
    profile = next((os.environ[name] for name in PROFILE_VARIABLES if os.environ.get(name)), None)
    if profile is None or not os.path.isdir(folder):
        return None
    segment = segment_bytes(Path(profile))
    if not segment:
        return None
    one = segment + _OVERHEAD_BYTES
    needed = one * processes
    size = os.statvfs(folder)
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    if total >= needed and free >= one:
        return None
    return (f'{folder} has {total >> 20} MB, {free >> 20} MB of them free; the Fast DDS profile {profile} takes '
            f'{one >> 20} MB for each ROS process ({needed >> 20} MB for {processes}), so images may be lost: start '
            'the container with "docker run --shm-size=512m" (or --ipc=host), or lower segment_size in a copy of the '
            f'profile and name it in {profile_variable()}; what killed processes left is removed when statekv-node starts')
