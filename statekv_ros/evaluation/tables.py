"""Right answers policy by policy, by the age of the fact and by kind, beside one policy of the run: as numbers and as Markdown.

Questions that several policies were asked are compared one by one, whatever the prefill policy, format or positions.
"""
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from statekv_ros.errors import ParameterError
from statekv_ros.evaluation.metrics import AGES_S, difference, judged, rank, share

_Asked = tuple[str, int]        # source and number of a question


def check_edges(edges: Sequence[float]) -> None:
    """Raises ParameterError for edges of age bands that do not grow."""
    if len(edges) < 2 or edges[0] < 0 or any(not a < b for a, b in zip(edges, edges[1:])):
        raise ParameterError(f'--ages must be at least two seconds that grow, from 0 on, as in --ages 10 64 256, '
                             f'got {list(edges)}')


def make_tables(jobs: Sequence[dict], against: str, edges: Sequence[float] = AGES_S) -> dict:
    """Numbers of every policy.

    Args:
        jobs: results as `run.run_job` makes them.
        against: a policy, as 'statekv(144) x all', of each model; compared with it are those questions that were asked under both.
        edges: of the age bands, in seconds; the last one may be infinite.

    Returns:
        {'against', 'policies': [{'policy', 'reference', 'videos', 'overall', 'evidence', 'read_bytes', 'ages': [{'from_s', 'to_s', ...}],
        'undated', 'kinds': {kind: {'overall', 'ages', 'undated'}}}]}. Each share has 'n', 'right', 'low', 'high' and 'chance';
        'overall' and those of 'ages' outside 'kinds' also 'less', the paired difference, and 'same', the share of answers in
        the same words. 'read_bytes' is the most that a pass reads, mean over the questions. 'undated' are questions whose fact
        has no age, as about what was never seen. Perception is left out of the ages.
    """
    check_edges(edges)
    policies: dict[tuple[str, str], dict[_Asked, tuple[dict, dict]]] = defaultdict(dict)
    for job in jobs:
        for answer in job['answers']:
            name = f'{job["prefill_policy"]} x {answer["answer_policy"]}'
            policies[job.get('model', ''), name][job['source'], answer['question']] = job, answer
    models = list(dict.fromkeys(model for model, _ in policies))
    references = {model: {asked: answer for asked, (_, answer) in policies.get((model, against), {}).items()} for model in models}
    ordered = sorted(policies, key=lambda key: (models.index(key[0]), *map(rank, key[1].split(' x '))))
    return {'against': against if any(references.values()) else None,
            'policies': [_policy(f'{model}: {name}' if model else name, policies[model, name], references[model], edges)
                         | {'reference': name == against} for model, name in ordered]}


def _policy(name: str, told: dict[_Asked, tuple[dict, dict]], reference: dict[_Asked, dict], edges: Sequence[float]) -> dict:
    answers = {asked: answer for asked, (_, answer) in told.items()}
    read = [answer['context_tokens'] * job['token_bytes'] for job, answer in told.values() if job.get('token_bytes')]

    def compared(part: dict[_Asked, dict]) -> dict:
        both = [(answer, reference[asked]) for asked, answer in part.items() if asked in reference]
        told = [(ours['right'], theirs['right']) for ours, theirs in both if None not in (ours['right'], theirs['right'])]
        return _share(part) | {'less': difference([ours for ours, _ in told], [theirs for _, theirs in told]),
                               'same': share(ours['answer'] == theirs['answer'] for ours, theirs in both)}

    kinds = {kind: {asked: answer for asked, answer in answers.items() if answer['kind'] == kind}
             for kind in dict.fromkeys(answer['kind'] for answer in answers.values())}
    return {'policy': name, 'videos': len({source for source, _ in told}), 'overall': compared(answers),
            'evidence': share(a['evidence_hit'] for a in answers.values() if a['evidence_hit'] is not None),
            'read_bytes': float(np.mean(read)) if read else None, **_by_age(answers, edges, compared),
            'kinds': {kind: {'overall': _share(part), **_by_age(part, edges, _share)} for kind, part in kinds.items()}}


