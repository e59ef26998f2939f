"""The folder of a store: who may write it, what may be wrong with it, and how that is said."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import lmdb

from statekv_ros.errors import StoreBusy, StoreError, StoreFull

DATA, READERS, WRITER = 'data.mdb', 'lock.mdb', 'writer.lock'
_READERS_BYTES = 8192       # LMDB's 126 readers
_REMEDIES = {
    errno.EACCES: 'no permission: make it belong to the user who runs this, or choose another folder (parameter "memory_dir")',
    errno.EPERM: 'no permission: make it belong to the user who runs this, or choose another folder (parameter "memory_dir")',
    errno.EROFS: 'it lies on a read-only file system: mount it writable, or choose another folder (parameter "memory_dir")',
    errno.ENOTDIR: 'a file lies where a folder is needed: choose another folder (parameter "memory_dir")',
    errno.ENOSPC: 'the disk is full: make room there, or choose another folder (parameter "memory_dir")',
    errno.EDQUOT: 'the user\'s disk quota is used up: make room there, or choose another folder (parameter "memory_dir")',
    errno.EIO: 'the disk reports an error (see the kernel\'s log): choose a folder on another disk (parameter "memory_dir")',
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_BYTES = 2**20      # less than this free: full
# The last two: keys of ours that are none.
_TORN = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, UnicodeDecodeError, struct.error)
_NETWORK = ('nfs', 'nfs4', 'cifs', 'smb3', 'smbfs', '9p', 'afs', 'ceph', 'fuse.sshfs')


def torn(folder: Path, what: str) -> StoreError:
    """The error of a memory that lost or changed bytes."""
    return StoreError(f'the memory in {folder} is damaged ({what}); it was left as it is. "statekv-memory export {folder} OUT" '
                      'saves the steps that are whole; then choose another folder (parameter "memory_dir"), or delete this one')


@contextlib.contextmanager
def told(folder: Path, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turns what LMDB and the system raise, `but` this, into a StoreError that names the folder and a remedy."""
    try:
        yield
    except but:
        raise
    except lmdb.MapFullError as error:
        raise StoreFull(f'{folder} has no room left within its quota: raise it (parameter "disk_cache_gb")') from error
    except _TORN as error:
        raise torn(folder, str(error)) from error
    except lmdb.VersionMismatchError as error:
        raise StoreError(f'{folder}/{DATA} was written by another version of LMDB; it was left as it is. Choose another folder '
                         '(parameter "memory_dir")') from error
    except (lmdb.Error, OSError) as error:
        number = error.errno if isinstance(error, OSError) else _number(error, folder)
        kind = StoreFull if number in _FULL else StoreError
        raise kind(f'{folder} cannot be used: {_REMEDIES.get(number, error)}') from error


def _number(error: lmdb.Error, folder: Path) -> int | None:
    """errno of an error of the system that LMDB passed on; it keeps only its text."""
    number = next((number for number in _REMEDIES if os.strerror(number) in str(error)), None)
    if number == errno.EIO:
        # LMDB calls a write that came to less than asked for an I/O error: that is how a disk becomes full.
        disk = os.statvfs(folder)
        number = errno.ENOSPC if disk.f_bavail * disk.f_frsize < _FULL_BYTES else number
    return number


def make_folder(folder: Path) -> None:
    """Make the folder, for its user alone: it holds what cameras saw. Or see that the one that is there can hold a store.

    Raises:
        StoreError: it is a file, cannot be made, or lies on a network drive.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f'{folder} is a file, not a folder: choose another folder (parameter "memory_dir")')
    with told(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if file_system(folder) in _NETWORK:
        raise StoreError(f'{folder} lies on a network drive ({file_system(folder)}), where neither locks nor mapped files '
                         'can be relied on: choose a folder on a disk of this machine (parameter "memory_dir")')


def make_reader_table(folder: Path) -> None:
    """Give LMDB's table of readers its room on the disk: it is mapped, and on a full disk a write there would be a SIGBUS.

    Raises:
        StoreError: there is no room.
    """
    with told(folder):
        table = os.open(folder / READERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(table, 0, _READERS_BYTES)
        finally:
            os.close(table)


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder ('ext4', 'tmpfs', 'nfs4', ...); '' where the system does not tell."""
    device = os.stat(folder).st_dev
    wanted = f'{os.major(device)}:{os.minor(device)}'
    with contextlib.suppress(OSError):
        for line in Path('/proc/self/mountinfo').read_text().splitlines():
            mount, _, kind = line.partition(' - ')
            if mount.split()[2] == wanted:
                return kind.split()[0]
    return ''


class WriterLock:
    """The right to write a folder, held by one store of one process; the system takes it back when the process ends.

    LMDB itself lets the writers of two processes wait for each other.

    Attributes:
        clean: the last one who held it closed the store, or there was none.
    """

    def __init__(self, folder: Path, owner: str):
        """
        Args:
            owner: what the next one who wants to write is told, beside the process and its machine.

        Raises:
            StoreBusy: another store holds it.
            StoreError: the folder cannot be written.
        """
        with told(folder):
            self._file = os.open(folder / WRITER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._file, 1000, 0).decode(errors='replace').strip() or 'another process'
            os.close(self._file)
            raise StoreBusy(f'{folder} is being written by {holder}: stop that one first, or choose another folder (parameter '
                             '"memory_dir")') from error
        self.clean = os.fstat(self._file).st_size == 0
        with contextlib.suppress(OSError):      # a full disk: the lock holds without the name
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f'process {os.getpid()} on {socket.gethostname()}{owner and f" ({owner})"}\n'.encode(), 0)
            os.fsync(self._file)
        _held.add(self)

    def release(self, clean: bool = False) -> None:
        """Give it back; `clean`: the store is closed."""
        _held.discard(self)
        if self._file >= 0:
            if clean:
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _after_fork() -> None:
    # A child that outlives its parent would keep the folder from the next one who wants to write it.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_after_fork)
