"""The report's figures as SVG text. Colours are Okabe and Ito's, which colour-blind readers tell apart; every line has a marker of
its own too, for prints without colour."""
import html
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#8C6D00')
MARKERS = 'osD^vPX*<>hp'
_SIZE = 7.2, 4.2


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the index-th line."""
    return {'color': COLOURS[index % len(COLOURS)], 'marker': MARKERS[index % len(MARKERS)]}


def styles(policies: Sequence[dict]) -> list[dict[str, Any]]:
    """A colour for each policy, the same whatever the model, and a marker for each line."""
    names = list(dict.fromkeys((policy['policy'], policy['mode']) for policy in policies))
    return [style(index) | {'color': style(names.index((policy['policy'], policy['mode'])))['color']}
            for index, policy in enumerate(policies)]


def svg(figure: Figure) -> str:
    """The figure as SVG to stand in a page, the same for the same figure."""
    out = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': 'statekv', 'svg.fonttype': 'none'}):
        figure.savefig(out, format='svg', bbox_inches='tight', metadata={'Date': None, 'Creator': None})
    return out.getvalue()[out.getvalue().index('<svg'):]


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with one plot."""
    figure = Figure(figsize=_SIZE)
    axes = figure.add_subplot()
    axes.set_title(title, loc='left', fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color='#dddddd', linewidth=.6)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def attempt(name: str, draw: Callable[..., str], *arguments) -> str:
    """What `draw` makes of the arguments; where it fails a line of HTML that says so, for the numbers beside it took hours."""
    try:
        return draw(*arguments)
    except Exception as error:      # matplotlib raises whatever its layers trip over
        told = f'the figure "{name}" could not be drawn: {type(error).__name__}: {error}'
        print(f'statekv-eval: warning: {told}', file=sys.stderr)
        return f'<p>{html.escape(told)}</p>'


def accuracy_against_cost(policies: Sequence[dict]) -> str:
    """Accuracy over the mean FLOPs of a step, and the front of those that no other beats in both."""
    figure, axes = new_axes('Accuracy against the cost of watching', 'GFLOP per frame step (mean)', 'right answers (95 % interval)')
    shown = [(s, p) for s, p in zip(styles(policies), policies) if p['step_flops'] and p['overall']['n']]
    for its_style, policy in shown:
        right = policy['overall']
        axes.errorbar(policy['step_flops'] / 1e9, right['right'],
                      [[right['right'] - right['low']], [right['high'] - right['right']]], capsize=2, linestyle='none',
                      label=label(policy), **its_style)
    front, best = [], -1.
    for _, policy in sorted(shown, key=lambda entry: (entry[1]['step_flops'], -entry[1]['overall']['right'])):
        if policy['overall']['right'] > best:
            best = policy['overall']['right']
            front.append((policy['step_flops'] / 1e9, best))
    if front:
        axes.plot(*zip(*front), color='#999999', linewidth=1, linestyle='--', zorder=0, label='Pareto front')
    axes.set_ylim(0, 1.02)
    return finished(figure, axes)


def cost_over_frames(policies: Sequence[dict]) -> str:
    """Time of a step over its number, or its FLOPs where more policies have those. Answer policies share a line: they cost no
    step."""
    known = {name: sum(any(value is not None for value in policy['cost_over_step'][name]) for policy in policies)
             for name in ('ms', 'flops')}
    timed = known['ms'] >= known['flops']
    name, unit, scale = ('ms', 'ms per frame step (median)', 1) if timed else ('flops', 'GFLOP per frame step', 1e9)
    figure, axes = new_axes('Cost of a frame step as the stream grows', 'frame step', unit)
    told = set()
    for its_style, policy in zip(styles(policies), policies):
        cost = [(x, y / scale) for x, y in zip(policy['cost_over_step']['step'], policy['cost_over_step'][name]) if y is not None]
        if cost and (watched := (policy.get('model'), policy['prefill'], policy['mode'])) not in told:
            told.add(watched)
            axes.plot(*zip(*cost), linewidth=1.4, markersize=4, markevery=max(1, len(cost) // 8),
                      label=label(policy).partition(' ×')[0] + (' (online)' if policy['mode'] == 'online' else ''), **its_style)
    axes.set_ylim(bottom=0)
    return finished(figure, axes)


def accuracy_by_age(policies: Sequence[dict]) -> str:
    """Right answers over the seconds since the fact was in view."""
    figure, axes = new_axes('Accuracy by the age of the fact', 'seconds since the fact was in view', 'right answers')
    names = list(dict.fromkeys((age['from_s'], age['to_s']) for policy in policies for age in policy['ages']))
    names.sort(key=lambda span: span[0])
    for its_style, policy in zip(styles(policies), policies):
        points = [(names.index((age['from_s'], age['to_s'])), age['right']) for age in policy['ages']]
        if points:
            axes.plot(*zip(*points), linewidth=1.2, markersize=5, label=label(policy), **its_style)
    axes.set_xticks(range(len(names)), [f'{begin:g}-{end:g}' if end else f'{begin:g}+' for begin, end in names])
    axes.set_ylim(0, 1.02)
    return finished(figure, axes)


def label(policy: dict) -> str:
    """How a policy is called in figures and tables; with its model's name where there are several."""
    model = f'{policy["model"]}: ' if policy.get('model') else ''
    return model + policy['policy'].replace(' x ', ' × ') + (' (online)' if policy['mode'] == 'online' else '')


def finished(figure: Figure, axes: Axes) -> str:
    """The figure as SVG, with a legend beside the plot if there is anything in it."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
    return svg(figure)
