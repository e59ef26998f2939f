"""Who reads an old state of a store: the pages that left since stay taken until that one is done."""
from __future__ import annotations

from typing import NamedTuple

import lmdb


class Holder(NamedTuple):
    """A reader in LMDB's table: its process and thread, and the state that it reads (the number of the commit that made it)."""
    process: int
    thread: str
    state: int


def holders(environment: lmdb.Environment, state: int) -> list[Holder]:
    """Readers of states before `state`, oldest first; those of processes that are gone are taken out of the table."""
    environment.reader_check()
    found = []
    for line in environment.readers().splitlines():
        process, thread, reads = (line.split() + [''] * 3)[:3]
        if process.isdecimal() and reads.isdecimal() and int(reads) < state:   # the rest: its head, or reads nothing now
            found.append(Holder(int(process), thread, int(reads)))
    return sorted(found, key=lambda holder: holder.state)
