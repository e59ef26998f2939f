"""One offline job: every frame in time order, every question at its time, under every answer policy. Exact and repeatable."""
import time

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.size import ModelSize
from statekv_ros.errors import EvaluationError, StateKVError
from statekv_ros.evaluation.flops import step_flops
from statekv_ros.evaluation.footage import open_footage
from statekv_ros.evaluation.judge import evidence_hit, fact_age_s
from statekv_ros.evaluation.plan import Job, Policy
from statekv_ros.evaluation.schema import Question, Video
from statekv_ros.evaluation.scores import judged
from statekv_ros.memory import AnswerResult, StepReport, VideoStream, parse_prefill_policy
from statekv_ros.memory.capacity import layout_of
from statekv_ros.memory.detailed.cache import PAGE_TOKENS
from statekv_ros.memory.detailed.formats import RAW, find_format

_NS = 10**9


def run_job(backbone: Backbone, job: Job, max_tokens: int, detailed_format: str = RAW.name, positions: str = '') -> dict:
    """Watch a job's one video under its policy and ask its questions, greedily.

    A result is plain JSON. All of it but the fields that end in `_ms` is the same in every run.

    Raises:
        EvaluationError: a source or a question turned out bad on the way.
    """
    try:
        memory = make_memory(backbone, job.policy, detailed_format, positions)
        return _Watching(memory, job.names[0], job.videos[0], job.policy, max_tokens, detailed_format).result()
    except StateKVError as error:
        raise EvaluationError(f'{job.names[0]}: {error}') from error


def make_memory(backbone: Backbone, policy: Policy, detailed_format: str = RAW.name, positions: str = '', **options):
    """The memory of a policy: a `VideoStream` (`options` are its own), or for rlivs a `CaptionMemory`, which has the same
    `step` and `answer`. No frame step is replayed as a CUDA graph, under whatever policy: few of them could be.

    Args:
        detailed_format, positions: of a stream, where the policy does not say.

    Raises:
        PolicyError, ParameterError: the model cannot run it.
    """
    if not policy.is_rlivs:
        options = {'detailed_format': detailed_format, 'positions': positions} | policy.options | options
        return VideoStream(backbone, policy.watching, cuda_graph='off', **options)
    from statekv_ros.evaluation.rlivs import CaptionMemory
    return CaptionMemory(backbone, recurrent='norecurrence' not in policy.prefill)


def token_bytes(size: ModelSize, policy: Policy, detailed_format: str, step_tokens: int) -> float | None:
    """Bytes that a pass of an answer reads for a token of steps with `step_tokens` tokens, all layers together; the newest
    steps and the prefix may be stored otherwise. None for rlivs, which reads text."""
    if policy.is_rlivs:
        return None
    form = find_format(policy.options.get('detailed_format', detailed_format))
    return form.bytes_per_token(layout_of(size), min(step_tokens, PAGE_TOKENS))


