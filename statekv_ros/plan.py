"""`statekv-plan`: what a configuration needs in memory, before anything is loaded."""
import argparse
import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from statekv_ros.bench.chips import BOARDS
from statekv_ros.errors import ParameterError, StateKVError
from statekv_ros.terminal import narrow_table

if TYPE_CHECKING:   # torch and Transformers take seconds to import: --help comes before them
    from statekv_ros.backbones.size import ModelSize
    from statekv_ros.memory.capacity import Plan


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog='statekv-plan', description=__doc__)
    parser.add_argument('--model', default='all', help='checkpoint directory, or name of a published one; "all": every '
                        'published one, from its config alone')
    parser.add_argument('--fps', type=float, default=1.0, help='frames watched per second and camera')
    parser.add_argument('--budget', type=int, default=4096, help='B of statekv in tokens')
    parser.add_argument('--policy', default='statekv', help='prefill policy: statekv, window(R), rekv(n), full or none')
    parser.add_argument('--hours', type=float, default=8.0)
    parser.add_argument('--cameras', type=int, default=1)
    parser.add_argument('--frame-size', default='640x480', metavar='WIDTHxHEIGHT', help='of the camera')
    parser.add_argument('--max-frame-pixels', type=int, default=0, help='as the node\'s parameter')
    parser.add_argument('--device-cache-mb', type=int, default=0, help='as the node\'s parameter')
    parser.add_argument('--host-cache-mb', type=int, default=0, help='as the node\'s parameter, but that 0 is the default')
    parser.add_argument('--disk-cache-gb', type=float, default=20.0, help='as the node\'s parameter')
    parser.add_argument('--thumbnail-width', type=int, default=240, help='as the node\'s parameter')
    parser.add_argument('--thumbnail-quality', type=int, default=75, help='as the node\'s parameter')
    parser.add_argument('--read-tokens', type=int, default=8192, metavar='N', help='that answers read, n of sparse(n)')
    parser.add_argument('--weights', default='auto', help='auto, as_stored, int8 or int4, as the node\'s parameter; of published '
                        'models as they lie on a GPU')
    parser.add_argument('--detailed-format', default='bf16', metavar='FORMAT', help='as the node\'s parameter')
    parser.add_argument('--device', choices=BOARDS, default='AGX-Orin', help='whose memory bandwidth tells what a token of '
                        'an answer takes at least')
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line of output')
    args = parser.parse_args(argv)
    try:
        plans = _plans(args)
    except StateKVError as error:
        print(f'statekv-plan: {error}', file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({plan.size.name: _values(plan) | _tiers(plan, args) for plan in plans}))
    else:
        _show(plans, args)
    return 0


def _plans(args: argparse.Namespace) -> 'list[Plan]':
    for name in ('fps', 'hours', 'cameras', 'read_tokens', 'disk_cache_gb'):
        if not 0 < getattr(args, name) < float('inf'):
            raise ParameterError(f'--{name.replace("_", "-")} must be a positive number, got {getattr(args, name)}')
    for name, least, most in (('thumbnail_width', 0, 1920), ('thumbnail_quality', 1, 100)):
        if not least <= getattr(args, name) <= most:
            raise ParameterError(f'--{name.replace("_", "-")} must be {least} to {most}, got {getattr(args, name)}')
    from statekv_ros.memory import parse_prefill_policy
    from statekv_ros.memory.capacity import make_plan
    policy = parse_prefill_policy(f'statekv({args.budget})' if args.policy == 'statekv' else args.policy)
    return [make_plan(size, policy, args.fps, args.cameras, args.hours, args.device_cache_mb * 10**6,
                      detailed_format=args.detailed_format)
            for size in _sizes(args)]


def _sizes(args: argparse.Namespace) -> 'list[ModelSize]':
    from statekv_ros.backbones.checkpoint import FRAME_PIXELS
    from statekv_ros.backbones.published import PUBLISHED
    from statekv_ros.backbones.weights import resolved
    height, width = _frame_size(args)
    weights = resolved(args.weights)
    rows = [row for name, row in PUBLISHED.items() if args.model in ('all', name, row.hub_id)]
    if rows:
        return [row.size(height, width, args.max_frame_pixels or FRAME_PIXELS[1], weights=weights) for row in rows]
    from statekv_ros.backbones import load_backbone
    return [load_backbone(args.model, max_frame_pixels=args.max_frame_pixels, weights=weights).size(height, width)]


def _frame_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width."""
    try:
        width, height = (int(side) for side in args.frame_size.split('x'))
    except ValueError as error:
        raise ParameterError(f'--frame-size must be WIDTHxHEIGHT in pixels, got {args.frame_size!r}') from error
    return height, width


def _picture(args: argparse.Namespace) -> int:
    """Bytes of a step's picture, about."""
    from statekv_ros.thumbnails import likely_bytes
    return likely_bytes(*_frame_size(args), args.thumbnail_width, args.thumbnail_quality) if args.thumbnail_width else 0


def _values(plan: 'Plan') -> dict:
    return {'step_tokens': plan.size.step_tokens, 'kv_bytes_per_token': plan.size.kv_bytes_per_token,
            'detailed_bytes_per_token': plan.detailed_bytes_per_token,
            'weights_bytes': plan.weights_bytes, 'state_bytes': plan.state_bytes, 'workspace_bytes': plan.workspace_bytes,
            'reserve_bytes': plan.reserve_bytes,
            'detailed_bytes_per_hour': plan.detailed_bytes_per_hour, 'detailed_bytes': plan.detailed_bytes,
            'index_bytes_per_hour': plan.index_bytes_per_hour, 'index_bytes': plan.index_bytes,
            'total_bytes': plan.total_bytes}


