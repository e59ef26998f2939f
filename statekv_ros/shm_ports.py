"""Shared-memory ports of Fast DDS whose reader was killed, mended from outside. No ROS is imported.

Whoever writes to a port whose reader was killed while it took a message stands still for good (all versions from 2.6 to 3.6):
`SharedMemManager::Port::recover_blocked_processing` asks for the reader's message until no reader holds any, and each time
fails to strike it out, because it waits (a second) for a lock that it holds itself
(https://github.com/eProsima/Fast-DDS/issues/6484). In Python it holds the interpreter's lock meanwhile. Striking the message out
in the shared memory keeps writers from that, and lets those go on that stand there already. The price is one buffer of
the message's sender, which is not used again.

Whoever opens a port that its maker was killed in the midst of making waits without end, too (`boost::interprocess`,
`managed_open_or_create_impl`); such a port is taken away and marked as corrupted, for which Fast DDS makes a new one.
"""
import contextlib
import fcntl
import os
import platform
import re
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

_PORT = re.compile(r'(fastdds|fastrtps)_port(\d+)')
# Of the struct `PortNode`, the first that is allocated in a port's segment, in bytes from the segment's start. Versions 2.14
# (fastrtps) and 3 (fastdds) have the same; a port that is laid out in another way is left alone.
_NODE = 256
_PORT_ID = _NODE + 20
# glibc's pthread_mutex_t; there are two of them before the readers' statuses.
MUTEX_SIZE = 48 if platform.machine() == 'aarch64' else 40
STATUS = _NODE + 20552 + 2 * MUTEX_SIZE
_STATUS_SIZE, _READERS = 20, 1024
_DOMAIN_NAME = STATUS + _READERS * _STATUS_SIZE
# Of a reader's status, the first byte: in use, waiting, processing.
_HELD = re.compile(rb'[\x05\x07]')
_PROCESSING = 4
# The first word of a boost segment.
_UNINITIALIZED, _INITIALIZING, _CORRUPTED = 0, 1, 3
# Making a port lasts microseconds.
_HALF_MADE_S = 3.0
# A file that is gone may still be mapped by a writer.
_KEEP_GONE_S = 60.0


@dataclass
class _Port:
    end: int                                # file descriptor
    name: str
    inode: int
    number: int
    domain: bytes
    held: dict[int, bytes] = field(default_factory=dict)    # readers that hold a message: their status at the last look
    half_since: float | None = None
    gone_since: float | None = None


class Ports:
    """All ports of this machine that are this user's. `look` twice a second: a writer comes to stand still one to two seconds
    after the death of a reader, and goes on within a second after the message was struck out."""

    def __init__(self, folder: str | Path = '/dev/shm'):
        """folder: where the system keeps shared memory."""
        self._folder = Path(folder)
        self._ports: dict[int, _Port] = {}      # by inode

    def look(self) -> int:
        """Mend what has to be; how many ports that were. A reader must have held the same message at the look before."""
        now = time.monotonic()
        self._find(now)
        mended = 0
        for port in list(self._ports.values()):
            try:
                mended += self._strike_out(port) + self._take_away_half_made(port, now)
            except OSError:
                self._forget(port)
                continue
            if port.gone_since is not None and now - port.gone_since > _KEEP_GONE_S:
                self._forget(port)
        return mended

    def close(self) -> None:
        """Let go of all files."""
        for port in list(self._ports.values()):
            self._forget(port)

    def _find(self, now: float) -> None:
        there = set()
        try:
            entries = list(os.scandir(self._folder))
        except OSError:     # a system without it
            entries = []
        for entry in entries:
            if match := _PORT.fullmatch(entry.name):
                there.add(entry.inode())
                if entry.inode() not in self._ports and (port := self._open(entry.path, match)) is not None:
                    self._ports[port.inode] = port
        for inode, port in self._ports.items():
            port.gone_since = None if inode in there else port.gone_since or now

    def _open(self, path: str, match: re.Match) -> _Port | None:
        try:
            end = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:     # gone meanwhile, or another user's
            return None
        return _Port(end, match[0], os.fstat(end).st_ino, int(match[2]), match[1].encode())

    def _forget(self, port: _Port) -> None:
        del self._ports[port.inode]
        os.close(port.end)

    def _strike_out(self, port: _Port) -> int:
        statuses = self._statuses(port)
        held = {}
        for match in _HELD.finditer(statuses[::_STATUS_SIZE]):
            start = match.start() * _STATUS_SIZE
            held[match.start()] = statuses[start:start + _STATUS_SIZE]
        stuck = [reader for reader, status in held.items() if port.held.get(reader) == status]
        port.held = held
        # A file of the same name may be another port by now, with a reader of its own that lives.
        if not stuck or port.gone_since is None and self._is_read(port.name):
            return 0
        for reader in stuck:
            os.pwrite(port.end, bytes([held.pop(reader)[0] & ~_PROCESSING]), STATUS + reader * _STATUS_SIZE)
        return 1

    def _statuses(self, port: _Port) -> bytes:
        """Of all places for readers; empty where this is no port as we know them."""
        data = os.pread(port.end, _DOMAIN_NAME + len(port.domain) + 1, 0)
        if len(data) <= _DOMAIN_NAME + len(port.domain) or data[_DOMAIN_NAME:] != port.domain + b'\0' \
                or struct.unpack_from('<I', data, _PORT_ID)[0] != port.number:
            return b''
        return data[STATUS:_DOMAIN_NAME]

    def _is_read(self, name: str) -> bool:
        """Whether a process that lives holds the lock of the port's readers: exclusive, or shared among several."""
        return any(self._is_locked(self._folder / f'{name}{kind}') for kind in ('_el', '_sl'))

    def _is_locked(self, path: Path) -> bool:
        try:
            end = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True     # not for us to say
        try:
            fcntl.flock(end, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except OSError:
            return True
        finally:
            os.close(end)

    def _take_away_half_made(self, port: _Port, now: float) -> int:
        size = os.fstat(port.end).st_size
        word = os.pread(port.end, 4, 0)
        if size and (len(word) < 4 or struct.unpack('<I', word)[0] not in (_UNINITIALIZED, _INITIALIZING)):
            port.half_since = None
            return 0
        if port.half_since is None:
            port.half_since = now
        if now - port.half_since < _HALF_MADE_S:
            return 0
        port.half_since = None
        path = self._folder / port.name
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == port.inode:
                path.unlink()
        # Those who wait look at the file that they have opened: at its size, then at its first word.
        if size:
            os.pwrite(port.end, struct.pack('<I', _CORRUPTED), 0)
        else:
            os.ftruncate(port.end, 1)
        return 1
