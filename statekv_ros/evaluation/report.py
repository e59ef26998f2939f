"""The report of a run: report.json and answers.csv for programs, index.html for people, self-contained and without scripts."""
import csv
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from statekv_ros import __version__
from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation import figures
from statekv_ros.evaluation.headline import headline, larger_for_less
from statekv_ros.evaluation.metrics import AGES_S, REFERENCE, summarise
from statekv_ros.evaluation.predictions import write_predictions
from statekv_ros.evaluation.samples import samples
from statekv_ros.evaluation.schema import Video
from statekv_ros.evaluation.tables import as_markdown, make_tables

_COLUMNS = ('model', 'source', 'mode', 'prefill_policy', 'answer_policy', 'question', 'kind', 'group', 'ask_at', 'text', 'answer', 'accepted',
            'right', 'in_window', 'chance', 'fact_age_s', 'evidence_hit', 'first_token_ms', 'total_ms', 'context_tokens')


def write_report(jobs: Sequence[dict], run: dict, out: Path, against: str = REFERENCE, ages: Sequence[float] = AGES_S,
                 videos: Sequence[Video] = ()) -> dict:
    """Write the report of a run's jobs into its folder.

    Args:
        jobs: results as `run.run_job` makes them, or `pool.failed`; run: the plan, as in run.json.
        against, ages: of the tables; see `make_tables`.
        videos: that were watched, for pictures of right and wrong answers; none: no pictures.

    Returns:
        The content of report.json: {'run', 'summary', 'tables', 'errors'}.

    Raises:
        EvaluationError: the folder cannot be written.
    """
    errors = [job for job in jobs if 'error' in job]
    jobs = [job for job in jobs if 'error' not in job]
    report = {'run': {name: run.get(name) for name in ('model', 'model_digest', 'mode', 'rate', 'device', 'dtype', 'weights',
                                                      'max_tokens', 'detailed_format')},
              'summary': summarise(jobs), 'tables': make_tables(jobs, against, ages), 'errors': errors}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'report.json').write_text(json.dumps(report, indent=1))
        (out / 'tables.md').write_text(as_markdown(report['tables']))
        _write_answers(jobs, out / 'answers.csv')
        write_predictions(jobs, out / 'predictions')
        (out / 'index.html').write_text(_page(report, jobs, videos))
    except OSError as error:
        raise EvaluationError(f'the report cannot be written to {out}: {error}') from error
    return report


def render(template: str | Path, **values) -> str:
    """A page from templates/, or of a template elsewhere, in the reports' style; text is escaped, but not what is `safe`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {'percent': _percent, 'number': _number, 'bytes': _bytes, 'policy': figures.label}
    folder = files('statekv_ros.evaluation') / 'templates'
    style = (folder / 'style.css').read_text()
    source = (folder / template if isinstance(template, str) else template).read_text()
    return environment.from_string(source).render(style=style, version=__version__, **values)


def _page(report: dict, jobs: Sequence[dict], videos: Sequence[Video]) -> str:
    summary = report['summary']
    policies = [policy | {'style': style} for policy, style in zip(summary['policies'], figures.styles(summary['policies']))]
    first = headline(policies)
    shown = first['ours'] or first['best']
    drawn = [('accuracy against cost', figures.accuracy_against_cost), ('cost over frames', figures.cost_over_frames)]
    if any(policy['ages'] for policy in policies):      # else no question said when its fact was in view
        drawn.append(('accuracy by age', figures.accuracy_by_age))
    return render('report.html.j2', run=report['run'], summary=summary, policies=policies, reference=REFERENCE, errors=report['errors'],
                  first=first, larger=larger_for_less(policies), samples=samples(jobs, videos, shown) if shown else [],
                  figures=[figures.attempt(name, draw, policies) for name, draw in drawn])


def _write_answers(jobs: Sequence[dict], file: Path) -> None:
    with file.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        writer.writeheader()
        for job in jobs:
            for answer in job['answers']:
                row = {name: answer.get(name, job.get(name, '')) for name in _COLUMNS}
                writer.writerow(row | {'accepted': '|'.join(answer['accepted'])})


def _percent(value: float | None, digits: int = 0) -> str:
    return '–' if value is None else f'{100 * value:.{digits}f}'


def _number(value: float | None, digits: int = 1) -> str:
    return '–' if value is None else f'{value:,.{digits}f}'


def _bytes(value: int) -> str:
    for unit in ('B', 'kB', 'MB', 'GB'):
        if value < 1000 or unit == 'GB':
            return f'{value:.0f} {unit}' if unit == 'B' else f'{value:.1f} {unit}'
        value /= 1000
