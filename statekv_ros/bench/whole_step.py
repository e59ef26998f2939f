"""One whole frame step at a published model's true shapes, with random weights: statekv at several budgets and full attention.

A step is the vision tower, the embeddings, the language model, the keys and values kept and the selection. Streams are not
watched up to the frame in question: the state, or full attention's cache, is filled with noise to the size that it would have
there, which is all that the cost depends on.
"""
import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.bench.hardware import copy_bandwidth, matmul_flops, versions
from statekv_ros.bench.models import random_model
from statekv_ros.bench.sizes import parse_size
from statekv_ros.bench.step_floor import step_work, vision_flops
from statekv_ros.bench.step_plot import plot, require_matplotlib
from statekv_ros.bench.step_report import print_table, ratios
from statekv_ros.bench.step_variants import Step, Variant
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError
from statekv_ros.memory.clock import PhaseClock

BUDGETS, FRAMES = (256, 1024, 4096, 16384), (16, 64, 256, 512, 1024)
WARM_UP = 3  # compile, record, replay


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict:
    """Measure all variants in turn, so that a device that slows down slows all of them, and take medians.

    Returns:
        {'benchmark', 'model', 'random_weights', 'layers' (None: all), 'device', 'versions', 'dtype', 'step_tokens', 'rounds',
        'matmul_tflops', 'copy_gb_per_s' (both measured in this run), 'rows': [{policy, budget, frame, carried_tokens, replayed
        (as CUDA graphs), step_ms, vision_ms, prefill_ms, select_ms, host_ms (until all was queued), floor_ms, of_floor}],
        'left_out': [{policy, frame, reason}], 'ratios' (see `step_report.ratios`)}.

    Raises:
        ParameterError, ModelError: an argument that cannot work.
    """
    frames, budgets = sorted(set(args.frames or FRAMES)), sorted(set(args.budget or BUDGETS))
    if min(frames) < 1 or min(budgets) < 1 or args.rounds < 1:
        raise ParameterError(f'--frames, --budget and --rounds must be positive, got {min(frames)}, {min(budgets)} and '
                             f'{args.rounds}')
    if args.plot:
        require_matplotlib()
    backbone = random_model(args, '--layers 1 --frames 16 64 --budget 256')
    device, dtype = backbone.device, backbone.dtype
    width, height = parse_size('--size', args.size or '448x448')
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    step = Step(backbone, [backbone.prepare(picture)] * backbone.frames_per_step, args.cuda_graph)
    variants = [step.statekv(budget, frame) for budget in budgets for frame in frames]
    full, left_out = step.full(frames)
    times = _measure(variants + full, args.rounds, device, quiet=args.json)
    rates = matmul_flops(device, dtype), copy_bandwidth(device)
    seen = vision_flops(backbone, step.staged(frames[0]).on(device))
    size, tied = backbone.size(height, width), PUBLISHED[args.model].more.get('tie_word_embeddings', False)
    rows = []
    for variant, timed in zip(variants + full, times):
        tokens = step.staged(variant.frame).tokens
        floor = step_work(size, tied, seen, tokens, variant.carried, scored=bool(variant.budget)).floor_ms(*rates)
        rows.append({'policy': variant.policy, 'budget': variant.budget, 'frame': variant.frame,
                     'carried_tokens': variant.carried, 'replayed': variant.replayed(),
                     **{name: round(value, 4) for name, value in timed.items()},
                     'floor_ms': round(floor, 4), 'of_floor': round(floor / timed['step_ms'], 4)})
    result = {
        'benchmark': 'step', 'model': args.model, 'random_weights': True, 'layers': args.layers,
        'device': device_name(device), 'versions': versions(), 'dtype': args.dtype or 'bf16',
        'step_tokens': step.staged(frames[-1]).tokens, 'rounds': args.rounds, 'matmul_tflops': round(rates[0] / 1e12, 3),
        'copy_gb_per_s': round(rates[1] / 1e9, 1), 'rows': rows, 'left_out': left_out, 'ratios': ratios(rows),
    }
    if args.plot:
        plot(result, args.plot)
    if args.profile:
        Path(args.profile).write_text(_profile(variants[-1], device))
    if not args.json:
        print_table(result)
    return result


def _measure(variants: list[Variant], rounds: int, device: torch.device, quiet: bool) -> list[dict]:
    """Medians of each variant, in milliseconds."""
    times: list[list[list[float]]] = [[] for _ in variants]
    for turn in track(range(WARM_UP + rounds), 'measuring', console=Console(stderr=True), disable=quiet):
        for variant, kept in zip(variants, times):
            begun, clock = time.perf_counter(), PhaseClock(device)
            variant.run(clock)
            host_ms = (time.perf_counter() - begun) * 1e3
            phases = clock.phases_ms()
            if turn >= WARM_UP:
                kept.append([sum(phases), *phases, host_ms])
    names = ('step_ms', 'vision_ms', 'prefill_ms', 'select_ms', 'host_ms')
    return [dict(zip(names, map(statistics.median, zip(*kept)))) for kept in times]


def _profile(variant: Variant, device: torch.device) -> str:
    """Where one step's time goes, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        clock = PhaseClock(device)
        variant.run(clock)
        clock.phases_ms()
    order = 'self_cuda_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    table = profiler.key_averages().table(sort_by=order, row_limit=60)
    return f'{variant.policy} at frame {variant.frame}, {device_name(device)}\n{table}\n'
