"""What a run says in a sentence or two: StateKV beside full attention, and beside a window that costs the same."""
from collections.abc import Sequence

from statekv_ros.evaluation.metrics import REFERENCE


def headline(policies: Sequence[dict]) -> dict[str, dict | None]:
    """The policies that a reader looks for first, as far as the run has them.

    Args:
        policies: of `metrics.summarise`; online ones are left out where there are offline ones.

    Returns:
        {'ours': statekv with the most right answers, 'full': full attention of the same model, 'window': the window whose steps
        cost most nearly what ours do, 'newest': the newest frames alone, 'best': the best one, where there is no statekv}; None
        for what the run has not.
    """
    mode = min((policy['mode'] for policy in policies), default='')
    known = [policy for policy in policies if policy['overall']['n'] and policy['mode'] == mode]
    found = dict.fromkeys(('ours', 'full', 'window', 'newest', 'best'))
    if not known:
        return found
    kept = [policy for policy in known if policy['prefill'].startswith('statekv')]
    ours = max(kept or known, key=lambda policy: policy['overall']['right'])
    if not kept:
        return found | {'best': ours}
    beside = [policy for policy in known if policy['model'] == ours['model']]
    windows = [policy for policy in beside if policy['prefill'].startswith('window') and policy['answer'] == ours['answer']]
    return found | {
        'ours': ours,
        'full': next((policy for policy in beside if policy['policy'] == REFERENCE), None),
        'window': min(windows, key=lambda policy: abs((policy['step_flops'] or 0) - (ours['step_flops'] or 0)), default=None),
        'newest': next((policy for policy in beside if policy['answer'].startswith('last')), None)}


def larger_for_less(policies: Sequence[dict]) -> tuple[dict, dict] | None:
    """A model under statekv and another one under full attention whose steps cost more and whose answers are right less often:
    the pair that gains most, None where there is none (the second claim of arXiv 2605.31598)."""
    priced = [policy for policy in policies if policy['overall']['n'] and policy['step_flops']]
    pairs = [(ours, theirs) for ours in priced if ours['prefill'].startswith('statekv')
             for theirs in priced if theirs['prefill'] == 'full' and theirs['model'] != ours['model']
             and ours['step_flops'] <= theirs['step_flops'] and ours['overall']['right'] > theirs['overall']['right']]
    return max(pairs, key=lambda pair: pair[0]['overall']['right'] - pair[1]['overall']['right'], default=None)
