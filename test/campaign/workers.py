"""Trials in a process of their own: what dies or hangs there is one trial's failure, not the campaign's end."""
import faulthandler
import multiprocessing
import os
import resource
from collections.abc import Callable
from itertools import islice

from campaign.record import Record
from campaign.resources import usage

_MEMORY_BYTES = 10 << 30     # of addresses; a garbled size may ask for any amount


def run_trials(record: Record, task: Callable, arguments: tuple, limit_s: float, warm_up: int | None = None,
               at_once: int = 1) -> None:
    """`task(record, number, *arguments)` for each trial of the record, which it fills with outcomes and failures.

    Args:
        task: a module's function; it runs in the worker with a record of its own, whose books are then added up.
        limit_s: what takes longer is a failure.
        warm_up: after so many trials what the worker holds is written down, to be compared with what it holds in the end; None:
            that is not judged.
        at_once: trials that the worker is given together, where handing over one by one would take longer than they do. What
            dies or hangs is then one of these.
    """
    worker, numbers = None, record.numbers()
    while batch := list(islice(numbers, at_once)):
        if worker is None:
            worker = _Worker(record, task, arguments, limit_s)
        reply = worker.ask(batch)
        if isinstance(reply, str):
            record.fail('hang' if 'seconds' in reply else 'death', (batch[0], batch[-1]), worker.given(),
                        f'{reply}\n{worker.log()}')
            worker = None
        else:
            outcomes, failures = reply
            record.outcomes.update(outcomes)
            record.failures += failures
            if warm_up is not None and record.before is None and record.trials >= warm_up:
                record.before, of_then = usage(worker.pid), worker
    if worker is not None:
        if record.before is not None and worker is of_then:
            record.after = usage(worker.pid)
            record.judge_resources()
        worker.close()


class _Worker:
    def __init__(self, record: Record, task: Callable, arguments: tuple, limit_s: float):
        context = multiprocessing.get_context('spawn')
        self._pipe, theirs = context.Pipe()
        self._limit_s = limit_s
        self._note, self._log = record.folder / 'trial.txt', record.folder / 'worker.log'
        books = Record(record.name, record.seed, record.wanted, record.seconds, record.folder)
        self._process = context.Process(target=_serve, args=(theirs, books, task, arguments, limit_s), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()       # everything is imported: a trial's time begins after that

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, numbers: list[int]):
        """Outcomes and failures of trials, or a sentence when there are none."""
        self._note.unlink(missing_ok=True)
        self._pipe.send(numbers)
        try:
            if self._pipe.poll(self._limit_s):
                return self._pipe.recv()
            why = f'not done after {self._limit_s:g} seconds'
        except EOFError:
            self._process.join()
            why = f'the process ended with exit code {self._process.exitcode}'
        self._process.kill()
        self._process.join()
        return why

    def given(self) -> str:
        """The input of the trial under way, as it told before it began."""
        return self._note.read_text() if self._note.is_file() else 'unknown'

    def log(self) -> str:
        """The end of what the process wrote: where it stood, when it died or hung."""
        return self._log.read_text(errors='replace')[-1200:]

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def tell_input(record: Record, given: str) -> None:
    """Called by a task before the work that may end its process."""
    (record.folder / 'trial.txt').write_text(given)


def _serve(pipe, books: Record, task: Callable, arguments: tuple, limit_s: float) -> None:
    with (books.folder / 'worker.log').open('w') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    pipe.send('ready')
    while (numbers := pipe.recv()) is not None:
        books.outcomes.clear()
        books.failures.clear()
        faulthandler.dump_traceback_later(0.9 * limit_s)
        for number in numbers:
            task(books, number, *arguments)
        faulthandler.cancel_dump_traceback_later()
        pipe.send((books.outcomes, books.failures))