def _share(answers: dict[_Asked, dict]) -> dict:
    chances = [answer['chance'] for answer in answers.values() if answer['chance'] is not None]
    return share(a['right'] for a in judged(answers.values())) | {'chance': float(np.mean(chances)) if chances else None}


def _by_age(answers: dict[_Asked, dict], edges: Sequence[float], summed: Callable[[dict], dict]) -> dict:
    recalled = {asked: answer for asked, answer in answers.items() if answer['group'] != 'perception'}

    def aged(begin: float, end: float) -> dict:
        return {asked: a for asked, a in recalled.items() if a['fact_age_s'] is not None and begin <= a['fact_age_s'] < end}

    bands = [(begin, end, aged(begin, end)) for begin, end in zip(edges, edges[1:])]
    return {'ages': [{'from_s': begin, 'to_s': None if math.isinf(end) else end, **summed(part)} for begin, end, part in bands],
            'undated': summed({asked: a for asked, a in recalled.items() if a['fact_age_s'] is None})}


def as_markdown(tables: dict) -> str:
    """The same as text: a table of the policies, one by age, and one by kind and age."""
    against, policies = tables['against'], tables['policies']
    if not policies:
        return 'No answers.\n'
    lines = _table(['policy', 'n', 'right', f'less `{against}`', 'same words', 'evidence', 'read, MB'],
                   [[p['policy'], str(p['overall']['n']), _right(p['overall']), _less(p['overall']['less']),
                     _percent(p['overall']['same']), _right(p['evidence']) + _n(p['evidence']),
                     '' if p['read_bytes'] is None else f'{p["read_bytes"] / 1e6:.2f}'] for p in policies])
    used = [index for index, _ in enumerate(policies[0]['ages']) if any(p['ages'][index]['n'] for p in policies)]
    if not used:
        return '\n'.join(lines) + '\n'
    ages = [policies[0]['ages'][index] for index in used]
    heads = [f'{band["from_s"]:g}-{band["to_s"]:g} s' if band['to_s'] else f'{band["from_s"]:g} s on' for band in ages]
    lines += ['', *_table(['policy', *heads, 'no age'], [
        [p['policy'], *(_right(part) + _n(part) for part in [*(p['ages'][index] for index in used), p['undated']])]
        for p in policies])]
    if against:
        lines += ['', *_table([f'less `{against}`', *heads, 'no age'], [
            [p['policy'], *(_less(part['less']) for part in [*(p['ages'][index] for index in used), p['undated']])]
            for p in policies if not p['reference']])]
    kinds = dict.fromkeys(kind for p in policies for kind in p['kinds'])
    lines += ['', *_table(['kind', 'policy', *heads, 'no age', 'chance'], [
        [kind, p['policy'], *(_percent(part) + _n(part) for part in [*(of['ages'][index] for index in used), of['undated']]),
         '' if of['overall']['chance'] is None else f'{100 * of["overall"]["chance"]:.1f}']
        for kind in kinds for p in policies if (of := p['kinds'].get(kind))])]
    return '\n'.join(lines) + '\n'


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f'| {" | ".join(cells)} |' for cells in [heads, ['---'] * len(heads), *rows]]


def _right(part: dict) -> str:
    return f'{100 * part["right"]:.1f} ({100 * part["low"]:.1f}-{100 * part["high"]:.1f})' if part['n'] else ''


def _percent(part: dict) -> str:
    return f'{100 * part["right"]:.1f}' if part['n'] else ''


def _n(part: dict) -> str:
    return f', n = {part["n"]}' if part['n'] else ''


def _less(paired: dict) -> str:
    if not paired['n']:
        return ''
    return f'{100 * paired["difference"]:+.1f} ±{50 * (paired["high"] - paired["low"]):.1f}'
