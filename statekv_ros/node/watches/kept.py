"""Watches over a restart: a small file in the memory folder, replaced as a whole."""
import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.weights import AS_STORED
from statekv_ros.errors import StateKVError, StoreError
from statekv_ros.node.watches.table import WatchTable
from statekv_ros.node.watches.watch import Definition, Watch
from statekv_ros.store.folder import told

FILE = 'watches.json'
_FORMAT = 1
_MOST_BYTES = 2**26
_STATE = {'text': str, 'stamp_ns': int, 'reference': str, 'holding': bool, 'checks': int, 'skipped': int, 'failed': int,
          'alerts': int}


class KeptWatches:
    """What a memory folder has of the watches. Bytes are written by whoever `submit` hands the work to.

    Attributes:
        problem: why the newest changes are not kept, '' when they are.
    """

    def __init__(self, folder: Path, model: str, submit: Callable[[Callable[[], None]], bool], log: Callable[[str], None]):
        """
        Args:
            model: as of `answers_of`: answers of another one are not compared with its own.
            submit: has another thread do something; false when it takes no more.
            log: takes what was found, and what goes wrong.
        """
        self._file, self._model, self._submit, self._log = folder / FILE, model, submit, log
        self.problem = ''

    def save(self, table: WatchTable, done: Callable[[], None] = lambda: None) -> None:
        """Keep the table as it is when its turn comes; `done` is called, in whatever thread, once that is tried."""
        def work() -> None:
            try:        # what is written is looked at here: of two who save at once, the later then has what both changed
                _replace(self._file, json.dumps({'format': _FORMAT, 'model': self._model, 'number': table.number,
                                                 'watches': [_as_dict(watch) for watch in table.all()]}))
            except StoreError as error:
                sentence = f'watches are not kept for a restart: {error}'
                if not self.problem:
                    self._log(sentence)
                self.problem = sentence
            else:
                self.problem = ''
            finally:
                done()

        if not self._submit(work):
            done()

    def restore(self, table: WatchTable, configured: list[Watch]) -> None:
        """Fill a table with what there was and with what the configuration has; says what did not come back."""
        number, model, kept = self._read()
        mine = {watch.id: watch for watch in configured}
        if kept and model != self._model:
            self._log(f'{len(kept)} watches of {self._file} were made with another model, or its weights in another format: they go '
                      'on, without what that one answered')
        for watch in kept:
            if model != self._model:
                watch.forget_answers()
            if not watch.configured:
                mine[watch.id] = watch
            elif (now := mine.get(watch.id)) is None:
                self._log(f'watch {watch.id!r} of {self._file} is not configured any more: it ended')
            elif now.definition == watch.definition:
                mine[watch.id] = watch
        table.put(mine.values(), number)

    def _read(self) -> tuple[int, str, list[Watch]]:
        """Newest id, model and watches; nothing where there is no file, or none that can be read, which is then put aside."""
        try:
            with told(self._file.parent, FileNotFoundError):
                if self._file.stat().st_size > _MOST_BYTES:
                    raise ValueError('it is too large')
                content = json.loads(self._file.read_bytes())
            if content['format'] != _FORMAT:
                raise ValueError(f'its format is {content["format"]!r}, expected {_FORMAT}')
            entries, number, model = list(content['watches']), int(content['number']), str(content['model'])
        except FileNotFoundError:
            return 0, '', []
        except (ValueError, KeyError, TypeError, RecursionError, StoreError) as error:
            aside = self._file.with_name(f'{FILE}.unreadable')
            with contextlib.suppress(OSError):
                self._file.replace(aside)
            self._log(f'the watches of {self._file} cannot be read ({error}): they are forgotten, and the file is now {aside}')
            return 0, '', []
        watches = []
        for entry in entries:
            try:
                watches.append(_watch_of(entry))
            except (StateKVError, ValueError, KeyError, TypeError, AttributeError) as error:
                self._log(f'a watch of {self._file} cannot be read and is forgotten: {str(error)[:300]}')
        return number, model, watches


def answers_of(backbone: Backbone) -> str:
    """Whose answers watches compare: the model's, with its weights as they are. The format is said only where they are quantised, as
    files are that were written before there was a choice."""
    return backbone.fingerprint + (f', weights {backbone.weights}' if backbone.weights != AS_STORED else '')


def _as_dict(watch: Watch) -> dict:
    ends_at = None if math.isinf(watch.ends_at) else watch.ends_at
    return {'id': watch.id, 'configured': watch.configured, 'ends_at': ends_at, 'definition': asdict(watch.definition),
            **{name: getattr(watch, name) for name in _STATE}}


def _watch_of(entry: dict) -> Watch:
    fields = {name: entry[name] for name in ('id', 'configured', *_STATE)}
    for name, kind in {'id': str, 'configured': bool, **_STATE}.items():
        if type(fields[name]) is not kind:
            raise ValueError(f'{name} is {fields[name]!r}')
    ends_at = math.inf if entry['ends_at'] is None else float(entry['ends_at'])
    return Watch(definition=Definition(**entry['definition']), ends_at=ends_at, **fields)


def _replace(file: Path, content: str) -> None:
    """The file holds this, or what it held before, whatever happens. Raises StoreError."""
    beside = file.with_name(f'{file.name}.new')
    with told(file.parent):
        with beside.open('w', encoding='ascii') as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        beside.replace(file)
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
