"""One offline job over many videos at once, see `lockstep`: the same answers as one by one, at a fraction of the time.

Steps are not timed, for they are not those of one video. Evidence is known only where a video was asked alone.
"""
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial

import numpy as np

from statekv_ros.backbones.base import Backbone
from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation.flops import step_flops
from statekv_ros.evaluation.footage import open_footage
from statekv_ros.evaluation.lockstep import Lockstep, answer_together, video_of
from statekv_ros.evaluation.plan import Job
from statekv_ros.evaluation.run import answer_entry, make_memory, spans_s, token_bytes
from statekv_ros.evaluation.schema import Question, Video
from statekv_ros.memory import VideoStream, parse_answer_policy

_NS = 10**9
_WORTH_IT = 1 / 6          # share of the videos that must ask at once for asking together to cost less than one by one


class Group:
    """Videos that are watched together, kept while their jobs run one policy after another.

    Attributes:
        stamps_ns: header stamps of the first video's frames; frames: those of all videos, prepared, one below the other.
        size: height and width of a camera frame in pixels.
    """

    def __init__(self, backbone: Backbone, videos: Sequence[Video]):
        """Raises EvaluationError when their frames differ in number, time or size."""
        self.videos = tuple(videos)
        self.lockstep = Lockstep(backbone, len(videos))
        footages = [open_footage(video) for video in videos]
        self.stamps_ns: list[int] = []
        self.frames: list[np.ndarray] = []
        firsts: tuple[int, ...] = ()
        try:
            for together in zip(*(footage.frames() for footage in footages), strict=True):
                stamps, frames = zip(*together)
                firsts = firsts or stamps
                if len({stamp - first for stamp, first in zip(stamps, firsts)}) > 1:
                    raise ValueError('times')
                self.stamps_ns.append(stamps[0])
                self.size = frames[0].shape[:2]
                self.frames.append(np.concatenate([backbone.prepare(frame) for frame in frames]))
        except ValueError as error:
            raise EvaluationError(f'{videos[0].source} and the videos after it differ in the number, times or sizes of their '
                                  'frames, so they cannot go in lockstep: leave --lockstep out') from error


def run_together(group: Group, job: Job, max_tokens: int, detailed_format: str, ask_alone: bool = False,
                 positions: str = '') -> list[dict]:
    """A result for each video of the job; see `run.run_job`.

    Args:
        ask_alone: ask no videos together, so that it is known where each answer looked.
    """
    lockstep = group.lockstep
    stream = make_memory(lockstep, job.policy, detailed_format, positions)
    size = lockstep.inner.size(*group.size)
    waiting = sorted(((question.ask_at, row, number, question) for row, video in enumerate(group.videos)
                      for number, question in enumerate(video.questions)), key=lambda entry: entry[:3])
    first_ns, reports, flops = group.stamps_ns[0], [], []
    answers: list[list[dict]] = [[] for _ in group.videos]

    def ask_until(time_ns: float) -> None:
        due = []
        while waiting and round(waiting[0][0] * _NS) < time_ns:
            due.append(waiting.pop(0)[1:])
        for policy in job.policy.answers if due else ():
            for row, number, question, text, evidence, tokens in _ask(stream, due, policy, max_tokens, first_ns, ask_alone):
                hits = {} if evidence is not None else {'evidence': [], 'evidence_hit': None}
                answers[row].append(answer_entry(number, question, policy, text, evidence or []) | hits | {
                    'in_window': True, 'first_token_ms': None, 'total_ms': None, 'context_tokens': tokens})

    for stamp_ns, frame in zip(group.stamps_ns, group.frames):
        ask_until(stamp_ns - first_ns)
        carried = stream.state_tokens
        if (report := stream.step(frame, stamp_ns)) is not None:
            flops.append(step_flops(size, report.step_tokens, carried, stream.prefill_policy.kind == 'statekv'))
            reports.append(report)
    ask_until(float('inf'))
    if stream.flush() is not None:
        raise EvaluationError(f'{group.videos[0].source} ends within a step, which lockstep cannot pad: leave --lockstep out')
    last = reports[-1]
    return [{'job': name, 'source': video.title, 'video': video.source, 'prefill_policy': job.policy.prefill, 'mode': 'offline',
             'frames': len(group.frames), 'steps': len(reports), 'step_ms': [],
             'step_tokens': [report.step_tokens for report in reports], 'step_flops': flops,
             'state_tokens': last.state_tokens, 'detailed_bytes': video_of(stream, row).detailed_bytes, 'dropped': 0,
             'token_bytes': token_bytes(size, job.policy, detailed_format, last.step_tokens),
             'answers': sorted(answers[row], key=lambda answer: answer['question'])}
            for row, (name, video) in enumerate(zip(job.names, group.videos))]


def _ask(stream: VideoStream, due: list[tuple[int, int, Question]], policy: str, max_tokens: int, first_ns: int,
         alone: bool):
    """Yield (row, number, question, text, evidence or None, context tokens) of every question that is due."""
    lockstep: Lockstep = stream.backbone
    kind, alone_of = parse_answer_policy(policy), cache(partial(video_of, stream))
    for asked in _rounds(lockstep, due):
        enough = not alone and not kind.retrieves and len(asked) >= _WORTH_IT * lockstep.videos
        if kind.kind == 'state' or enough:
            filler = next(iter(asked.values()))[1].text        # a video that asks nothing now needs as many tokens
            texts = [asked[row][1].text if row in asked else filler for row in range(lockstep.videos)]
            told, tokens = answer_together(stream, texts, kind, max_tokens)
            for row, (number, question) in asked.items():
                yield row, number, question, told[row], None, tokens
            continue
        for row, (number, question) in asked.items():
            answer = alone_of(row).answer(question.text, answer_policy=policy, max_tokens=max_tokens,
                                          retrieve_by=question.retrieve_by)
            yield row, number, question, answer.text, spans_s(answer, first_ns), answer.context_tokens


def _rounds(lockstep: Lockstep, due: list[tuple[int, int, Question]]) -> list[dict[int, tuple[int, Question]]]:
    """Row -> (number, question) of questions that can be asked together: equally long, and one for each video."""
    rounds: list[dict[int, tuple[int, Question]]] = []
    open_rounds = defaultdict(list)
    for row, number, question in due:
        # Equal kinds are most often equally long, and kept apart from others they fill a round.
        alike = open_rounds[len(lockstep.tokenize_question(question.text)), question.kind]
        free = next((asked for asked in alike if row not in asked), None)
        if free is None:
            free = {}
            alike.append(free)
            rounds.append(free)
        free[row] = number, question
    return rounds
