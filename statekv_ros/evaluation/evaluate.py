"""One evaluation from its arguments to its report: everything is checked before anything runs."""
import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from statekv_ros.backbones.size import ModelSize
from statekv_ros.device_name import device_name
from statekv_ros.errors import EvaluationError, FrameError
from statekv_ros.evaluation.benchmarks import read_benchmark
from statekv_ros.evaluation.footage import Extent, check_video, open_path
from statekv_ros.evaluation.metrics import REFERENCE
from statekv_ros.evaluation.offline import Offline
from statekv_ros.evaluation.plan import Job, Policy, Settings, describe, make_jobs, parse_policies
from statekv_ros.evaluation.pool import Worker, check_ray, in_process, on_ray, run_all
from statekv_ros.evaluation.run import make_memory
from statekv_ros.evaluation.schema import Video, load_questions
from statekv_ros.evaluation.store import RunFolder, read_plan
from statekv_ros.evaluation.tables import check_edges
from statekv_ros.memory.trial import demonstration_warning

BASELINE = 'window(4) x last(4)'


def evaluate(args: argparse.Namespace) -> dict:
    """Check everything, then work, then report. Returns the report.

    Args:
        args: of the command line, as `cli` parses it.

    Raises:
        StateKVError: a bad input, with a line for each mistake, or what went wrong on the way.
    """
    settings = Settings(args.model, args.device, args.dtype, 'online' if args.online else 'offline', args.rate,
                        args.max_tokens, args.threads, args.lockstep, args.detailed_format, args.ask_alone, args.weights,
                        Offline(args.layout, args.rope_length, args.positions, args.max_frame_pixels), args.skip_broken)
    policies = parse_policies(_with_baseline(args.policies) if args.benchmark else args.policies)
    check_edges(args.ages)
    against = _reference(args.against, policies)
    videos, extents = _check_questions(args)
    jobs = make_jobs(videos, policies, settings.lockstep)
    if args.ray:
        check_ray()
    if args.online and settings.lockstep > 1:
        raise EvaluationError(f'--lockstep {settings.lockstep} is for offline runs: a live node watches in its own time')
    if settings.lockstep > 1 and args.benchmark:
        raise EvaluationError(f'--lockstep {settings.lockstep}: the videos of a benchmark are watched one by one')
    if args.online and (args.layout != 'model' or settings.watching.by_video):
        raise EvaluationError('--layout released and --rope-length auto are for offline runs: a live node does not know how long '
                              'its stream will be')
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
    plan = describe(settings, videos, policies, [extent.frames if extent else 0 for extent in extents])
    folder = RunFolder(args.out, plan)
    ran = {'device': device_name(worker.backbone.device), 'dtype': str(worker.backbone.dtype).removeprefix('torch.')}
    if args.so_far:
        done = [name for name in plan['jobs'] if folder.has([name])]
        return _report(folder.load(done), plan | ran, args, against, videos)
    if args.ray or args.online:
        del worker      # the jobs have models of their own
    if args.ray:
        run_all(jobs, folder, partial(on_ray, settings, args.ray))
    elif args.online:
        _run_online(settings, jobs, folder, sizes)
    else:
        run_all(jobs, folder, partial(in_process, worker))
    return _report(folder.load(plan['jobs']), plan | ran, args, against, videos)


def _with_baseline(policies: list[str]) -> list[str]:
    """With one that answers from the newest frames alone: on questions about now it is the one to beat (SimpleStream, arXiv
    2604.02317)."""
    return policies if any(' last(' in policy for policy in policies) else [*policies, BASELINE]


def _read_questions(args: argparse.Namespace) -> tuple[list[Video], list[str]]:
    """Videos of all files, and the mistakes of questions files; raises EvaluationError for those of a benchmark."""
    if args.benchmark:
        return read_benchmark(args.benchmark, args.inputs, args.videos or args.inputs[0].parent, args.rate_hz, args.context,
                              args.prompts), []
    _refuse_without_benchmark(args)
    videos, errors = [], []
    for file in args.inputs:
        try:
            videos += load_questions(file)
        except EvaluationError as error:
            errors.append(str(error))
    return videos, errors


def _check_questions(args: argparse.Namespace) -> tuple[list[Video], list[Extent | None]]:
    """Videos of all files, and how long each is, None for one that cannot be read where that is to be skipped. Raises
    EvaluationError with all mistakes of all files."""
    videos, errors = _read_questions(args)
    extents: dict[Video | tuple[Path, str], Extent | None] = {}
    for video in videos:
        key = _looked_at(video)
        if key not in extents:
            extents[key], wrong = check_video(video)
            if args.skip_broken and extents[key] is None:
                print(f'statekv-eval: skipped: {wrong.pop()}', file=sys.stderr)
            errors += wrong
    if errors:
        raise EvaluationError('\n'.join(errors))
    return videos, [extents[_looked_at(video)] for video in videos]


def _looked_at(video: Video) -> Video | tuple[Path, str]:
    """What is looked through once: all clips of a source together."""
    return video if video.exact else (video.folder, video.source)


def _refuse_without_benchmark(args: argparse.Namespace) -> None:
    for option in ('videos', 'rate_hz', 'context', 'prompts'):
        if getattr(args, option) is not None:
            raise EvaluationError(f'--{option.replace("_", "-")} is for --benchmark: a questions file says it itself')


def _sizes(worker: Worker, jobs: Sequence[Job], extents: dict[Video, Extent | None]) -> dict[str, ModelSize]:
    """The model's size for each job's frames, by the name of its first result. Raises StateKVError when the model cannot watch
    them, or cannot run a policy."""
    for policy in dict.fromkeys(job.policy for job in jobs):
        make_memory(worker.backbone, policy, worker.detailed_format, worker.positions)
    sizes = {}
    for job in jobs:
        if None in map(extents.get, job.videos):
            continue
        for video in job.videos:
            worker.fitted(job.policy, video, extents[video])
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


def _reference(text: str, policies: Sequence[Policy]) -> str:
    """The name of the policy that the others are compared with. Raises EvaluationError where it is not among them."""
    names = [f'{policy.prefill} x {answer}' for policy in policies for answer in policy.answers]
    if not text:
        return REFERENCE if REFERENCE in names else names[0]
    [policy] = parse_policies([text])
    if (name := f'{policy.prefill} x {policy.answers[0]}') not in names:
        raise EvaluationError(f'--against {text!r} is not among --policies, which are {", ".join(names)}')
    return name


def _report(results: list[dict], plan: dict, args: argparse.Namespace, against: str, videos: Sequence[Video]) -> dict:
    out: Path = args.out
    try:
        from statekv_ros.evaluation.report import write_report
    except ModuleNotFoundError as error:
        raise EvaluationError(f"the results are in {out / 'jobs'}, but there is no report, for it needs more packages "
                              f"({error}): pip install 'statekv_ros[eval]', then run the same command again") from error
    return write_report(results, plan, out, against, args.ages, videos)


def attention_statistics(args: argparse.Namespace) -> dict:
    """`--stats`: see `statistics.write_statistics`."""
    from statekv_ros.evaluation.statistics import write_statistics
    return write_statistics(args.model, [open_path(path) for path in args.inputs], args.out, args.budgets, args.device,
                            args.weights)

