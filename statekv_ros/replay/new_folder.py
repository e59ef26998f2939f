"""A folder that appears whole or not at all, and what is left of those whose writer was killed."""
import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from statekv_ros.errors import BagError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A path that does not exist yet, moved to `out` at the end of the block; removed if the block fails.

    What an earlier writer of `out` left behind because it was killed is cleared away first. Raises BagError.
    """
    try:
        _clear_away(out)
        if out.exists() or out.is_symlink():
            if not overwrite:
                raise BagError(f'{out} exists: choose another name, or overwrite it with --overwrite')
            if not _may_replace(out):
                raise BagError(f'{out} exists and is not a bag, so it is not overwritten: choose another name')
        out.parent.mkdir(parents=True, exist_ok=True)
        workplace, lock = _workplace(out)
    except OSError as error:
        raise BagError(f'bag {out} cannot be written: {error}') from error
    try:
        folder = workplace / out.name
        yield folder
        _move_into_place(folder, out, _old(workplace, out))
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        os.close(lock)


def _workplace(out: Path) -> tuple[Path, int]:
    """A folder beside `out`, and a descriptor that holds its lock, which ends with the process, however that ends.

    Beside `out`, so that the move at the end cannot fail half way; in a folder of its own, so that the storage file, which is
    named after the bag, gets the right name at once.
    """
    while True:
        workplace = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        # Until it is locked, someone else who clears away may take it for a left one: then another.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(workplace, _FOLDER)
            with contextlib.suppress(OSError):      # a file system without locks, where nothing is cleared away either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if workplace.exists():
                return workplace, lock
            os.close(lock)


def _clear_away(out: Path) -> None:
    """Remove workplaces of `out` that no process holds. A bag that was about to be overwritten gets its name back."""
    for workplace in out.parent.glob(f'{glob.escape(_prefix(out))}*'):
        with contextlib.suppress(OSError):      # held, or not ours to remove
            lock = os.open(workplace, _FOLDER)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _old(workplace, out).exists() and not out.exists():
                    _old(workplace, out).rename(out)
                shutil.rmtree(workplace, ignore_errors=True)
            finally:
                os.close(lock)


def _prefix(out: Path) -> str:
    return f'.{out.name}.partial-'


def _old(workplace: Path, out: Path) -> Path:
    return workplace / f'{out.name}.old'


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
