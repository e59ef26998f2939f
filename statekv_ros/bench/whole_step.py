"""One whole frame step at a published model's true shapes, with random weights: statekv at several budgets and full attention.

A step is the vision tower, the embeddings, the language model, the keys and values kept and the selection. Streams are not
watched up to the frame in question: the state, or full attention's cache, is filled with noise to the size that it would have
there, which is all that the cost depends on.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from statekv_ros.backbones.family import Family
from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.backbones.random_weights import random_backbone
from statekv_ros.bench.grown_cache import GrownCache
from statekv_ros.bench.hardware import DTYPES, copy_bandwidth, device_name, matmul_flops, parse_device, versions
from statekv_ros.bench.step_floor import step_work, vision_flops
from statekv_ros.bench.step_plot import plot, require_matplotlib
from statekv_ros.bench.step_report import print_table, ratios
from statekv_ros.errors import ModelError, ParameterError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.capacity import available_memory
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.positions import StepPlace

BUDGETS, FRAMES = (256, 1024, 4096, 16384), (16, 64, 256, 512, 1024)
WARM_UP = 3


@dataclass
class Variant:
    """One line's point of the figure.

    Attributes:
        frame: frame steps already seen.
        carried: tokens in the past of the step.
        run: one step, marking the clock after the vision tower, the language model and the selection.
    """
    policy: str
    budget: int
    frame: int
    carried: int
    run: Callable[[PhaseClock], None]


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict:
    """Measure all variants in turn, so that a device that slows down slows all of them, and take medians.

    Returns:
        {'benchmark', 'model', 'random_weights', 'layers' (None: all), 'device', 'versions', 'dtype', 'step_tokens', 'rounds',
        'matmul_tflops', 'copy_gb_per_s' (both measured in this run), 'rows': [{policy, budget, frame, carried_tokens, step_ms,
        vision_ms, prefill_ms, select_ms, host_ms (until all was queued), floor_ms, of_floor}], 'left_out': [{policy, frame,
        reason}], 'ratios' (see `step_report.ratios`)}.

    Raises:
        ParameterError, ModelError: an argument that cannot work.
    """
    device, dtype = _device(args), DTYPES[args.dtype or 'bf16']
    frames, budgets = sorted(set(args.frames or FRAMES)), sorted(set(args.budget or BUDGETS))
    if min(frames) < 1 or min(budgets) < 1 or args.rounds < 1:
        raise ParameterError(f'--frames, --budget and --rounds must be positive, got {min(frames)}, {min(budgets)} and '
                             f'{args.rounds}')
    if args.model not in PUBLISHED:
        raise ParameterError(f'--model must be among {", ".join(PUBLISHED)} with --random-weights, got {args.model!r}')
    if args.plot:
        require_matplotlib()
    backbone = random_backbone(args.model, device, dtype, args.layers)
    width, height = (int(side) for side in (args.size or '448x448').split('x'))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    step = Step(backbone, [backbone.prepare(picture)] * backbone.frames_per_step)
    variants = [step.statekv(budget, frame) for budget in budgets for frame in frames]
    full, left_out = _full(step, frames)
    times = _measure(variants + full, args.rounds, device, quiet=args.json)
    rates = matmul_flops(device, dtype), copy_bandwidth(device)
    seen = vision_flops(backbone, step.staged(frames[0]).on(device))
    size, tied = backbone.size(height, width), PUBLISHED[args.model].more.get('tie_word_embeddings', False)
    rows = []
    for variant, timed in zip(variants + full, times):
        tokens = step.staged(variant.frame).tokens
        floor = step_work(size, tied, seen, tokens, variant.carried, scored=bool(variant.budget)).floor_ms(*rates)
        rows.append({'policy': variant.policy, 'budget': variant.budget, 'frame': variant.frame,
                     'carried_tokens': variant.carried, **{name: round(value, 4) for name, value in timed.items()},
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


class Step:
    """One frame step of a backbone, as it would be after any number of frames."""

    def __init__(self, backbone: Family, frames: list[np.ndarray]):
        self.backbone, self.frames = backbone, frames

    def staged(self, frame: int, position: int = 0):
        """The step after `frame` others: its text counts them; a step a second."""
        each = self.backbone.frames_per_step
        return self.backbone.stage(self.frames, [frame + index / each for index in range(each)], position, frame * each)

    def seen_tokens(self, frame: int) -> int:
        """Tokens of the first `frame` steps."""
        return frame * self.staged(frame).tokens

    def statekv(self, budget: int, frame: int) -> Variant:
        """A step over the state as it would be: at most `budget` tokens, and full where this step would fill it."""
        stream = VideoStream(self.backbone, f'statekv({budget})')
        tokens = self.staged(frame).tokens
        carried = min(budget, self.seen_tokens(frame))
        full = carried + tokens > budget
        carried = budget if full else carried
        _fill(stream, carried)

        def run(clock: PhaseClock) -> None:
            inputs = self._encode(frame, carried)
            clock.mark()
            place = _place(inputs.tokens, carried, self.backbone.starts(inputs), inputs.next_position)
            stream.carried.begin(place)
            stream.detailed.begin(place, stream.shift)
            self.backbone.forward(inputs, stream)
            clock.mark()
            if full:  # else nothing is selected, and what was not committed leaves the state as it was
                stream.carried.commit()
            clock.mark()

        return Variant(str(stream.prefill_policy), budget, frame, carried, run)

    def full(self, cache: GrownCache, frame: int) -> Variant:
        """A step over all frames so far."""
        carried = self.seen_tokens(frame)

        def run(clock: PhaseClock) -> None:
            inputs = self._encode(frame, carried)
            clock.mark()
            cache.tokens = carried
            self.backbone.forward(inputs, cache)
            clock.mark()
            clock.mark()

        return Variant('full', 0, frame, carried, run)

    def _encode(self, frame: int, position: int):
        return self.backbone.embed_step(self.staged(frame, position).on(self.backbone.device))


def _place(tokens: int, position: int, starts: torch.Tensor, next_position: int) -> StepPlace:
    return StepPlace(tokens, 1, position, position, next_position, position, starts, lambda: 0)


def _fill(stream: VideoStream, tokens: int) -> None:
    """Carry `tokens` tokens of noise, by the state's own life; what they attend to is beside the point, so one query does."""
    layout, carried = stream.backbone.layout, stream.carried
    carried.begin(_place(tokens, 0, torch.arange(tokens, device=layout.device), tokens))
    noise = torch.randn(1, layout.kv_heads, tokens, layout.head_dim, dtype=layout.dtype, device=layout.device)
    for layer in range(layout.layers):
        carried.attend(layer, noise[:, :, -1:], noise, noise, layout.head_dim ** -0.5)
    carried.commit()


def _full(step: Step, frames: list[int]) -> tuple[list[Variant], list[dict]]:
    """Full attention at all frames whose cache fits into half of the memory that is left."""
    layout = step.backbone.layout
    free, where = available_memory(layout.device)
    needed = {frame: step.seen_tokens(frame) + 2 * step.staged(frame).tokens for frame in frames}
    fitting = [frame for frame in frames if needed[frame] * layout.bytes_per_token <= free / 2]
    left_out = [{'policy': 'full', 'frame': frame, 'reason': f'its cache of {needed[frame] * layout.bytes_per_token} bytes is '
                 f'more than half of what is free of {where}'} for frame in frames if frame not in fitting]
    if not fitting:
        return [], left_out
    cache = GrownCache(layout, needed[fitting[-1]])
    return [step.full(cache, frame) for frame in fitting], left_out


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


def _device(args: argparse.Namespace) -> torch.device:
    name = args.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    device = parse_device(name, '--layers 1 --frames 16 64 --budget 256')
    if device.type == 'cpu' and not args.layers:
        raise ParameterError('a CPU is too slow for a whole published model: cut it with --layers 1, or run on a machine with '
                             'a GPU')
    return device
