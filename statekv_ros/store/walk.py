"""`python -m statekv_ros.store.walk FOLDER`: goes through the trees of a memory, in a process that LMDB may end.

LMDB trusts the pages of its trees: where one is damaged, an assertion in C or a read beyond the file ends the process.
"""
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import lmdb

from statekv_ros.errors import StoreError
from statekv_ros.store.folder import told, torn
from statekv_ros.store.reader import RECORDS, VALUES, StoreReader

_TRIAL_BYTES = 2**20
_CRASHES = signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS
_LIMIT_S = 300.0        # trees are small: a thousandth of the file, and less


def require_walkable(folder: Path) -> None:
    """Before LMDB opens the folder in this process: let another one try. What that one can say itself is found here again.

    Raises:
        StoreError: it did not survive.
    """
    try:
        code = subprocess.run([sys.executable, '-m', 'statekv_ros.store.walk', folder], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_LIMIT_S).returncode
    except subprocess.TimeoutExpired:
        raise torn(folder, f'a process that went through its trees did not come to an end in {_LIMIT_S:g} s') from None
    if -code in _CRASHES:       # not where somebody stops this process, and with it that one
        raise torn(folder, f'a process that went through its trees was ended by {signal.Signals(-code).name}')


def walk(folder: Path) -> None:
    """Read every page of the tables' trees, then have LMDB look for free pages; nothing is changed.

    Raises:
        StoreError: something is damaged, and LMDB says so itself.
    """
    StoreReader.look(folder).close()        # it is ours, and as long as it says
    with told(folder), contextlib.closing(lmdb.open(str(folder), max_dbs=2, sync=False, metasync=False)) as environment:
        tables = [environment.open_db(table, create=False) for table in (RECORDS, VALUES)]
        with environment.begin(buffers=True) as transaction:
            for table in tables:
                for _ in transaction.cursor(table):     # of a large value only where it lies
                    pass
        with environment.begin(write=True) as transaction:
            with contextlib.suppress(lmdb.MapFullError):
                transaction.put(b'\0', bytes(_TRIAL_BYTES), db=tables[1])
            transaction.abort()


if __name__ == '__main__':
    try:
        walk(Path(sys.argv[1]))
    except StoreError as error:
        sys.exit(str(error))
