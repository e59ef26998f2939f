"""What every reader is told, and what it makes of it."""
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from statekv_ros.evaluation.benchmarks.annotations import Entry
from statekv_ros.evaluation.benchmarks.prompts import Prompts
from statekv_ros.evaluation.schema import Question, Video

LETTERS = 'ABCDEFGH'


@dataclass(frozen=True)
class Reading:
    """How a benchmark is read.

    Attributes:
        videos: folder that the paths of its videos are relative to.
        rate_hz: frames to watch per second.
        context_s: a question may look back so far, so it gets a memory of its own; None: at all that was before it.
        prompts: the authors' own wording; None: one of ours.
    """
    videos: Path
    rate_hz: float
    context_s: float | None = None
    prompts: Prompts | None = None


class Benchmark(Protocol):
    """One benchmark, or one part of it with a file of its own.

    Attributes:
        name: for `--benchmark`; rate_hz: of its protocol.
        program: file of its repository that has the wording of its questions; '' where a question is asked as it stands.
        takes_context: its protocol knows a bound on how far a question may look back.
    """
    name: str
    rate_hz: float
    program: str
    takes_context: bool

    def looks_like(self, document: Entry) -> bool:
        """Whether a file is of this format, by its first entry."""

    def read(self, document: Entry, how: Reading) -> Iterable[tuple[str, Question] | None]:
        """Every question with the path of its video; None for one with a mistake, which is noted."""


def as_videos(asked: Iterable[tuple[str, Question]], how: Reading, place: str) -> list[Video]:
    """Videos to watch. Without a bound on the context one memory watches a video once, for all questions; with it, or for a
    question that is asked again and again, each has a memory of its own, which begins where the context does."""
    together: dict[str, list[Question]] = defaultdict(list)
    videos: list[Video] = []

    def video(path: str, questions: Iterable[Question], begin_s: float = 0.0) -> Video:
        questions = tuple(questions)
        end_s = max(question.poll.until_s if question.poll else question.ask_at for question in questions)
        return Video(str(how.videos / path), questions, '', how.rate_hz, Path(), place, begin_s, end_s, exact=False)

    for path, question in asked:
        if question.poll:
            videos.append(video(path, [question], question.ask_at))
        elif how.context_s is not None:
            videos.append(video(path, [question], max(0.0, question.ask_at - how.context_s)))
        else:
            together[path].append(question)
    return videos + [video(path, questions) for path, questions in together.items()]


def lettered(options: Iterable[str]) -> list[str]:
    """Options with their letters before them: 'A. a red ball'."""
    return [f'{letter}. {option}' for letter, option in zip(LETTERS, options)]
