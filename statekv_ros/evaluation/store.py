"""A run folder: the plan in run.json and one JSON file per finished result; whatever kills the run, each file is whole."""
import json
import os
from collections.abc import Iterable
from pathlib import Path

from statekv_ros.errors import EvaluationError


class RunFolder:
    """RUN_DIR/run.json and RUN_DIR/jobs/*.json."""

    def __init__(self, path: Path, plan: dict):
        """Open the folder of a plan (as from `plan.describe`), or make it; one that holds the same plan is gone on with.

        Raises:
            EvaluationError: it holds another plan, or something else, or cannot be written.
        """
        self.path, self._jobs = path, path / 'jobs'
        before = read_plan(path)
        if before is not None and before.get('digest') != plan['digest']:
            changed = [name for name in plan if name not in ('digest', 'jobs') and before.get(name) != plan[name]]
            raise EvaluationError(f'{path} holds another run, which differs in {", ".join(changed) or "its format"}: choose '
                                  'another --out, or delete it')
        try:
            self._jobs.mkdir(parents=True, exist_ok=True)
            if before is None:
                write_whole(path / 'run.json', plan)
        except OSError as error:
            raise EvaluationError(f'{path} cannot be written: {error}') from error

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these results are there."""
        return all(self._file(name).is_file() for name in names)

    def save(self, result: dict) -> None:
        """Keep one result under its name, `result['job']`.

        Raises:
            EvaluationError: it cannot be written.
        """
        try:
            write_whole(self._file(result['job']), result)
        except OSError as error:
            raise EvaluationError(f'{self._file(result["job"])} cannot be written: {error}') from error

    def load(self, names: Iterable[str]) -> list[dict]:
        """The results of these names, in their order.

        Raises:
            EvaluationError: one is missing or broken.
        """
        return [_read(self._file(name)) for name in names]

    def _file(self, name: str) -> Path:
        return self._jobs / f'{name}.json'


def read_plan(path: Path) -> dict | None:
    """The plan in a run folder; None where there is no folder, or an empty one.

    Raises:
        EvaluationError: the folder holds something else.
    """
    if (path / 'run.json').is_file():
        return _read(path / 'run.json')
    # A run that was killed before its plan was written leaves a `jobs` folder without a file.
    if path.exists() and (not path.is_dir() or any(file.is_file() for file in path.rglob('*') if file.suffix != '.partial')):
        raise EvaluationError(f'{path} exists and is not a run of statekv-eval: choose another --out')
    return None


def write_whole(file: Path, value: dict) -> None:
    """Write JSON so that the file is there as a whole or not at all, even after a power cut."""
    partial = file.with_name(f'.{file.name}.partial')
    with partial.open('w') as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f'{file} cannot be read: {error}; delete it and run again') from error
