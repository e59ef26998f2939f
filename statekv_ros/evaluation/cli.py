"""`statekv-eval`: ask a model questions with known answers, under several policies, and write a report."""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from statekv_ros.backbones.size import ModelSize
from statekv_ros.errors import EvaluationError, FrameError, StateKVError
from statekv_ros.evaluation.footage import Extent, check_video, open_path
from statekv_ros.evaluation.plan import Job, Settings, describe, make_jobs, parse_policies
from statekv_ros.evaluation.pool import LOCAL_RAY, Worker, check_ray, in_process, on_ray, run_all
from statekv_ros.evaluation.run import make_memory
from statekv_ros.evaluation.schema import Video, load_questions
from statekv_ros.evaluation.store import RunFolder, read_plan
from statekv_ros.memory.trial import demonstration_warning

FAILED, INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit code: 0, 2 for a bad input (a line on stderr for each mistake), 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        report = _statistics(args) if args.stats else _evaluate(args)
    except StateKVError as error:
        print(f'statekv-eval: {error}', file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print('statekv-eval: interrupted; what is done is kept, and the same command goes on from there', file=sys.stderr)
        return INTERRUPTED
    if args.json:
        print(json.dumps(report))
    else:
        print(f'{args.out / "index.html"}')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='statekv-eval', description=__doc__)
    parser.add_argument('inputs', type=Path, nargs='+', metavar='QUESTIONS.yaml', help='questions files (docs/questions.md); '
                        'with --stats bags, videos or folders of images')
    parser.add_argument('--out', type=Path, required=True, metavar='RUN_DIR', help='folder for results and report; one that '
                        'holds a part of the same run is gone on with')
    parser.add_argument('--model', default='patrol', help='checkpoint directory, hub id or patrol; default: %(default)s')
    parser.add_argument('--policies', nargs='+', default=['full x all', 'statekv(4096) x all'], metavar='POLICY',
                        help='"PREFILL x ANSWER", where a bare PREFILL means x all, or rlivs; default: %(default)s')
    parser.add_argument('--stats', action='store_true', help='instead: how attention is spread over a stream')
    parser.add_argument('--budgets', type=int, nargs='+', default=[64, 256, 1024, 4096], help='B in tokens, of --stats')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--online', action='store_true', help='play bags through DDS into a live node')
    where.add_argument('--ray', nargs='?', const=LOCAL_RAY, metavar='ADDRESS', help='run jobs side by side on a Ray cluster; '
                       'without an address on one started here')
    parser.add_argument('--rate', type=float, default=1.0, help='bag seconds per second, online; default: 1')
    parser.add_argument('--max-tokens', type=int, default=64, help='of an answer; default: %(default)s')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:<n>')
    parser.add_argument('--dtype', default='auto', help='auto, float32, bfloat16 or float16')
    parser.add_argument('--lockstep', type=int, default=1, metavar='N', help='watch N videos of one shape at once, offline: '
                        'much faster for small models, but steps are not timed; default: %(default)s')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of each process; default: %(default)s')
    parser.add_argument('--json', action='store_true', help='print the report as one JSON object')
    return parser


def _evaluate(args: argparse.Namespace) -> dict:
    """Check everything, then work, then report."""
    settings = Settings(args.model, args.device, args.dtype, 'online' if args.online else 'offline', args.rate,
                        args.max_tokens, args.threads, args.lockstep)
    policies = parse_policies(args.policies)
    videos, extents = _check_questions(args.inputs)
    jobs = make_jobs(videos, policies, settings.lockstep)
    if args.ray:
        check_ray()
    if args.online and settings.lockstep > 1:
        raise EvaluationError(f'--lockstep {settings.lockstep} is for offline runs: a live node watches in its own time')
    if args.online:
        _prepare_ros()
        from statekv_ros.evaluation.online import require_bag
        for job in jobs:
            require_bag(job)
    read_plan(args.out)     # not someone else's folder, before the model is loaded
    worker = Worker(settings)
    if warning := demonstration_warning(worker.backbone, 'set --model'):
        print(f'statekv-eval: {warning}', file=sys.stderr)
    sizes = _sizes(worker, jobs, dict(zip(videos, extents)))
    plan = describe(settings, videos, policies, [extent.frames for extent in extents])
    folder = RunFolder(args.out, plan)
    if args.ray or args.online:
        del worker      # the jobs have models of their own
    if args.ray:
        run_all(jobs, folder, partial(on_ray, settings, args.ray))
    elif args.online:
        _run_online(settings, jobs, folder, sizes)
    else:
        run_all(jobs, folder, partial(in_process, worker))
    return _report(folder.load(plan['jobs']), plan, args.out)


def _check_questions(files: Sequence[Path]) -> tuple[list[Video], list[Extent]]:
    """Videos of all files, and how long each is. Raises EvaluationError with all mistakes of all files."""
    videos, extents, errors = [], [], []
    for file in files:
        try:
            videos += load_questions(file)
        except EvaluationError as error:
            errors.append(str(error))
    for video in videos:
        extent, wrong = check_video(video)
        extents.append(extent)
        errors += wrong
    if errors:
        raise EvaluationError('\n'.join(errors))
    return videos, extents


def _sizes(worker: Worker, jobs: Sequence[Job], extents: dict[Video, Extent]) -> dict[str, ModelSize]:
    """The model's size for each job's frames, by the name of its first result. Raises StateKVError when the model cannot watch
    them, or cannot run a policy."""
    for policy in dict.fromkeys(job.policy for job in jobs):
        make_memory(worker.backbone, policy)
    sizes = {}
    for job in jobs:
        video = job.videos[0]
        try:
            sizes[job.names[0]] = worker.backbone.size(extents[video].height, extents[video].width)
        except FrameError as error:
            raise EvaluationError(f'{video.place}: {error}') from error
    return sizes


def _prepare_ros() -> None:
    """What ROS reads from the environment when it is imported."""
    from statekv_ros.transport import use_shipped_profile
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)
    use_shipped_profile()


def _run_online(settings: Settings, jobs: Sequence[Job], folder: RunFolder, sizes: dict) -> None:
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from statekv_ros.evaluation.online import online
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        run_all(jobs, folder, partial(online, settings, sizes, folder.path / 'logs'))
    finally:
        rclpy.try_shutdown()


def _report(results: list[dict], plan: dict, out: Path) -> dict:
    try:
        from statekv_ros.evaluation.report import write_report
    except ModuleNotFoundError as error:
        raise EvaluationError(f"the results are in {out / 'jobs'}, but there is no report, for it needs more packages "
                              f"({error}): pip install 'statekv_ros[eval]', then run the same command again") from error
    return write_report(results, plan, out)


def _statistics(args: argparse.Namespace) -> dict:
    from statekv_ros.evaluation.statistics import write_statistics
    return write_statistics(args.model, [open_path(path) for path in args.inputs], args.out, args.budgets, args.device)


if __name__ == '__main__':
    sys.exit(main())
