"""Several finished runs on one page: the same questions, asked of several checkpoints."""
import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation.metrics import REFERENCE
from statekv_ros.evaluation.report import write_report
from statekv_ros.evaluation.store import RunFolder, read_plan
from statekv_ros.evaluation.tables import check_edges

_SHARED = ('mode', 'rate', 'weights', 'max_tokens', 'detailed_format')


def compare(args: argparse.Namespace) -> dict:
    """Write the report of all runs in `args.inputs` into `args.out`; returns it.

    Raises:
        EvaluationError: a folder is no run or is not done, the runs have other questions, or two are of one model.
    """
    check_edges(args.ages)
    if len(args.inputs) < 2:
        raise EvaluationError(f'--compare needs at least two run folders, got {len(args.inputs)}')
    in_use = args.out.exists() and any(args.out.iterdir())
    if in_use and ((args.out / 'run.json').exists() or not (args.out / 'report.json').is_file()):
        raise EvaluationError(f'{args.out} holds something else: choose another --out')
    plans = [_plan(folder) for folder in args.inputs]
    for folder, plan in zip(args.inputs[1:], plans[1:]):
        if _asked(plan) != _asked(plans[0]):
            raise EvaluationError(f'{folder} asks other questions than {args.inputs[0]}, or of other videos: run both with the same files')
    names, jobs = _names(args.inputs, plans), []
    for folder, plan, name in zip(args.inputs, plans, names):
        run = RunFolder(folder, plan)
        if missing := [job for job in plan['jobs'] if not run.has([job])]:
            raise EvaluationError(f'{folder} is not done: {len(missing)} of {len(plan["jobs"])} jobs are missing; run its command again')
        jobs += [job | {'model': name} for job in run.load(plan['jobs'])]
    run = {name: ' and '.join(dict.fromkeys(str(plan.get(name)) for plan in plans)) for name in _SHARED}
    run |= {'model': ', '.join(names)} | {name: ' and '.join(dict.fromkeys(_ran(folder, name) for folder in args.inputs))
                                          for name in ('device', 'dtype')}
    return write_report(jobs, run, args.out, args.against or REFERENCE, args.ages)


def _plan(folder: Path) -> dict:
    if (plan := read_plan(folder)) is None:
        raise EvaluationError(f'{folder} is no run of statekv-eval: give the folders of --out')
    return plan


def _asked(plan: dict) -> str:
    """The questions and videos of a plan, as text."""
    return json.dumps(plan['videos'], sort_keys=True)


def _names(folders: Sequence[Path], plans: Sequence[dict]) -> list[str]:
    """What the models are called: by their folders' names, or, where these are the same, by those of the runs."""
    names = [Path(plan['model']).name for plan in plans]
    if len(set(names)) < len(names):
        names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise EvaluationError(f'the runs cannot be told apart: {", ".join(names)}; give the run folders different names')
    return names


def _ran(folder: Path, name: str) -> str:
    """What a run's own report says that it ran on, or in."""
    try:
        return str(json.loads((folder / 'report.json').read_text())['run'][name])
    except (OSError, ValueError, KeyError):
        return f'{name} unknown'
