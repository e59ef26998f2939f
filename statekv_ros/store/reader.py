"""Looking into a memory on disk; also while a node writes it, from another process."""
from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from statekv_ros.errors import StoreError
from statekv_ros.store.folder import DATA, told, torn
from statekv_ros.store.records import (STATE, STEP, Record, camera_and_step, part_key, part_keys, state_key, step_key, step_prefix,
                                       tensor)

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 2      # 1 had records that were not deflated; they can be read
ABOUT, RECORDS, VALUES = b'about', b'records', b'values'      # in LMDB's main table: what made it, and two tables
_AT_ONCE = 256          # records that are read in one transaction


class StoreReader:
    """Reads steps and states. Every call has a short transaction of its own: a long one keeps pages from being used again.

    Attributes:
        folder: where it lies.
        identity: what made it: model, policies, layout.
    """

    def __init__(self, folder: Path, environment: lmdb.Environment):
        self.folder, self._environment = folder, environment
        self._process = os.getpid()
        self.identity: dict[str, str | int] = self._about()
        with told(folder):
            self._records, self._values = (environment.open_db(name, create=False) for name in (RECORDS, VALUES))

    @classmethod
    def look(cls, folder: str | Path) -> StoreReader:
        """Open for reading only.

        Raises:
            StoreError: there is no memory in the folder, it is damaged, of a newer version, or not readable.
        """
        folder = Path(folder)
        with told(folder):
            if not (folder / DATA).is_file() or not (folder / DATA).stat().st_size:
                raise StoreError(f'{folder} holds no memory (no {DATA}): give the folder that the node\'s parameter '
                                 '"memory_dir" names')
            environment = lmdb.open(str(folder), map_size=0, readonly=True, max_dbs=2)
        try:
            if missing_bytes(environment, folder) > 0:
                raise torn(folder, f'{DATA} has lost its end: {missing_bytes(environment, folder)} bytes')
            return cls(folder, environment)
        except BaseException:
            environment.close()
            raise

    def cameras(self) -> list[str]:
        """Names of the cameras that it holds steps or a state of, sorted."""
        found = set()
        with self._reading() as transaction, transaction.cursor(self._records) as cursor:
            for kind in (STEP, STATE):
                more = cursor.set_range(kind)
                while more and cursor.key().startswith(kind):
                    name = cursor.key()[len(kind):].split(b'\0', 1)[0]
                    found.add(name.decode())
                    more = cursor.set_range(kind + name + b'\1')
        return sorted(found)

    def steps(self, camera: str) -> list[tuple[int, dict[str, Any]]]:
        """Number and header of each step of a camera, oldest first.

        Raises:
            StoreError: a record is damaged.
        """
        return list(self.headers(camera))

    def headers(self, camera: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """As `steps`, one after the other: all headers of hours are hundreds of MB."""
        return ((step, self._whole(record, f'step {step} of {camera!r}').header) for step, record in self.each(camera))

    def records(self, camera: str) -> dict[int, Record | None]:
        """The record of each step of a camera, oldest first; None for one that is damaged."""
        return dict(self.each(camera))

    def each(self, camera: str) -> Iterator[tuple[int, Record | None]]:
        """As `records`, one after the other. What is written or leaves meanwhile may be among them or not."""
        prefix = key = step_prefix(camera)
        while key:
            found, key = self._some(prefix, key)
            yield from ((camera_and_step(key)[1], _decoded(value)) for key, value in found)

    def _some(self, prefix: bytes, key: bytes) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """Some records, encoded, by their keys from `key` on, and the key that comes next; None behind the last of a prefix."""
        found = []
        with self._reading() as transaction, transaction.cursor(self._records) as cursor:
            more = cursor.set_range(key)
            while more and cursor.key().startswith(prefix):
                if len(found) == _AT_ONCE:
                    return found, cursor.key()
                found.append(cursor.item())
                more = cursor.next()
        return found, None

    def runs(self, camera: str, part: str, steps: Sequence[int],
             extents: Sequence[tuple[int, Sequence[slice]]]) -> list[bytes | None]:
        """Runs of bytes of one part of several steps, in one transaction; None where there is no such step or part, or it is of
        another size. Pages of the file that are not asked for are not touched.

        Args:
            extents: of each step, bytes of the whole part, and which of them are read, one behind the other.

        Raises:
            StoreError: the file cannot be read.
        """
        found, values = [], self._values
        with self._reading(buffers=True) as transaction:
            for key, (size, runs) in zip(part_keys(camera, part, steps), extents):
                value = transaction.get(key, None, values)
                found.append(None if value is None or len(value) != size else b''.join([value[run] for run in runs]))
        return found

    def load_state(self, camera: str) -> tuple[dict[str, Any], dict[str, torch.Tensor | bytes]] | None:
        """Header and parts of a camera's newest state; None where it has none.

        Raises:
            StoreError: it is damaged.
        """
        return self._load(state_key(camera), f'the state of {camera!r}')

    def load_step(self, camera: str, step: int, only: str | None = None) -> tuple[
            dict[str, Any], dict[str, torch.Tensor | bytes]] | None:
        """Header and all parts of a step (`only` one), verified; None where there is no such step.

        Raises:
            StoreError: it is damaged, or has no such part.
        """
        found = self._load(step_key(camera, step), f'step {step} of {camera!r}', only)
        if found and only and only not in found[1]:
            raise self._has_no(only, camera, step)
        return found

    def load_part(self, camera: str, step: int, part: str) -> torch.Tensor | bytes:
        """One part of a step, verified.

        Raises:
            StoreError: it is damaged, or there is no such step or part.
        """
        found = self.load_step(camera, step, part)
        if found is None:
            raise self._has_no(part, camera, step)
        return found[1][part]

    def record(self, camera: str, step: int | None) -> Record | None:
        """The record of a step, or of a camera's state (None); None when there is none.

        Raises:
            StoreError: it is damaged.
        """
        key, what = (state_key(camera), f'the state of {camera!r}') if step is None else \
            (step_key(camera, step), f'step {step} of {camera!r}')
        with self._reading() as transaction:
            value = transaction.get(key, db=self._records)
        return None if value is None else self._whole(_decoded(value), what)

    def bytes(self, camera: str | None = None) -> int:
        """Bytes of the parts of a camera's steps and state; of all cameras by default."""
        total = 0
        for name in [camera] if camera is not None else self.cameras():
            total += sum(part.bytes for record in chain((record for _, record in self.each(name)), [self._state_record(name)])
                         if record is not None for part in record.parts.values())
        return total

    def file_bytes(self) -> int:
        """Bytes that the store takes of the disk."""
        return (self.folder / DATA).stat().st_blocks * 512

    def check(self) -> list[str]:
        """Read everything and compare it with its checksums; returns a line for each step or state that is damaged.

        Raises:
            StoreError: the tree itself is damaged.
        """
        damaged = []
        for camera in self.cameras():
            steps = {f'step {step} of {camera!r}': step_key(camera, step) for step in self.records(camera)}
            for what, key in {**steps, f'the state of {camera!r}': state_key(camera)}.items():
                try:
                    self._verified(key, what, None)
                except StoreError as error:
                    damaged.append(str(error))
        return damaged

    def close(self) -> None:
        """Close it; what was read stays valid. Does nothing in a child process, whose parent has it open."""
        if os.getpid() == self._process:
            self._environment.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @contextlib.contextmanager
    def _reading(self, buffers: bool = False) -> Iterator[lmdb.Transaction]:
        """A short transaction; with `buffers`, values are views that end with it."""
        self._require_own_process()
        with told(self.folder), self._environment.begin(buffers=buffers) as transaction:
            yield transaction

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise StoreError(f'the memory in {self.folder} was opened by process {self._process}, and this one, {os.getpid()}, '
                             'was forked from it: open it in the process that uses it')

    def _about(self) -> dict[str, str | int]:
        with self._reading() as transaction:
            value = transaction.get(ABOUT)
            about = None
            if value is not None:
                with contextlib.suppress(ValueError):
                    about = json.loads(value)
        if not isinstance(about, dict) or not isinstance(about.get('version'), int):
            raise StoreError(f'{self.folder}/{DATA} is not a memory of this package; it was left as it is. Choose another '
                             'folder (parameter "memory_dir")')
        if about['version'] > FORMAT_VERSION:
            raise StoreError(f'the memory in {self.folder} has format version {about["version"]}, and this package knows up to '
                             f'{FORMAT_VERSION}; it was left as it is. Update the package, or choose another folder (parameter '
                             '"memory_dir")')
        return about['identity']

    def _verified(self, key: bytes, what: str, take: Callable | None,
                  only: str | None = None) -> tuple[Record, dict[str, Any]] | None:
        """A record and what `take(value)` makes of the value of each part (`only` of one), each compared with its checksum."""
        with self._reading(buffers=True) as transaction:
            value = transaction.get(key, db=self._records)
            if value is None:
                return None
            record, taken = self._whole(_decoded(bytes(value)), what), {}
            for name, part in record.parts.items():
                if only not in (None, name):
                    continue
                stored = transaction.get(part_key(key, name), db=self._values)
                if stored is None or len(stored) != part.bytes or zlib.crc32(stored) != part.crc:
                    state = 'gone' if stored is None else 'no longer what was stored'
                    raise torn(self.folder, f'part {name!r} of {what} is {state}')
                if take is not None:
                    taken[name] = take(stored)
            return record, taken

    def _load(self, key: bytes, what: str, only: str | None = None) -> tuple[
            dict[str, Any], dict[str, torch.Tensor | bytes]] | None:
        import torch
        found = self._verified(key, what, bytes, only)
        if found is None:
            return None
        record, values = found
        return record.header, {
            name: tensor(memoryview(value), getattr(torch, part.dtype), part.shape) if part.dtype else value
            for name, value in values.items() for part in [record.parts[name]]}

    def _has_no(self, part: str, camera: str, step: int) -> StoreError:
        return StoreError(f'{self.folder} has no part {part!r} of step {step} of {camera!r}')

    def _state_record(self, camera: str) -> Record | None:
        with self._reading() as transaction:
            value = transaction.get(state_key(camera), db=self._records)
        return None if value is None else _decoded(value)

    def _whole(self, record: Record | None, what: str) -> Record:
        if record is None:
            raise torn(self.folder, f'the record of {what} is not whole')
        return record


def missing_bytes(environment: lmdb.Environment, folder: Path) -> int:
    """Bytes by which the file is shorter than its head pages say. Reading there would end the process by SIGBUS."""
    return (environment.info()['last_pgno'] + 1) * environment.stat()['psize'] - (folder / DATA).stat().st_size


def _decoded(value: bytes) -> Record | None:
    try:
        return Record.decode(value)
    except ValueError:
        return None
