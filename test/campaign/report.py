"""A run of the campaign as report.json, for programs, and index.html, for people: self-contained and without scripts."""
import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from campaign.samples import SLOPES
from statekv_ros import __version__
from statekv_ros.device_name import device_name
from statekv_ros.evaluation import figures
from statekv_ros.evaluation.report import render

_TEMPLATE = Path(__file__).with_name('report.html.j2')
_TITLES = {'rss_mb': 'Resident memory', 'fds': 'Open files', 'threads': 'Threads', 'step_ms_p50': 'Frame step, p50',
           'answer_ms_p50': 'Answer, p50'}


def write_report(folder: Path, classes: Sequence[dict], seconds: float, command: str) -> dict:
    """Write both files.

    Args:
        classes: as `Record.as_dict` has them.
        seconds: wall time of the run.
        command: that makes the same run.

    Returns:
        The content of report.json. Raises OSError where it cannot be written.
    """
    told = {'passed': all(entry['passed'] for entry in classes), 'seconds': round(seconds, 1), 'command': command,
            'date': str(date.today()), 'device': f'{device_name(torch.device("cpu"))}, {os.cpu_count()} cores',
            'python': platform.python_version(), 'version': __version__, 'classes': list(classes)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'report.json').write_text(json.dumps(told, indent=1))
    (folder / 'index.html').write_text(render(_TEMPLATE, run=told, drawn=[_drawn(entry) for entry in classes]))
    return told


def _drawn(entry: dict) -> list[str]:
    """A class's samples over time as figures; none where it has no two."""
    rows = entry['samples']
    return [figures.attempt(name, _over_time, rows, name) for name in SLOPES] if len(rows) > 1 else []


def _over_time(rows: Sequence[dict], name: str) -> str:
    figure, axes = figures.new_axes(_TITLES[name], 'minutes', SLOPES[name])
    points = [(row['minute'], row[name]) for row in rows if row[name] is not None]
    axes.plot(*zip(*points), linewidth=1.2, markersize=4, **figures.style(1))
    axes.set_ylim(0, 1.15 * max(value for _, value in points))
    return figures.finished(figure, axes)
