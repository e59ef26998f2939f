"""The cost of a frame step over the number of frames seen, as a figure."""
from pathlib import Path

from statekv_ros.errors import ParameterError

# Okabe and Ito's colours, told apart by the colour-blind; markers and dashes tell the lines apart without colour.
_COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00')
_MARKERS = 'os^Dv*'


def require_matplotlib() -> None:
    """
    Raises:
        ParameterError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ParameterError('--plot needs the package matplotlib: pip install matplotlib') from None


def plot(result: dict, path: str | Path) -> None:
    """Draw the rows of a whole-step result: a line per budget and a black dashed one for full attention; written as the
    path's ending says (png, pdf, svg)."""
    from matplotlib.figure import Figure  # a figure of its own: no window, no global state
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row['policy'] for row in result['rows']))
    for index, name in enumerate(names):
        rows = sorted((row for row in result['rows'] if row['policy'] == name), key=lambda row: row['frame'])
        style = {'color': 'black', 'linestyle': '--', 'marker': 'x'} if name == 'full' else {
            'color': _COLOURS[index % len(_COLOURS)], 'marker': _MARKERS[index % len(_MARKERS)]}
        axes.plot([row['frame'] for row in rows], [row['step_ms'] for row in rows], label=name, **style)
    axes.set_xscale('log', base=2)
    axes.set_xticks(frames := sorted({row['frame'] for row in result['rows']}), map(str, frames))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel='frame steps seen', ylabel='one frame step (ms)',
             title=f'{result["model"]}, random weights, {result["dtype"]}, {result["step_tokens"]} tokens a step\n'
                   f'{result["device"]}' + (f', cut to {result["layers"]} layer(s)' if result['layers'] else ''))
    axes.grid(alpha=.3)
    axes.legend()
    figure.savefig(path, dpi=150)
