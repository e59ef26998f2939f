"""Shared memory that killed ROS processes left behind. No ROS is imported.

A process that is killed cannot remove its Fast DDS segment: 70 MB each with the shipped profile. Fast DDS holds a lock
(flock) on `<segment>_el` for as long as the owner lives, and the kernel lets go of it when the owner dies; "fastdds shm
clean" and Fast DDS itself decide by that lock, and so does this. Ports (`fastdds_port...`, 52 kB, shared by all who ever
take the same number) are left: Fast DDS resets those of dead owners when it opens them.
"""
import fcntl
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

_LOCK = re.compile(r'(fastdds|fastrtps)_[0-9a-f]{16}_el')
# A lock file is made a moment before it is locked.
_SETTLED_S = 5.0


@dataclass(frozen=True)
class Freed:
    """What `remove_dead_segments` removed: how many segments, and their bytes of shared memory."""
    segments: int
    bytes: int


def remove_dead_segments(folder: str | Path = '/dev/shm') -> Freed:
    """Remove this user's Fast DDS segments whose owners are gone; never one whose owner lives, or that is not this user's."""
    segments = freed = 0
    for lock in Path(folder).glob('fast*_el'):
        if _LOCK.fullmatch(lock.name):
            size = _remove_if_dead(lock)
            segments, freed = segments + (size is not None), freed + (size or 0)
    return Freed(segments, freed)


def _remove_if_dead(lock: Path) -> int | None:
    """Bytes of shared memory freed; None when the owner lives, or it is not for us to say."""
    try:
        end = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or another user's
        return None
    try:
        state = os.fstat(end)
        if state.st_uid != os.getuid() or time.time() - state.st_mtime < _SETTLED_S:
            return None
        fcntl.flock(end, fcntl.LOCK_EX | fcntl.LOCK_NB)  # kept until both are removed
        segment = lock.with_name(lock.name.removesuffix('_el'))
        blocks = segment.lstat().st_blocks * 512 if segment.exists() else 0
        segment.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
        return blocks
    except OSError:  # locked: the owner lives
        return None
    finally:
        os.close(end)
