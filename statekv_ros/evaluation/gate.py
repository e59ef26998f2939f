"""Whether a checkpoint bears a format of the detailed cache: its own answers over a user's footage, exact and in few bits.

Nobody has to know what is right. The same frames are watched exactly and in each format; at several times every question is
asked of all, and the formats are led along the exact answer's tokens, so that each token can be compared: what the model would
have said next, and how far its distribution moved. Reconstruction errors of keys say little about that (docs/hours.md).
"""
import argparse
import json
import math
from collections.abc import Iterable

import numpy as np
import torch

from statekv_ros.backbones import load_backbone
from statekv_ros.errors import ParameterError, PolicyError
from statekv_ros.evaluation.footage import Footage, open_path
from statekv_ros.evaluation.metrics import wilson
from statekv_ros.evaluation.plan import parse_policies
from statekv_ros.memory import AnswerPolicy, VideoStream, parse_answer_policy
from statekv_ros.memory.answering.decoding import UNHURRIED, Answering
from statekv_ros.memory.answering.sampling import NOT_FINITE
from statekv_ros.memory.answering.snapshot import take_snapshot
from statekv_ros.memory.detailed.cache import EXACT_STEPS
from statekv_ros.memory.detailed.formats import FORMATS, RAW, find_format

QUESTIONS = ('What is in view now?', 'What did you see at the beginning?', 'Describe what happened so far.', 'Where are you?')
LEAST_SAME, MOST_KL = 0.99, 0.02    # share of next tokens that stay, and nats that the distribution may move on average
KEEP, REFUSE, UNDECIDED = 'keep', 'refuse', 'undecided: ask more, or over more footage'


class Led(Answering):
    """An answer that says the tokens it is given, and notes what the model would have said.

    Attributes:
        log_probabilities: of each token's distribution, [vocabulary] fp32 each.
    """

    def __init__(self, stream: VideoStream, policy: AnswerPolicy, question: str, max_tokens: int, said: Iterable[int] | None):
        """said: None for the model's own words."""
        super().__init__(take_snapshot(stream.seen(), policy, (None, None)), question, max_tokens, 0.0, 0, 0)
        self.log_probabilities: list[torch.Tensor] = []
        self._said = None if said is None else list(said)

    def take(self, token: int, logits: torch.Tensor) -> None:
        self.log_probabilities.append(torch.log_softmax(logits.float(), dim=-1).cpu())
        super().take(token if self._said is None or token == NOT_FINITE else self._said[len(self.token_ids)], logits)

    def finished(self) -> 'Led':
        """Decode it to its end."""
        while not self.advance(UNHURRIED):
            pass
        return self


def gate(args: argparse.Namespace) -> dict:
    """`statekv-eval --formats`: watch, compare, and write `formats.json` into `args.out`.

    Returns:
        {format: {'verdict', 'questions', 'same_words', 'tokens', 'same', 'low', 'high', 'kl'}}, one for each; `same` is the share
        of next tokens that stay, with its 95 % Wilson interval, `kl` the mean Kullback-Leibler divergence in nats from the exact
        distribution.

    Raises:
        ParameterError, PolicyError, BagError, FrameError: an argument or source that cannot work.
    """
    forms = [find_format(name).name for name in args.formats or [form.name for form in FORMATS]]
    if args.every <= 0:
        raise ParameterError(f'--every must be a positive number of seconds, got {args.every}')
    if args.max_tokens <= 0:
        raise ParameterError(f'--max-tokens must be a positive number, got {args.max_tokens}')
    policies = parse_policies(args.policies)
    for policy in policies:
        if policy.is_rlivs or policy.options:
            raise PolicyError(f'--formats compares formats of plain policies, such as "statekv(4096) x all", got {policy.prefill!r}')
    backbone = load_backbone(args.model, args.device, args.dtype, weights=args.weights)
    found = {form: _Comparison() for form in forms if form != RAW.name}
    for path in args.inputs:
        footage = open_path(path)
        for policy in policies:
            streams = {form: VideoStream(backbone, policy.prefill, detailed_format=form) for form in (RAW.name, *found)}
            _watch(footage, streams, [parse_answer_policy(answer) for answer in policy.answers], args, found)
    result = {form: comparison.verdict() for form, comparison in found.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'formats.json').write_text(json.dumps(result, indent=1))
    return result


def _watch(footage: Footage, streams: dict[str, VideoStream], answers: list[AnswerPolicy], args: argparse.Namespace,
           found: dict[str, '_Comparison']) -> None:
    asked_ns, begun = 0, 0
    for stamp_ns, frame in footage.frames():
        begun, asked_ns = begun or stamp_ns, asked_ns or stamp_ns
        for stream in streams.values():
            stream.step(frame, stamp_ns)
        if stamp_ns - asked_ns >= args.every * 1e9 and streams[RAW.name].steps > EXACT_STEPS:
            asked_ns = stamp_ns
            _ask(streams, answers, args, found)
    if begun and streams[RAW.name].steps > EXACT_STEPS:
        _ask(streams, answers, args, found)


def _ask(streams: dict[str, VideoStream], answers: list[AnswerPolicy], args: argparse.Namespace,
         found: dict[str, '_Comparison']) -> None:
    for question in args.questions or QUESTIONS:
        for policy in answers:
            exact = Led(streams[RAW.name], policy, question, args.max_tokens, None).finished()
            for form, comparison in found.items():
                comparison.add(exact, Led(streams[form], policy, question, args.max_tokens, exact.token_ids).finished())


class _Comparison:
    """Of one format with the exact memory, over all answers."""

    def __init__(self):
        self._questions = self._same_words = self._tokens = self._same = 0
        self._kl: list[float] = []

    def add(self, exact: Led, theirs: Led) -> None:
        pairs = list(zip(exact.log_probabilities, theirs.log_probabilities))
        same = [int(right.argmax()) == int(ours.argmax()) for right, ours in pairs]
        self._questions += 1
        self._same_words += all(same)
        self._tokens += len(same)
        self._same += sum(same)
        self._kl += [float((right.exp() * (right - ours)).sum()) for right, ours in pairs]

    def verdict(self) -> dict:
        low, high = wilson(self._same, self._tokens)
        kl = float(np.mean(self._kl)) if self._kl else math.nan
        verdict = UNDECIDED
        if self._tokens and (high < LEAST_SAME or kl > MOST_KL):
            verdict = REFUSE
        elif self._tokens and low >= LEAST_SAME:
            verdict = KEEP
        return {'verdict': verdict, 'questions': self._questions, 'same_words': self._same_words, 'tokens': self._tokens,
                'same': self._same / self._tokens if self._tokens else None, 'low': low, 'high': high,
                'kl': None if math.isnan(kl) else kl}
