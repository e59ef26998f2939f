"""From jobs' results to numbers: every share with its n and a 95 % interval, every time with its percentiles."""
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from statekv_ros.evaluation import AGES_S

REFERENCE = 'full x all'           # full attention: what the others are compared with
_Z = 1.959963984540054             # of a 95 % interval


class _Pair(NamedTuple):
    model: str
    mode: str
    prefill: str
    answer: str

    @property
    def policy(self) -> str:
        return f'{self.prefill} x {self.answer}'


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of `right` in `n` (Wilson 1927): 0 <= low <= share <= high <= 1; (0, 1) for n = 0."""
    if n == 0:
        return 0., 1.
    share, spread = right / n, _Z * _Z / n
    centre = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # At 0 of n and n of n one end is the share itself, which rounding misses by an ulp to either side.
    return min(share, max(0., (centre - half) / (1 + spread))), max(share, min(1., (centre + half) / (1 + spread)))


def share(flags: Iterable[bool]) -> dict:
    """{'n', 'right', 'low', 'high'}: how many of the flags are true, as a share with its interval; right is None for n = 0."""
    flags = list(flags)
    low, high = wilson(sum(flags), len(flags))
    return {'n': len(flags), 'right': sum(flags) / len(flags) if flags else None, 'low': low, 'high': high}


def difference(ours: Sequence[bool], theirs: Sequence[bool]) -> dict:
    """{'n', 'difference', 'low', 'high'} of two shares over the same questions, with a 95 % interval for paired samples (Bonett
    and Price 2012), which has a width even where all pairs agree."""
    n = len(ours)
    if n == 0:
        return {'n': 0, 'difference': None, 'low': -1., 'high': 1.}
    won = sum(a and not b for a, b in zip(ours, theirs))
    lost = sum(b and not a for a, b in zip(ours, theirs))
    p, q = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return {'n': n, 'difference': (won - lost) / n, 'low': max(-1., p - q - half), 'high': min(1., p - q + half)}


def percentiles(values: Sequence[float], *wanted: int) -> dict[str, float | None]:
    """{'p50': ...}; None where there are no values."""
    return {f'p{q}': float(np.percentile(values, q)) if len(values) else None for q in wanted}


def slope(series: Iterable[Sequence[float]]) -> float | None:
    """How much a value grows per 1000 steps: least squares over step number and value. Each series has a level of its own, so
    that a slower video does not look like a growing cost, and is used without its first tenth, where a state still fills."""
    rise = run = 0.
    for values in series:
        late = np.array(values[len(values) // 10:], float)
        steps = np.arange(len(late)) - (len(late) - 1) / 2
        rise += float((steps * late).sum())
        run += float((steps * steps).sum())
    return 1000 * rise / run if run > 1 else None


def judged(answers: Iterable[dict]) -> list[dict]:
    """Those of which it is known whether they are right."""
    return [answer for answer in answers if answer['right'] is not None]


def summarise(jobs: Sequence[dict]) -> dict:
    """The report's numbers.

    Args:
        jobs: results as `run.run_job` makes them, none of which failed; those of several models say which, in 'model'.

    Returns:
        {'models', 'videos', 'questions', 'kinds', 'groups', 'policies': [...]}; each policy, a pair of prefill and answer policy
        of one model in one mode, has the fields that docs/evaluation.md defines. Policies stand in the order of `rank`.
    """
    pairs: dict[_Pair, list[tuple[dict, list[dict]]]] = defaultdict(list)
    for job in jobs:
        by_answer: dict[str, list[dict]] = defaultdict(list)
        for answer in job['answers']:
            by_answer[answer['answer_policy']].append(answer)
        for answer_policy, answers in by_answer.items():
            pairs[_Pair(job.get('model', ''), job['mode'], job['prefill_policy'], answer_policy)].append((job, answers))
    asked = {(job['source'], answer['question']): answer for job in jobs for answer in job['answers']}
    reference = {(pair.model, pair.mode): {(job['source'], answer['question']): answer for job, answers in told for answer in answers}
                 for pair, told in pairs.items() if pair.policy == REFERENCE}
    models = list(dict.fromkeys(pair.model for pair in pairs))
    ordered = sorted(pairs, key=lambda pair: (models.index(pair.model), pair.mode, rank(pair.prefill), rank(pair.answer)))
    return {'models': models, 'videos': len({job['source'] for job in jobs}), 'questions': len(asked),
            'kinds': list(dict.fromkeys(answer['kind'] for answer in asked.values())),
            'groups': list(dict.fromkeys(answer['group'] for answer in asked.values())),
            'policies': [_policy(pair, pairs[pair], reference.get((pair.model, pair.mode), {})) for pair in ordered]}


def rank(policy: str) -> list:
    """What policies are sorted by: full and all first, then by name, and by numbers as numbers."""
    parts = [part for part in re.split(r'(\d+)', policy) if part]
    return [policy not in ('full', 'all'), [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]]


def _policy(pair: '_Pair', told: list[tuple[dict, list[dict]]], reference: dict) -> dict:
    jobs = [job for job, _ in told]
    answers = [answer for _, answers in told for answer in answers]
    paired = [(answer, reference[job['source'], answer['question']]) for job, answers in told for answer in answers
              if (job['source'], answer['question']) in reference]
    both = [pair for pair in paired if None not in (pair[0]['right'], pair[1]['right'])]
    kinds = _by(answers, 'kind')
    step_ms = [value for job in jobs for value in job['step_ms']]
    flops = [value for job in jobs for value in job['step_flops']]
    first_token_ms = [answer['first_token_ms'] for answer in answers if answer['first_token_ms'] is not None]
    return {
        'policy': pair.policy, **pair._asdict(),
        'videos': len(jobs), 'overall': _accuracy(answers), 'mean_of_kinds': _mean(kinds.values()),
        'groups': _by(answers, 'group'), 'kinds': kinds, 'beside': _beside(answers),
        'unjudged': len(answers) - len(judged(answers)),
        'agreement': share(ours['answer'] == theirs['answer'] for ours, theirs in paired),
        'against_full': difference([ours['right'] for ours, _ in both], [theirs['right'] for _, theirs in both]),
        'ages': _ages(answers), 'evidence': share(a['evidence_hit'] for a in answers if a['evidence_hit'] is not None),
        'in_window': share(answer['in_window'] for answer in answers),
        'step_ms': {**percentiles(step_ms, 50, 95, 99), 'slope': slope(job['step_ms'] for job in jobs)},
        'first_token_ms': percentiles(first_token_ms, 50, 95), 'step_flops': float(np.mean(flops)) if flops else None,
        'prefill_flops': int(sum(flops)), 'state_tokens': max(job['state_tokens'] for job in jobs),
        'detailed_bytes': max(job['detailed_bytes'] for job in jobs), 'steps': sum(job['steps'] for job in jobs),
        'dropped': sum(job['dropped'] for job in jobs), 'cost_over_step': _over_steps(jobs)}


def _accuracy(answers: list[dict]) -> dict:
    chances = [answer['chance'] for answer in answers if answer['chance'] is not None]
    return share(answer['right'] for answer in judged(answers)) | {'chance': float(np.mean(chances)) if chances else None}


def _mean(parts: Iterable[dict]) -> float | None:
    """Mean of shares that have any answers, each counting the same."""
    known = [part['right'] for part in parts if part['n']]
    return float(np.mean(known)) if known else None


def _beside(answers: list[dict]) -> dict[str, dict]:
    """What the scores say that do not count, by name."""
    names = dict.fromkeys(name for answer in answers for name in answer.get('beside', ()))
    return {name: share(answer['beside'][name] for answer in answers if name in answer.get('beside', ())) for name in names}


def _by(answers: list[dict], field: str) -> dict[str, dict]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for answer in answers:
        groups[answer[field]].append(answer)
    return {name: _accuracy(group) for name, group in groups.items()}


def _ages(answers: list[dict]) -> list[dict]:
    """Accuracy by the seconds that passed between the fact and the question, perception left out."""
    dated = [a for a in judged(answers) if a['fact_age_s'] is not None and a['group'] != 'perception']
    spans = [(begin, end, [a['right'] for a in dated if begin <= a['fact_age_s'] < end])
             for begin, end in zip(AGES_S, AGES_S[1:])]
    return [{'from_s': begin, 'to_s': None if math.isinf(end) else end, **share(right)} for begin, end, right in spans if right]


def _over_steps(jobs: list[dict], points: int = 40) -> dict[str, list]:
    """Median ms and mean FLOPs of a step over its number, in up to `points` stretches."""
    longest = max((job['steps'] for job in jobs), default=0)
    edges = np.unique(np.linspace(0, longest, min(points, longest) + 1).astype(int))
    cost: dict[str, list] = {'step': [], 'ms': [], 'flops': []}
    for begin, end in zip(edges, edges[1:]):
        ms = [value for job in jobs for value in job['step_ms'][begin:end]]
        flops = [value for job in jobs for value in job['step_flops'][begin:end]]
        cost['step'].append(float(begin + end - 1) / 2)
        cost['ms'].append(float(np.median(ms)) if ms else None)
        cost['flops'].append(float(np.mean(flops)) if flops else None)
    return cost
