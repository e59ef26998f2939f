"""The memory on disk, for the one who writes it: steps go in whole, the oldest leave when the quota is full."""
from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from statekv_ros.errors import ParameterError, StoreError, StoreFull
from statekv_ros.store.anchor import Anchor, put_back, was_flushed
from statekv_ros.store.folder import DATA, WriterLock, make_folder, make_reader_table, told, torn
from statekv_ros.store.holders import Holder, holders
from statekv_ros.store.opening import about, begin, extend, require_identity
from statekv_ros.store.leaving import Held, Name
from statekv_ros.store.reader import ABOUT, StoreReader
from statekv_ros.store.records import describe, part_key, raw, state_key, step_key
from statekv_ros.store.retention import Retention, cost_of
from statekv_ros.store.walk import require_walkable

if TYPE_CHECKING:
    import torch

LEAST_QUOTA_BYTES = 2**20
_HOLDERS_S, _HOLDERS_TURN_S = 1.0, 0.005    # patience with those who read an old state: they read one step at a time
_TREE_BYTES = 16 * 4096     # pages of its trees that a commit writes anew

Parts = Mapping[str, 'torch.Tensor | bytes']


class MemoryStore(StoreReader):
    """One folder, one writer. A commit survives the process (SIGKILL); a flush survives the machine (power cut).

    The file never outgrows the quota. Steps below 0 (the prefix) and states stay; of the others the one that came first
    leaves first, whichever camera it is of. All calls may come from any thread of the process that opened it.
    """

    def __init__(self, folder: Path, environment: lmdb.Environment, lock: WriterLock, quota_bytes: int, sync_period_s: float):
        """Use `MemoryStore.open`."""
        super().__init__(folder, environment)
        self._writer, self._period_s = lock, sync_period_s
        self._retention = self._load_retention(quota_bytes)
        self._anchor = Anchor(environment, folder)
        self._lock = threading.Lock()           # one commit at a time, and none while the state to flush is taken
        self._flushing = threading.Lock()       # taken before that one,
        self._changing = threading.Lock()       # and this one before both: one caller at a time
        self._left, self._dirty = 0, True       # since the last flush: bytes that left, and whether anything changed
        self._failure: StoreError | None = None
        self._gone: list[Name] = []             # left, and not said so far: the commit that they left for was refused after all
        self._given_up: list[Holder] = []       # who was waited for in vain
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._flush_periodically, name='memory store', daemon=True)
        self._closed = False

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, str | int], quota_bytes: int, sync_period_s: float = 2.0,
             owner: str = '') -> MemoryStore:
        """Open the memory of a folder, or begin one.

        Args:
            identity: what made it (model's fingerprint, policies, layout); one with another identity is not touched.
            quota_bytes: bound on the data file.
            sync_period_s: what a power cut may cost, in seconds; 0: every commit is flushed before it returns.
            owner: whom to name to a second writer, such as the node.

        Raises:
            ParameterError: a quota or period that cannot work.
            StoreMismatch: another identity made it.
            StoreBusy: another writer has it.
            StoreError: the folder cannot be used, or what lies there is damaged or unknown.
        """
        folder = Path(folder)
        if not quota_bytes >= LEAST_QUOTA_BYTES:
            raise ParameterError(f'a memory on disk needs a quota of at least {LEAST_QUOTA_BYTES} bytes, got {quota_bytes} '
                                 '(parameter "disk_cache_gb")')
        if not 0 <= sync_period_s < float('inf'):
            raise ParameterError(f'sync_period_s must be 0 or a number of seconds, got {sync_period_s}')
        make_folder(folder)
        with contextlib.ExitStack() as undo:
            lock = WriterLock(folder, owner)
            undo.callback(lock.release)
            with told(folder):
                size = (folder / DATA).stat().st_size if (folder / DATA).exists() else 0
                if not size and was_flushed(folder):
                    raise torn(folder, f'{DATA} is {"empty" if (folder / DATA).exists() else "gone"}')
                put_back(folder)
                make_reader_table(folder)
                if size and not lock.clean:
                    require_walkable(folder)
                environment = lmdb.open(str(folder), map_size=int(quota_bytes), max_dbs=2, sync=False, metasync=False)
                undo.callback(environment.close)
                environment.reader_check()      # readers that were killed would keep pages from being used again
                lost = extend(environment, folder)
                if lost:
                    undo.callback(os.truncate, folder / DATA, size)
                begin(environment, identity)
            try:
                store = cls(folder, environment, lock, int(quota_bytes), float(sync_period_s))
            except StoreError:
                if lost:    # what tells whose memory it is may be among it
                    raise torn(folder, f'{DATA} has lost its last {lost} bytes') from None
                raise
            undo.callback(store._anchor.close)
            require_identity(folder, store.identity, identity)
            if lost and (damaged := store.check()):
                raise torn(folder, f'{DATA} has lost its last {lost} bytes, and with them {len(damaged)} steps')
            store.sync()
            if sync_period_s:
                store._thread.start()
            undo.pop_all()
        return store

    def put(self, camera: str, step: int, header: Mapping[str, Any], parts: Parts) -> list[tuple[str, int]]:
        """Store a step, whole, in place of an older version of it; when this returns, the step survives the process.

        Args:
            header: what to know of it without reading it; JSON.
            parts: its tensors (any device, any strides) and bytes by name.

        Returns:
            Camera and step of each that had to leave for it, or for an earlier one that was refused after all.

        Raises:
            StoreFull: it is larger than the quota allows, nothing else but the prefix and states being there; the disk is full;
                or another process reads an old state all the time, so that nothing that leaves makes room.
            StoreError: it cannot be written.
        """
        with self._changing:
            return self._commit((camera, step), header, parts)

    def amend(self, camera: str, step: int, header: Mapping[str, Any], parts: Parts,
              keep: Collection[str] | None = None) -> list[tuple[str, int]]:
        """Add to a step that is there, and leave parts of it out, in one commit; what stays is not written again. Does nothing
        when there is no such step any more.

        Args:
            header: fields to set in it.
            parts: to add, or to put in place of those of the same name.
            keep: parts that stay, of those that are there; None: all.

        Returns, Raises:
            as `put`.
        """
        with self._changing:
            return self._commit((camera, step), header, parts, True, keep)

    def save_state(self, camera: str, header: Mapping[str, Any], parts: Parts) -> list[tuple[str, int]]:
        """Store the carried state of a camera in place of the one before; otherwise as `put`."""
        with self._changing:
            return self._commit((camera, None), header, parts)

    def clear(self, camera: str) -> None:
        """Forget all steps and the state of a camera.

        Raises:
            StoreError: it cannot be written.
        """
        self._require_own_process()
        with self._changing:
            with self._lock:
                with told(self.folder):
                    self._drop([name for name in self._retention if name[0] == camera])
            self.sync()

    def sync(self) -> None:
        """Flush: what was committed before survives a power cut.

        Raises:
            StoreError: the disk reports an error.
        """
        self._require_own_process()
        self._flush()

    def close(self) -> None:
        """Flush and close; what was read stays valid. Does nothing in a child process, whose parent has it open."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._stop.set()
        if self._period_s:
            self._thread.join()
        clean = False
        try:
            self.sync()
            clean = True
        finally:
            self._anchor.close()
            super().close()
            self._writer.release(clean)

    def _commit(self, name: Name, header: Mapping[str, Any], parts: Parts, amend: bool = False,
                keep: Collection[str] | None = None) -> list[Name]:
        self._require_own_process()
        if self._failure is not None:
            # Said once: the next commit tries again.
            failure, self._failure = self._failure, None
            raise failure
        raws, staying = {part: raw(value) for part, value in parts.items()}, {}
        if amend:
            before = self.record(*name)
            if before is None:
                return []
            staying = {part: what for part, what in before.parts.items() if part not in raws and (keep is None or part in keep)}
            header = {**before.header, **header}
        sizes = [*(len(value) for _, _, value in raws.values()), *(part.bytes for part in staying.values())]
        held = Held(self._retention.age(name), cost_of(sizes))
        record = describe(header, raws, held.age, staying)
        reading: list[Holder] = []
        for room in _rooms(held.cost):
            try:
                with self._lock:
                    self._gone += self._write(name, record, raws, held, staying)
                break
            except lmdb.MapFullError:
                if reading:
                    raise self._held_by(reading) from None
                self._let_oldest_leave(name, held.cost, room)
                reading = self._release()
        if not self._period_s or self._left > self._retention.spare() // 2:
            self.sync()
        gone, self._gone = self._gone, []
        return gone

    def _flush(self) -> bool:
        """`sync`; whether the pages that the newest commit freed can be used again, too."""
        with self._flushing:
            with self._lock:
                # The pages that a commit freed are kept for those who still read the state before it: move past it. On a full
                # disk this waits for the next flush.
                moved = False
                with contextlib.suppress(StoreFull):
                    self._touch()
                    moved = True
                state = self._anchor.begin()
                self._left, self._dirty = 0, False
            try:
                self._anchor.flush(state)
            except StoreError:
                self._dirty = True
                raise
        return moved

    def _let_oldest_leave(self, name: Name, cost: int, room: int) -> None:
        """Drop the oldest steps but `name`, as many as take `room` bytes: what is free does not lie together. Raises StoreFull
        where none is left."""
        oldest = [other for other in self._retention.oldest(room) if other != name]
        if room and not oldest:
            raise StoreFull(f'{self.folder} has no room for {cost} bytes within its quota of {self._retention.quota_bytes}: '
                            'raise it (parameter "disk_cache_gb")')
        for names in (oldest, oldest[:1]) if oldest else ():
            try:
                with self._lock:
                    self._drop(names)
            except lmdb.MapFullError:       # to forget takes pages of the tree, too
                self._release()
            else:
                self._gone += names
                return
        if oldest:
            raise StoreFull(f'{self.folder} has no room left to forget in within its quota of {self._retention.quota_bytes} '
                            'bytes: raise it (parameter "disk_cache_gb")')

    def _release(self) -> list[Holder]:
        """Let all that has left make room: let go of the state that was flushed before, and wait for who else reads an old one.
        Returns those who still do."""
        if not self._flush():
            self._flush()       # the pages that moving on takes were held until the flush before
        end = time.monotonic() + _HOLDERS_S
        while (reading := holders(self._environment, self._anchor.state)) and time.monotonic() < end:
            if set(reading) <= set(self._given_up):
                break
            time.sleep(_HOLDERS_TURN_S)
        self._given_up = reading
        return reading

    def _held_by(self, reading: list[Holder]) -> StoreFull:
        return StoreFull(f'{self.folder} is full, and what leaves makes no room while process {reading[0].process} reads what '
                         'was there before: end that process, or let it go on')

    def _write(self, name: Name, record: bytes, raws: Mapping[str, tuple], held: Held,
               staying: Collection[str]) -> list[Name]:
        """One transaction; MapFullError is the caller's."""
        leaving = self._retention.must_leave(name, held.cost)
        if leaving is None:
            raise StoreFull(f'a commit of {held.cost} bytes does not fit in {self.folder}, whose quota is '
                            f'{self._retention.quota_bytes} bytes with {self._retention.spare(held.cost)} to spare: raise it '
                            '(parameter "disk_cache_gb")')
        key = _key(name)
        with told(self.folder, but=lmdb.MapFullError), self._environment.begin(write=True) as transaction:
            for other in leaving:
                self._delete(transaction, other)
            self._delete(transaction, name, staying)
            for part, (_, _, value) in raws.items():
                transaction.put(part_key(key, part), value, db=self._values)
            transaction.put(key, record, db=self._records)
        extend(self._environment, self.folder)
        self._left += sum(map(self._retention.remove, leaving)) + self._retention.add(name, held) + _TREE_BYTES
        self._dirty = True
        return leaving

    def _drop(self, names: list[Name]) -> None:
        """MapFullError is the caller's."""
        with told(self.folder, but=lmdb.MapFullError), self._environment.begin(write=True) as transaction:
            for name in names:
                self._delete(transaction, name)
        self._left += sum(map(self._retention.remove, reversed(names))) + _TREE_BYTES     # at the end nothing moves for it
        self._dirty = True

    def _touch(self) -> None:
        """A commit that changes nothing, but that a memory of an older format is one of the present from the first one on."""
        with told(self.folder), self._environment.begin(write=True) as transaction:
            transaction.put(ABOUT, about(self.identity))

    def _delete(self, transaction: lmdb.Transaction, name: Name, staying: Collection[str] = ()) -> None:
        """A record and its parts but those that stay."""
        key = _key(name)
        if not transaction.delete(key, db=self._records):
            return
        kept = {part_key(key, part) for part in staying}
        with transaction.cursor(self._values) as cursor:
            more = cursor.set_range(key)
            while more and cursor.key().startswith(key):
                more = cursor.next() if bytes(cursor.key()) in kept else cursor.delete() and bool(cursor.key())

    def _flush_periodically(self) -> None:
        while not self._stop.wait(self._period_s):
            if self._dirty:
                try:
                    self.sync()
                except StoreError as error:
                    self._failure = error

    def _load_retention(self, quota_bytes: int) -> Retention:
        found = []
        for camera in self.cameras():
            state = self._state_record(camera)
            for step, record in chain(self.each(camera), [(None, state)] if state else ()):
                record = self._whole(record, f'step {step} of {camera!r}')
                found.append(((camera, step), Held(record.age, cost_of(part.bytes for part in record.parts.values()))))
        retention = Retention(quota_bytes)
        for name, held in sorted(found, key=lambda pair: pair[1].age):
            retention.add(name, held)
        return retention


def _rooms(cost: int) -> Iterator[int]:
    """Bytes that leave before each further try of a commit: first none."""
    room = 0
    while True:
        yield room
        room = 2 * room or cost


def _key(name: Name) -> bytes:
    camera, step = name
    return state_key(camera) if step is None else step_key(camera, step)
