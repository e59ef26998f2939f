"""Scored attention on the shapes of the models: against output-only attention, eager scores and the device's own floor."""
import argparse
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from statekv_ros.bench.hardware import DTYPES, copy_bandwidth, matmul_flops, median_ms, parse_device, versions
from statekv_ros.bench.output_only import Tensors, output_only
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError
from statekv_ros.kernels.scored_attention import default_implementation, scored_attention
from statekv_ros.terminal import narrow_table

TOLERANCE = {'bf16': 2e-2, 'fp16': 1e-2, 'fp32': 1e-5}
# Buffers taken in turn, as the layers of a step do: none finds its keys in the cache from the call before.
LAYERS = 8


class Shape(NamedTuple):
    """Attention of one layer, and the tokens of one frame step (of a 448 x 448 camera)."""

    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int


MODELS = {
    'Qwen3-VL-2B': Shape(16, 8, 128, 205), 'Qwen3-VL-4B': Shape(32, 8, 128, 205), 'Qwen3-VL-8B': Shape(32, 8, 128, 205),
    'InternVL3-1B': Shape(14, 2, 64, 259), 'InternVL3-2B': Shape(12, 2, 128, 259), 'InternVL3-8B': Shape(28, 4, 128, 259),
}


def run(args: argparse.Namespace) -> dict:
    """Measure every model with every budget, the state full.

    Returns:
        {'benchmark', 'device', 'versions', 'implementation', 'dtype', 'matmul_tflops', 'copy_gb_per_s' (both measured in this
        run; bytes read plus bytes written), 'rows': [{model, q_heads, kv_heads, head_dim, tokens, budget, scored_ms, sdpa_ms,
        sdpa (the fastest kind), eager_ms, floor_ms, over_sdpa, of_floor, output_error, importance_error}], 'failed': rows
        whose result is not that of the naive twin}. Times are medians for one layer.

    Raises:
        ParameterError: there is no such device or model, or a number is not positive.
    """
    device = parse_device(args.device, '--tokens 8 --budgets 64')
    models = list(MODELS) if 'all' in args.models else args.models
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise ParameterError(f'--models must be all or among {", ".join(MODELS)}, got {unknown[0]!r}')
    if min(args.budgets) < 1 or args.tokens < 0:
        raise ParameterError(f'--budgets and --tokens must be positive, got {min(args.budgets)} and {args.tokens}')
    implementation = args.implementation or default_implementation(device)
    if device.type == 'cpu' and implementation != 'naive':
        raise ParameterError('a CPU has nothing to measure of --implementation triton: take --implementation naive')
    shapes = {name: MODELS[name]._replace(tokens=args.tokens or MODELS[name].tokens) for name in models}
    with torch.inference_mode():
        flops, bandwidth = matmul_flops(device, DTYPES[args.dtype]), copy_bandwidth(device)
        cases = [(name, shape, budget) for name, shape in shapes.items() for budget in args.budgets]
        rows = [{'model': name} | _measure(shape, budget, args.dtype, device, implementation, flops, bandwidth)
                for name, shape, budget in track(cases, 'measuring', console=Console(stderr=True), disable=args.json)]
    result = {
        'benchmark': 'kernel', 'device': device_name(device), 'versions': versions(), 'implementation': implementation,
        'dtype': args.dtype,
        'matmul_tflops': round(flops / 1e12, 3), 'copy_gb_per_s': round(bandwidth / 1e9, 1), 'rows': rows,
        'failed': [row for row in rows if not max(row['output_error'], row['importance_error']) <= TOLERANCE[args.dtype]],
    }
    if not args.json:
        _print(result)
    return result


def _measure(shape: Shape, budget: int, dtype: str, device: torch.device, implementation: str, flops: float,
             bandwidth: float) -> dict:
    layers = [_tensors(shape, budget, DTYPES[dtype], device) for _ in range(LAYERS)]
    scale = shape.head_dim ** -0.5
    output, importance = scored_attention(*layers[0], scale, implementation)
    right_output, right_importance = scored_attention(*layers[0], scale, 'naive')
    scored = median_ms(lambda tensors: scored_attention(*tensors, scale, implementation), layers, device)
    eager = median_ms(lambda tensors: scored_attention(*tensors, scale, 'naive'), layers, device)
    sdpa, kind = min((median_ms(attend, layers, device), kind)
                     for kind, attend in output_only(layers[0]).items())
    floor = _floor_ms(shape, budget, DTYPES[dtype].itemsize, flops, bandwidth)
    return shape._asdict() | {
        'budget': budget, 'scored_ms': round(scored, 5), 'sdpa_ms': round(sdpa, 5), 'sdpa': kind,
        'eager_ms': round(eager, 5), 'floor_ms': round(floor, 5), 'over_sdpa': round(scored / sdpa, 3),
        'of_floor': round(floor / scored, 3), 'output_error': _relative_error(output, right_output),
        'importance_error': _relative_error(importance, right_importance),
    }


def _tensors(shape: Shape, budget: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Query, key and value laid out as a model and the state's buffers give them."""
    keys = budget + shape.tokens
    query = torch.randn(1, shape.tokens, shape.q_heads, shape.head_dim, dtype=dtype, device=device).transpose(1, 2)
    key, value = (torch.randn(1, shape.kv_heads, keys + 64, shape.head_dim, dtype=dtype, device=device)[:, :, :keys]
                  for _ in range(2))
    return query, key, value


def _relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    return ((ours.double() - right.double()).norm() / right.double().norm()).item()


def _floor_ms(shape: Shape, budget: int, itemsize: int, flops: float, bandwidth: float) -> float:
    """What the device cannot beat: QK, PV and QK again at its matmul rate, or each tensor moved once at its copy rate."""
    pairs = shape.q_heads * (shape.tokens * budget + shape.tokens * (shape.tokens + 1) / 2)
    keys = budget + shape.tokens
    moved = itemsize * shape.head_dim * 2 * (shape.q_heads * shape.tokens + shape.kv_heads * keys) + 4 * shape.kv_heads * keys
    return max(6 * shape.head_dim * pairs / flops, moved / bandwidth) * 1e3


def _print(result: dict) -> None:
    table = narrow_table(f'scored attention ({result["implementation"]}, {result["dtype"]}), one layer, {result["device"]}; ms',
                         'model', 'B', 'this', 'SDPA', 'its kind', 'x SDPA', 'eager', 'floor', 'of\nfloor')
    for row in result['rows']:
        table.add_row(row['model'], str(row['budget']), f'{row["scored_ms"]:.4f}', f'{row["sdpa_ms"]:.4f}', row['sdpa'],
                      f'{row["over_sdpa"]:.2f}', f'{row["eager_ms"]:.3f}', f'{row["floor_ms"]:.4f}',
                      f'{row["of_floor"]:.0%}', style='red' if row in result['failed'] else None)
    console = Console()
    console.print(table)
    console.print(f'SDPA gives the output alone, by its fastest kind. Floor: {result["matmul_tflops"]} TFLOP/s of matmul and '
                  f'{result["copy_gb_per_s"]} GB/s of copy, measured in this run. Red: not the result of the naive twin.')
