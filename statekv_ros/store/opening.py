"""What the data file of a store needs before it is written: its length, its tables, and the same maker."""
import json
import os
from collections.abc import Mapping
from pathlib import Path

import lmdb

from statekv_ros.errors import StoreMismatch
from statekv_ros.store.folder import DATA
from statekv_ros.store.reader import ABOUT, FORMAT_VERSION, RECORDS, VALUES, missing_bytes

_UNSAID = {'weights': 'as_stored'}      # what is so where an identity says nothing of it


def extend(environment: lmdb.Environment, folder: Path) -> int:
    """Make the file as long as its head pages say; returns the bytes that were missing.

    LMDB leaves out a last page that it allocated and did not need. Where the file was cut off, zeros are found out to be
    none of its pages, but reading what is not there at all would end the process.
    """
    missing = missing_bytes(environment, folder)
    if missing > 0:
        os.truncate(folder / DATA, (folder / DATA).stat().st_size + missing)
    return max(missing, 0)


def about(identity: Mapping[str, str | int]) -> bytes:
    """What a memory of the present format says of itself."""
    return json.dumps({'version': FORMAT_VERSION, 'identity': dict(identity)}).encode()


def begin(environment: lmdb.Environment, identity: Mapping[str, str | int]) -> None:
    """In an empty file: who made it, and the tables. In any other: nothing."""
    with environment.begin(write=True) as transaction:
        if environment.stat()['entries'] == 0:
            transaction.put(ABOUT, about(identity))
            for table in (RECORDS, VALUES):
                environment.open_db(table, txn=transaction)


def require_identity(folder: Path, there: Mapping[str, str | int], here: Mapping[str, str | int]) -> None:
    """Raises StoreMismatch where a memory was made by something else than what wants to write it."""
    differing = [f'{name} ({_said(there, name)} there, {_said(here, name)} here)'
                 for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if differing:
        raise StoreMismatch(f'the memory in {folder} was made with another {", ".join(differing)}; it was left as it is. Run '
                            'what made it, or choose another folder (parameter "memory_dir")')


def _said(identity: Mapping[str, str | int], name: str) -> str | int:
    return identity.get(name, _UNSAID.get(name, 'nothing'))