def _tiers(plan: 'Plan', args: argparse.Namespace) -> dict:
    """What lies below the device, how fast it fills, and what a pass of an answer loads. Hours are of watching until a tier is
    full, each from the beginning; None: what it holds is not bounded."""
    from statekv_ros.store.hours import pictures_per_hour, tier_hours
    picture = _picture(args)
    hours = tier_hours(plan, args.device_cache_mb * 10**6, args.host_cache_mb * 10**6, round(args.disk_cache_gb * 1e9), picture)
    return {
        'disk_bytes_per_hour': hours.disk_bytes_per_hour, 'disk_written_bytes_per_s': hours.disk_written_bytes_per_s,
        'picture_bytes': picture, 'pictures_bytes_per_hour': pictures_per_hour(plan, picture),
        'hours_on_device': hours.device, 'hours_in_main_memory': hours.host, 'hours_on_disk': hours.disk,
        'bytes_read_per_pass': (read := round(args.read_tokens * plan.detailed_bytes_per_token + _scored(plan, args.read_tokens))),
        'ms_per_token_at_least': (plan.size.decoder_bytes + read) / BOARDS[args.device].gb_per_s / 1e6}


def _scored(plan: 'Plan', read_tokens: int) -> float:
    """Bytes of the index that a pass goes through: all of it, or its leaves, strays, the pages of leaves that it opens, in 4 bits,
    and pages not sorted yet."""
    from statekv_ros.memory.answering.candidates import leaves_to_open
    from statekv_ros.memory.detailed.cache import PAGE_TOKENS
    from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
    from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, STRAYS
    from statekv_ros.memory.detailed.pages import page_lengths
    size = plan.size
    pages = plan.hours * 3600 / size.frames_per_step * len(page_lengths(size.step_tokens, PAGE_TOKENS))
    entry = size.layers * size.kv_heads * INDEXES[DEFAULT_INDEX].entry_width(size.head_dim)
    opened = leaves_to_open(read_tokens // PAGE_TOKENS) * LEAF
    return min(entry * (opened / 2 + 2 * (CHAPTER + pages / LEAF + pages * STRAYS / CHAPTER)),
               plan.index_bytes / plan.cameras)


def _show(plans: 'list[Plan]', args: argparse.Namespace) -> None:
    from statekv_ros.backbones.published import PUBLISHED
    short = {row.hub_id: name for name, row in PUBLISHED.items()}       # --model takes these too
    console = Console(highlight=False)
    console.print(f'{plans[0].policy}, {args.cameras} camera(s) of {args.frame_size}, {args.fps:g} frames/s each, '
                  f'{args.hours:g} h, {args.detailed_format} with its index, weights {args.weights}. GB are 10^9 bytes.\n')
    table = narrow_table('', 'model', 'tokens\n/ step', 'kB\n/ token', 'weights\nGB', 'state\nGB', 'work-\nspace', 'cache\nGB / h',
                         f'cache,\n{args.hours:g} h', 'total\nGB')
    for plan in plans:
        size = plan.size
        table.add_row(short.get(size.name, size.name), str(size.step_tokens), f'{plan.detailed_bytes_per_token / 1e3:,.1f}',
                      *(f'{part / 1e9:,.2f}' for part in (
                          plan.weights_bytes, plan.state_bytes, plan.workspace_bytes + plan.reserve_bytes)),
                      *(f'{part / 1e9:,.1f}' for part in (
                          plan.detailed_bytes_per_hour + plan.index_bytes_per_hour, plan.detailed_bytes + plan.index_bytes,
                          plan.total_bytes)))
    console.print(table)
    picture = _picture(args)
    about = f'; pictures are about {picture / 1e3:.1f} kB a step, going by real footage' if picture else ''
    console.print(f'\nTiers: hours that {args.disk_cache_gb:g} GB of disk hold, what it is written, what it takes an hour; what a '
                  f'pass of an answer over {args.hours:g} h reads with sparse({args.read_tokens}), and what a token then takes '
                  f'at least on {args.device} ({BOARDS[args.device].gb_per_s} GB/s), with all it reads on the device{about}.\n')
    table = narrow_table('', 'model', 'index\nGB / h', 'hours\non disk', 'MB / s\nwritten', 'disk\nGB / h', 'pictures\nMB / h',
                         'GB\n/ pass', 'ms\n/ token')
    for plan in plans:
        tiers = _tiers(plan, args)
        table.add_row(short.get(plan.size.name, plan.size.name), f'{plan.index_bytes_per_hour / 1e9:.2f}',
                      f'{tiers["hours_on_disk"]:.1f}', f'{tiers["disk_written_bytes_per_s"] / 1e6:.1f}',
                      f'{tiers["disk_bytes_per_hour"] / 1e9:.1f}', f'{tiers["pictures_bytes_per_hour"] / 1e6:.1f}',
                      f'{tiers["bytes_read_per_pass"] / 1e9:.2f}', f'{tiers["ms_per_token_at_least"]:.1f}')
    console.print(table)


if __name__ == '__main__':
    sys.exit(main())
