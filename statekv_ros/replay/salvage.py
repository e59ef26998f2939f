"""What can still be read of a bag's storage file that was cut off: everything before the damage."""
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rosbags.rosbag2.storage_mcap import McapReader

_ZSTD = b'\x28\xb5\x2f\xfd'      # CDR begins with a zero byte


class StoredMessage(NamedTuple):
    """One message as it lies in a bag."""

    topic: str
    type: str
    log_ns: int
    cdr: bytes


def readable_messages(file: Path) -> Iterator[StoredMessage]:
    """Messages of a .mcap or .db3 file in stored order, up to its end or the first damage, which raises nothing."""
    for message in _of_mcap(file) if file.suffix == '.mcap' else _of_sqlite3(file):
        if message.cdr.startswith(_ZSTD):
            return      # a bag with compressed messages: its metadata would be needed to read it
        yield message


def lacks_part_of_a_page(file: Path) -> bool:
    """Whether the last page of a .db3 file is incomplete, which SQLite notices only when it reads that page."""
    if file.suffix != '.db3':
        return False
    with file.open('rb') as database:
        page_bytes = int.from_bytes(database.read(18)[16:18], 'big')
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    return page_bytes >= 512 and file.stat().st_size % page_bytes != 0


def _of_mcap(file: Path) -> Iterator[StoredMessage]:
    # The index is at the end of the file, so it went first: scan the records instead, as far as they go. Damaged
    # records raise whatever their parser trips over (ReaderError, TypeError, struct.error, UnicodeDecodeError, ...).
    reader = McapReader(file)
    with file.open('rb') as reader.bio:
        reader.data_start = len(b'\x89MCAP0\r\n')
        reader.data_end = file.stat().st_size
        with contextlib.suppress(Exception):
            reader.meta_scan()
        with contextlib.suppress(Exception):
            for connection, log_ns, cdr in reader.messages_scan(reader.connections):
                yield StoredMessage(connection.topic, connection.msgtype, log_ns, cdr)


def _of_sqlite3(file: Path) -> Iterator[StoredMessage]:
    with contextlib.suppress(sqlite3.Error), \
            contextlib.closing(sqlite3.connect(f'{file.resolve().as_uri()}?immutable=1', uri=True)) as database:
        # SQLite refuses files shorter than their header says, unless it is told that somebody repairs them.
        database.execute('PRAGMA writable_schema=ON')
        topics = {key: (name, kind) for key, name, kind in database.execute('SELECT id, name, type FROM topics')}
        held = None
        for key, log_ns, cdr in database.execute('SELECT topic_id, timestamp, data FROM messages ORDER BY id'):
            if key not in topics or not isinstance(log_ns, int) or not isinstance(cdr, bytes):
                break       # SQLite reads zeros where a page is incomplete
            if held is not None:
                yield held
            held = StoredMessage(*topics[key], log_ns, cdr)
        # The last message of a file that ends within a page may end in such zeros.
        if held is not None and not lacks_part_of_a_page(file):
            yield held
