"""What a process holds, and the shared memory that killed ROS processes leave behind."""
import fcntl
import re
from dataclasses import dataclass
from pathlib import Path

_SHARED_MEMORY = Path('/dev/shm')


@dataclass(frozen=True)
class Usage:
    """Of one process; shm_mb of the whole machine.

    Attributes:
        rss_mb: resident memory of its own: without shared segments, which belong to all that map them, and without the pages of
            files (libraries), which the kernel drops and reads again as it likes.
        shm_mb: memory that Fast DDS's files in /dev/shm take.
    """
    threads: int
    fds: int
    rss_mb: float
    shm_mb: float


def usage(pid: int) -> Usage:
    """Of a running process. Raises OSError when it is gone."""
    status = dict(re.findall(r'^(\w+):\s+(\d+)', Path(f'/proc/{pid}/status').read_text(), re.MULTILINE))
    if 'RssAnon' not in status:
        raise ProcessLookupError(f'process {pid} has ended')
    return Usage(int(status['Threads']), len(list(Path(f'/proc/{pid}/fd').iterdir())),
                 round(int(status['RssAnon']) / 1024, 1), shared_memory_mb())


def shared_memory_mb() -> float:
    """MB (2^20 bytes) that Fast DDS's files in /dev/shm take."""
    return round(sum(_blocks(file) for file in _SHARED_MEMORY.glob('*fastdds*')) / 2**20, 1)


def segments(pid: int) -> set[Path]:
    """Fast DDS's segments that a process has mapped, its own and its peers'."""
    try:
        maps = Path(f'/proc/{pid}/maps').read_text()
    except OSError:     # gone already
        return set()
    return {_SHARED_MEMORY / name for name in re.findall(r'/dev/shm/(fastdds_[0-9a-f]{16})\b', maps)}


def remove_ownerless(files: set[Path]) -> int:
    """Remove those segments whose owner is dead; returns the bytes that were freed."""
    freed = 0
    for file in files:
        lock = file.with_name(f'{file.name}_el')
        if not _owned(lock):
            freed += _blocks(file)
            file.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    return freed


def _owned(lock: Path) -> bool:
    """Fast DDS's owner holds an exclusive flock on this file for as long as it lives."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _blocks(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0
