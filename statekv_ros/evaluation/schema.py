"""Questions files: videos with questions, when to ask them and what is right. The format is in docs/questions.md."""
from dataclasses import asdict, dataclass, field
from pathlib import Path

from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation.marked import Marked, read_marked

VERSION = 1
# What a question asks of a memory: what is in view, what was, and what only grows while watching.
GROUPS = ('perception', 'recall', 'formed')


@dataclass(frozen=True)
class Poll:
    """A question whose time has to be found: from a second after `ask_at` on the model is asked every second whether it has come,
    and once it says yes, the question itself.

    Attributes:
        text: that is asked every second; due_s: when the time has come; until_s: when it is asked for the last time.
    """
    text: str
    due_s: float
    until_s: float


@dataclass(frozen=True)
class Question:
    """A question with its right answers. Times are seconds after the source's first frame.

    Attributes:
        kind, group: for the report; group is one of GROUPS.
        accepted: answers that are right.
        ask_at: asked after the last frame not later than this.
        valid: the answer is right between these two times.
        evidence: time spans [begin, end) that hold the answer; empty if unknown.
        age: seconds from the end of what the answer rests on to `ask_at`; None if it is that of the evidence, or unknown.
        chance: share of right answers that guessing gets; None if unknown.
        scores: how it is judged, by names of `scores.SCORES`: what the first says counts, the others stand beside it.
        poll: for a question that is to be answered once its time has come.
        retrieve_by: its bare text, without options, by which the answer policy `rekv` retrieves; '': the text as it is.
        places: where each field stands, for messages.
    """
    text: str
    kind: str
    group: str
    accepted: tuple[str, ...]
    ask_at: float
    valid: tuple[float, float]
    evidence: tuple[tuple[float, float], ...] = ()
    chance: float | None = None
    age: float | None = None
    scores: tuple[str, ...] = ('words',)
    poll: Poll | None = None
    retrieve_by: str = ''
    places: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Video:
    """A source and what is asked about it.

    Attributes:
        source: as written in the file: a path relative to `folder`, or patrol:seed=...
        topic: image topic of a bag; '' where it has only one.
        rate_hz: frames to watch per second of header time; None: all.
        folder: of the questions file.
        place: where it stands, for messages.
        begin_s, end_s: what of the source is watched, in seconds after its first frame; end_s None: to its end.
        exact: a time after the source's end is a mistake; else it is the end.
    """
    source: str
    questions: tuple[Question, ...]
    topic: str = ''
    rate_hz: float | None = None
    folder: Path = Path()
    place: str = field(default='', compare=False)
    begin_s: float = 0.0
    end_s: float | None = None
    exact: bool = True

    @property
    def title(self) -> str:
        """What results call it: the source, and what of it is watched."""
        if not self.begin_s and self.end_s is None:
            return self.source
        return f'{self.source} [{self.begin_s:g}-{"" if self.end_s is None else f"{self.end_s:g}"} s]'

    def as_dict(self) -> dict:
        """What it is, without where it stands."""
        values = asdict(self)
        del values['folder'], values['place']
        for question in values['questions']:
            del question['places']
            if not question['retrieve_by']:     # runs from before there was one go on
                del question['retrieve_by']
        return values


def load_questions(file: Path) -> list[Video]:
    """Read and check a questions file.

    Raises:
        EvaluationError: one line for each mistake, with file, line and field.
    """
    errors: list[str] = []
    fields = read_marked(file, errors).fields(('version', 'videos'))
    version = fields['version'].number() if 'version' in fields else None
    if version is not None and version != VERSION:
        fields['version'].complain(f'must be {VERSION}, got {version:g}: this program does not know that format')
    videos = [_video(item, file) for item in fields['videos'].items()] if 'videos' in fields else []
    if errors:
        raise EvaluationError('\n'.join(errors))
    return videos


def _video(marked: Marked, file: Path) -> Video | None:
    fields = marked.fields(('source', 'questions'), ('topic', 'rate_hz'))
    source = fields['source'].text() if 'source' in fields else None
    topic = fields['topic'].text() if 'topic' in fields else ''
    rate_hz = fields['rate_hz'].number() if 'rate_hz' in fields else None
    if rate_hz is not None and rate_hz <= 0:
        fields['rate_hz'].complain(f'must be a positive number of frames per second, got {rate_hz:g}')
    questions = [_question(item) for item in fields['questions'].items()] if 'questions' in fields else []
    if source is None or None in questions:
        return None
    return Video(source, tuple(questions), topic, rate_hz, file.parent, fields['source'].place)


def _question(marked: Marked) -> Question | None:
    fields = marked.fields(('text', 'kind', 'group', 'accepted', 'ask_at', 'valid'),
                           ('evidence', 'chance', 'age', 'retrieve_by'))
    texts = {name: fields[name].text() for name in ('text', 'kind', 'group') if name in fields}
    if texts.get('group') and texts['group'] not in GROUPS:
        fields['group'].complain(f'must be one of {", ".join(GROUPS)}, got {texts["group"]!r}')
    accepted = tuple(item.text() for item in fields['accepted'].items()) if 'accepted' in fields else ()
    ask_at = fields['ask_at'].number() if 'ask_at' in fields else None
    valid = fields['valid'].span() if 'valid' in fields else None
    if ask_at is not None and valid and not valid[0] <= ask_at <= valid[1]:
        fields['ask_at'].complain(f'must lie inside valid, {list(valid)}, got {ask_at:g}')
    evidence = tuple(_evidence(item) for item in fields['evidence'].items()) if 'evidence' in fields else ()
    chance = fields['chance'].number() if 'chance' in fields else None
    if chance is not None and not 0 <= chance <= 1:
        fields['chance'].complain(f'must be a share from 0 to 1, got {chance:g}')
    age = fields['age'].number() if 'age' in fields else None
    if age is not None and age < 0:
        fields['age'].complain(f'must be a number of seconds from 0 on, got {age:g}')
    retrieve_by = fields['retrieve_by'].text() if 'retrieve_by' in fields else ''
    if None in (*texts.values(), *accepted, *evidence, ask_at, valid, retrieve_by) or len(texts) < 3:
        return None
    return Question(**texts, accepted=accepted, ask_at=ask_at, valid=valid, evidence=evidence, chance=chance, age=age,
                    retrieve_by=retrieve_by, places={name: value.place for name, value in fields.items()})


def _evidence(marked: Marked) -> tuple[float, float] | None:
    span = marked.span()
    if span and span[0] == span[1]:
        marked.complain(f'must be [begin, end) with begin < end, got {list(span)}')
    return span
