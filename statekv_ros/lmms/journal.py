"""Answers kept as they come, so that a run that was stopped goes on: the harness keeps them only when all are there."""
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation.plan import model_digest
from statekv_ros.lmms.arguments import Arguments
from statekv_ros.lmms.asking import Answer
from statekv_ros.lmms.requests import Request

# What makes no difference to an answer; `pretrained` may move, its files are looked at.
_NO_MATTER = ('pretrained', 'resume', 'batch_size', 'reuse_video', 'device')


class Journal:
    """Lines of JSON in a folder, one file for each rank, of which each reads all. Without a folder it keeps nothing."""

    def __init__(self, arguments: Arguments, rank: int):
        """Raises EvaluationError when the folder, or the model's files, cannot be read or written."""
        self._answers: dict[str, Answer] = {}
        self._file = None
        if not arguments.resume:
            return
        told = {name: value for name, value in asdict(arguments).items() if name not in _NO_MATTER}
        self._told = json.dumps([told, model_digest(arguments.pretrained)], sort_keys=True)
        folder = Path(arguments.resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob('answers-*.jsonl')):
                self._read(file)
            self._file = (folder / f'answers-{rank}.jsonl').open('a')
            self._file.write('\n')      # what a killed run left of a line ends here
        except OSError as error:
            raise EvaluationError(f'resume={folder} cannot be used: {error}') from error

    def find(self, request: Request) -> Answer | None:
        """What is kept of a request; None where nothing is."""
        return self._answers.get(self._key(request)) if self._file else None

    def keep(self, request: Request, answer: Answer) -> None:
        """Take an answer down, so that a power cut leaves it."""
        if self._file is None:
            return
        self._file.write(json.dumps({'key': self._key(request), 'place': request.place, **asdict(answer)}) + '\n')
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, file: Path) -> None:
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
                self._answers[entry['key']] = Answer(entry['text'], entry['tokens'])
            except (ValueError, KeyError, TypeError):
                continue    # a line that was not written to its end, or an empty one

    def _key(self, request: Request) -> str:
        """What an answer hangs on: the same file, question, model and policies."""
        video = os.stat(request.video) if os.path.exists(request.video) else None
        told = [self._told, os.path.abspath(request.video), video and [video.st_size, video.st_mtime_ns], request.question,
                request.retrieve_by, asdict(request.generation)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