class _Watching:
    """One video under one policy, from its first frame to its result."""

    def __init__(self, memory, name: str, video: Video, policy: Policy, max_tokens: int, detailed_format: str):
        self._memory, self._name, self._video, self._policy, self._max_tokens = memory, name, video, policy, max_tokens
        self._format = detailed_format
        self._waiting = sorted((at_s, number) for number, question in enumerate(video.questions) for at_s in asked_at_s(question))
        self._reports: list[StepReport] = []
        self._flops: list[int] = []
        self._answers: list[dict] = []
        self._frames = self._first_ns = 0
        self._size = None
        self._said: set[tuple[int, str]] = set()    # questions whose time had come, and under which answer policy

    def result(self) -> dict:
        """Watch it all."""
        for since_ns, stamp_ns, frame in open_footage(self._video).clip(self._video.begin_s, self._video.end_s):
            if self._size is None:
                self._size, self._first_ns = self._memory.backbone.size(*frame.shape[:2]), stamp_ns - since_ns
            while self._waiting and round(self._waiting[0][0] * _NS) < since_ns:
                self._ask(*self._waiting.pop(0))
            self._note(self._memory.step(frame, stamp_ns))
            self._frames += 1
        if not self._frames:
            raise EvaluationError(f'{self._video.title} has no frame')
        while self._waiting:
            self._ask(*self._waiting.pop(0))
        self._note(self._memory.flush())
        last = self._reports[-1]
        return {'job': self._name, 'source': self._video.title, 'video': self._video.source,
                'prefill_policy': self._policy.prefill, 'mode': 'offline',
                'frames': self._frames, 'steps': len(self._reports),
                'step_ms': [round(report.total_ms, 3) for report in self._reports],
                'step_tokens': [report.step_tokens for report in self._reports], 'step_flops': self._flops,
                'state_tokens': last.state_tokens, 'detailed_bytes': last.detailed_bytes, 'dropped': 0,
                'token_bytes': token_bytes(self._size, self._policy, self._format, last.step_tokens),
                'answers': sorted(self._answers, key=lambda answer: answer['question'])}

    def _note(self, report: StepReport | None) -> None:
        if report is None:
            return
        if not self._policy.is_rlivs:   # whose captions are not a frame step
            carried = self._reports[-1].state_tokens if self._reports else 0
            scored = parse_prefill_policy(self._policy.watching).kind == 'statekv'
            self._flops.append(step_flops(self._size, report.step_tokens, carried, scored))
        self._reports.append(report)

    def _ask(self, at_s: float, number: int) -> None:
        question = self._video.questions[number]
        for answer_policy in self._policy.answers:
            if question.poll is None:
                self._note_answer(number, answer_policy, at_s, *self._told(question.text, answer_policy, question.retrieve_by))
            elif (number, answer_policy) not in self._said:
                told = self._told(question.poll.text, answer_policy)
                if come := 'yes' in told[0].text.lower():
                    told = self._told(question.text, answer_policy, question.retrieve_by)
                if come or at_s == asked_at_s(question)[-1]:
                    self._said.add((number, answer_policy))
                    self._note_answer(number, answer_policy, at_s, *told)

    def _told(self, text: str, answer_policy: str, retrieve_by: str = '') -> tuple[AnswerResult, float]:
        """An answer, and the ms that it took."""
        options = {} if self._policy.is_rlivs else {'answer_policy': answer_policy, 'retrieve_by': retrieve_by}
        begun = time.perf_counter()
        answer = self._memory.answer(text, max_tokens=self._max_tokens, **options)
        return answer, (time.perf_counter() - begun) * 1e3

    def _note_answer(self, number: int, answer_policy: str, at_s: float, answer: AnswerResult, total_ms: float) -> None:
        question, evidence = self._video.questions[number], spans_s(answer, self._first_ns)
        self._answers.append(answer_entry(number, question, answer_policy, answer.text, evidence, at_s) | {
            'in_window': True, 'first_token_ms': round(answer.first_token_ms, 3), 'total_ms': round(total_ms, 3),
            'context_tokens': answer.context_tokens})


def asked_at_s(question: Question) -> list[float]:
    """When a question is asked, in seconds after the source's first frame."""
    if question.poll is None:
        return [question.ask_at]
    return [question.ask_at + second for second in range(1, int(question.poll.until_s - question.ask_at) + 1)]


def spans_s(answer: AnswerResult, first_ns: int) -> list[list[float]]:
    """An answer's evidence as [first_s, last_s, share], in seconds after the source's first frame."""
    return [[(step.first_stamp_ns - first_ns) / _NS, (step.last_stamp_ns - first_ns) / _NS, round(step.share, 6)]
            for step in answer.evidence]


def answer_entry(number: int, question: Question, answer_policy: str, text: str, evidence: list[list[float]],
                 at_s: float | None = None) -> dict:
    """What is known of an answer whatever the mode; `evidence` as from `spans_s`, `at_s` when it was given, if not when asked."""
    (_, right), *others = judged(text, question, question.ask_at if at_s is None else at_s).items()
    entry = {'question': number, 'text': question.text, 'kind': question.kind, 'group': question.group,
             'ask_at': question.ask_at, 'answer_policy': answer_policy, 'answer': text, 'accepted': list(question.accepted),
             'right': right, 'chance': question.chance, 'fact_age_s': fact_age_s(question),
             'evidence': evidence, 'evidence_hit': evidence_hit(question, evidence)}
    if others:
        entry['beside'] = dict(others)
    if question.poll:
        entry['answered_s'] = at_s
    return entry
