"""What a frame step costs as the stream grows, for several prefill policies in one run on the same frames."""
import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from statekv_ros.backbones import Backbone, load_backbone
from statekv_ros.bench import whole_step
from statekv_ros.bench.hardware import versions
from statekv_ros.bench.sizes import parse_size
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError
from statekv_ros.memory import StepReport, VideoStream, parse_prefill_policy
from statekv_ros.terminal import narrow_table

EARLY = slice(100, 150)
LATE_STEPS = 50


def run(args: argparse.Namespace) -> dict:
    """Step every policy over the same frames.

    A machine's speed drifts by more than the effect we look for. So each policy has several streams, staggered in time: the
    steps 100-150 of one run in turn with the last 50 steps of the one before, and these are compared.

    Returns:
        {'device', 'versions', 'replayed' (as CUDA graphs: none is), 'policies': {name: {...}}} with ms per step (vision,
        prefill and selection), medians of steps 100-150 and of the last 50, their ratio, and the largest number of carried tokens.
    """
    if args.random_weights:
        return whole_step.run(args)
    for name in ('layers', 'dtype', 'plot', 'profile'):
        if getattr(args, name):
            raise ParameterError(f'--{name} is for --random-weights: add that, with --model InternVL3-8B or the like')
    frames, budget = _one(args.frames, 400, '--frames'), _one(args.budget, 512, '--budget')
    policies = [_policy(name, budget, args.window) for name in args.policy.split(',')]
    width, height = parse_size('--size', args.size or '128x128')
    if frames < EARLY.stop + LATE_STEPS:
        raise ParameterError(f'--frames must be at least {EARLY.stop + LATE_STEPS} to compare early with late steps, got '
                             f'{frames}')
    if args.device in ('auto', 'cpu'):
        torch.set_num_threads(1)  # small matrices: more threads only add noise
    with tempfile.TemporaryDirectory() as folder:
        backbone = load_backbone(_model(args.model, folder), device=args.device, weights=args.weights)
        reports = {policy: _measure(backbone, policy, frames, args.runs, height, width, quiet=args.json)
                   for policy in policies}
    result = {
        'benchmark': 'step', 'model': args.model, 'weights': backbone.weights, 'steps': frames, 'runs': args.runs,
        'device': device_name(backbone.device), 'versions': versions(), 'replayed': False,
        'policies': {name: _summary(steps) for name, steps in reports.items()},
    }
    if not args.json:
        _print(result)
    return result


def _one(numbers: list[int] | None, default: int, name: str) -> int:
    if numbers and len(numbers) > 1:
        raise ParameterError(f'{name} takes one number unless with --random-weights, got {" ".join(map(str, numbers))}')
    return numbers[0] if numbers else default


def _policy(name: str, budget: int, window: int) -> str:
    name = {'statekv': f'statekv({budget})', 'window': f'window({window})'}.get(name.strip(), name.strip())
    return str(parse_prefill_policy(name))


def _model(name: str, folder: str) -> str:
    if name != 'tiny':
        return name
    from statekv_ros.backbones.tiny import write_tiny_checkpoint
    return str(write_tiny_checkpoint(Path(folder) / 'tiny'))


def _measure(backbone: Backbone, policy: str, steps: int, runs: int, height: int, width: int,
             quiet: bool) -> list[list[StepReport]]:
    """`runs` streams of one policy, each begun so that its early steps fall between the late steps of the one before."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (16, height, width, 3), dtype=np.uint8)
    offset = steps - (LATE_STEPS + EARLY.start)
    # Only a full state can be replayed as a CUDA graph: so that what differs is the policy, no stream is.
    streams = [VideoStream(backbone, policy, cuda_graph='off') for _ in range(runs)]
    reports: list[list[StepReport]] = [[] for _ in range(runs)]
    for tick in track(range(steps + offset * (runs - 1)), f'{policy:16}', console=Console(stderr=True), disable=quiet):
        for run, stream in enumerate(streams):
            if 0 <= tick - run * offset < steps:
                reports[run].append(_step(stream, frames, tick - run * offset))
            elif tick - run * offset == steps:
                stream.reset()
    return reports


def _step(stream: VideoStream, frames: np.ndarray, index: int) -> StepReport:
    each = stream.backbone.frames_per_step
    for camera_frame in range(index * each, (index + 1) * each):
        report = stream.step(frames[camera_frame % len(frames)], (1 + camera_frame) * 10**9 // each)
    return report


def _ms(report: StepReport) -> float:
    return report.vision_ms + report.prefill_ms + report.select_ms


def _summary(runs: list[list[StepReport]]) -> dict:
    steps = [report for run in runs for report in run]
    early = statistics.median(_ms(r) for run in runs[1:] or runs for r in run[EARLY])
    late = statistics.median(_ms(r) for run in runs[:-1] or runs for r in run[-LATE_STEPS:])
    last = runs[-1][-1]
    return {
        'step_ms_p50': round(statistics.median(map(_ms, steps)), 4),
        'step_ms_p95': round(float(np.percentile([*map(_ms, steps)], 95)), 4),
        'early_ms': round(early, 4), 'late_ms': round(late, 4), 'late_over_early': round(late / early, 4),
        'prefill_ms_p50': round(statistics.median(r.prefill_ms for r in steps), 4),
        'select_ms_p50': round(statistics.median(r.select_ms for r in steps), 4),
        'step_tokens': last.step_tokens, 'budget': last.budget, 'max_state_tokens': max(r.state_tokens for r in steps),
        'detailed_tokens': last.detailed_tokens, 'detailed_bytes': last.detailed_bytes,
    }


def _print(result: dict) -> None:
    table = narrow_table(f'frame step on {result["device"]}, {result["steps"]} steps, model {result["model"]}; ms',
                         'policy', 'p50', 'p95', 'steps\n100-150', 'last 50', 'late\n/ early', 'carried\ntokens')
    for name, row in result['policies'].items():
        table.add_row(name, *(f'{row[key]:.2f}' for key in ('step_ms_p50', 'step_ms_p95', 'early_ms', 'late_ms')),
                      f'{row["late_over_early"]:.3f}', str(row['max_state_tokens']))
    Console().print(table)
    Console().print('Steps run eagerly under every policy, none replayed as a CUDA graph; --random-weights replays them all.')
