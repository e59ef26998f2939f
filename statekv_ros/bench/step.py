"""What a frame step costs as the stream grows, for several prefill policies in one run on the same frames."""
import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from statekv_ros.backbones import Backbone, load_backbone
from statekv_ros.errors import ParameterError
from statekv_ros.memory import StepReport, VideoStream, parse_prefill_policy

EARLY = slice(100, 150)
LATE_STEPS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--policy', default='statekv,window,full', help='comma-separated prefill policies')
    parser.add_argument('--frames', type=int, default=400, help='frame steps (Qwen3-VL takes two camera frames for each)')
    parser.add_argument('--runs', type=int, default=3, help='staggered streams per policy')
    parser.add_argument('--budget', type=int, default=512, help='tokens of a policy "statekv" without a number')
    parser.add_argument('--window', type=int, default=16, help='frames of a policy "window" without a number')
    parser.add_argument('--model', default='tiny', help='directory or hub id; "tiny" makes a small one with random weights')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--size', default='128x128', help='camera frames, WIDTHxHEIGHT')


def run(args: argparse.Namespace) -> dict:
    """Step every policy over the same frames.

    A machine's speed drifts by more than the effect we look for. So each policy has several streams, staggered in time: the
    steps 100-150 of one run in turn with the last 50 steps of the one before, and these are compared.

    Returns:
        {'device', 'versions', 'policies': {name: {...}}} with ms per step (vision, prefill and selection), medians of steps
        100-150 and of the last 50, their ratio, and the largest number of carried tokens.
    """
    policies = [_policy(name, args) for name in args.policy.split(',')]
    width, height = (int(side) for side in args.size.split('x'))
    if args.frames < EARLY.stop + LATE_STEPS:
        raise ParameterError(f'--frames must be at least {EARLY.stop + LATE_STEPS} to compare early with late steps, got '
                             f'{args.frames}')
    if args.device in ('auto', 'cpu'):
        torch.set_num_threads(1)  # small matrices: more threads only add noise
    with tempfile.TemporaryDirectory() as folder:
        backbone = load_backbone(_model(args.model, folder), device=args.device)
        reports = {policy: _measure(backbone, policy, args.frames, args.runs, height, width, quiet=args.json)
                   for policy in policies}
    result = {
        'benchmark': 'step', 'model': args.model, 'steps': args.frames, 'runs': args.runs,
        'device': torch.cuda.get_device_name(backbone.device) if backbone.device.type == 'cuda' else platform.processor()
        or platform.machine(),
        'versions': {'torch': torch.__version__, 'transformers': transformers.__version__},
        'policies': {name: _summary(steps) for name, steps in reports.items()},
    }
    if not args.json:
        _print(result)
    return result


def _policy(name: str, args: argparse.Namespace) -> str:
    name = {'statekv': f'statekv({args.budget})', 'window': f'window({args.window})'}.get(name.strip(), name.strip())
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
    streams = [VideoStream(backbone, policy) for _ in range(runs)]
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
    table = Table(title=f'frame step on {result["device"]}, {result["steps"]} steps, model {result["model"]}')
    for column in ('policy', 'ms p50', 'ms p95', 'steps 100-150', 'last 50', 'late / early', 'carried tokens'):
        table.add_column(column, justify='left' if column == 'policy' else 'right')
    for name, row in result['policies'].items():
        table.add_row(name, *(f'{row[key]:.2f}' for key in ('step_ms_p50', 'step_ms_p95', 'early_ms', 'late_ms')),
                      f'{row["late_over_early"]:.3f}', str(row['max_state_tokens']))
    Console().print(table)
