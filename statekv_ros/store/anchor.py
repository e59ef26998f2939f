"""What a power cut leaves: the store as it was when it was last flushed, whatever the system wrote since.

LMDB never overwrites a page that its newest state refers to, so a killed process loses nothing. The disk, though, gets
pages in any order between two flushes: after a power cut LMDB's two head pages may be newer than what they refer to. So

* a reader is kept open on the state that was flushed last: while it is, none of that state's pages are used again;
* that state's head pages are kept beside the data, in two slots that are written in turn. When the machine was started
  again since, they are put back before LMDB looks at the file.
"""
from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

import lmdb

from statekv_ros.store.folder import DATA, told

ANCHOR = 'flushed.heads'
_HEADS = 2                          # LMDB's head pages, at the beginning of the file
_SLOT = 128 * 1024 + 4096           # room for two pages of 64 KiB, the largest there are, and what is said of them
_FIELDS = struct.Struct('>IQQ36sI')     # checksum of the rest, number of the flush, inode of the data, boot id, bytes of heads


def boot_id() -> bytes:
    """Changes with every start of the machine; empty where the system has none."""
    with contextlib.suppress(OSError):
        return Path('/proc/sys/kernel/random/boot_id').read_bytes().strip()[:36]
    return b''


def put_back(folder: Path) -> None:
    """Before LMDB opens the folder: after a start of the machine, go back to the state that was flushed last.

    The head pages of a store that was closed stay what they are: closing flushes. A copy of a folder is taken as it is.
    """
    newest = _newest(folder)
    if newest is None:
        return
    with told(folder), open(folder / DATA, 'r+b') as data:
        _, inode, boot, heads = newest
        if boot and boot != boot_id() and inode == os.fstat(data.fileno()).st_ino and data.read(len(heads)) != heads:
            data.seek(0)
            data.write(heads)
            data.flush()
            os.fsync(data.fileno())


def was_flushed(folder: Path) -> bool:
    """Whether a state of this folder was ever flushed."""
    return _newest(folder) is not None


class Anchor:
    """Holds on to the state that was flushed last, and moves on at every flush.

    Attributes:
        state: number of the commit that made it.
    """

    def __init__(self, environment: lmdb.Environment, folder: Path):
        """
        Raises:
            StoreError: the file beside the data cannot be written.
        """
        self._environment, self._folder = environment, folder
        newest = _newest(folder)
        self._number = newest[0] if newest else 0
        self._head_bytes = _HEADS * environment.stat()['psize']
        with told(folder):
            self._data = os.open(folder / DATA, os.O_RDONLY | os.O_CLOEXEC)
            self._file = os.open(folder / ANCHOR, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            # Written once as a whole: later flushes need no more room, so a full disk does not stop them.
            missing = 2 * _SLOT - os.fstat(self._file).st_size
            if missing > 0:
                os.pwrite(self._file, bytes(missing), 2 * _SLOT - missing)
        self._reader: lmdb.Transaction | None = None
        self.state = 0

    def begin(self) -> tuple[bytes, lmdb.Transaction]:
        """The state to flush; while nothing is being committed."""
        return os.pread(self._data, self._head_bytes, 0), self._environment.begin()

    def flush(self, state: tuple[bytes, lmdb.Transaction]) -> None:
        """Bring a state to the disk; steps may be committed meanwhile.

        Raises:
            StoreError: the disk reports an error; the state before is still held.
        """
        heads, reader = state
        try:
            with told(self._folder):
                self._environment.sync(True)
                self._number += 1
                rest = _FIELDS.pack(0, self._number, os.fstat(self._data).st_ino, boot_id(), len(heads))[4:] + heads
                os.pwrite(self._file, struct.pack('>I', zlib.crc32(rest)) + rest, self._number % 2 * _SLOT)
                os.fdatasync(self._file)
        except BaseException:
            reader.abort()
            raise
        if self._reader is not None:
            self._reader.abort()
        self._reader, self.state = reader, reader.id()

    def close(self) -> None:
        """Let go; what was flushed stays."""
        if self._reader is not None:
            self._reader.abort()
            self._reader = None
        os.close(self._file)
        os.close(self._data)


def _newest(folder: Path) -> tuple[int, int, bytes, bytes] | None:
    """Number, inode, boot id and head pages of the last flush that is whole."""
    found = []
    with told(folder), contextlib.suppress(FileNotFoundError), open(folder / ANCHOR, 'rb') as file:
        content = file.read()
        for slot in (content[:_SLOT], content[_SLOT:]):
            if len(slot) < _FIELDS.size:
                continue
            checksum, number, inode, boot, size = _FIELDS.unpack_from(slot)
            if checksum == zlib.crc32(slot[4:_FIELDS.size + size]) and number:
                found.append((number, inode, boot.rstrip(b'\0'), slot[_FIELDS.size:_FIELDS.size + size]))
    return max(found, default=None)
