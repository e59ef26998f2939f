"""Hours of watching at simulated time: what frame steps and answers cost as the memory grows, and how large it is.

A made-up patrol is rendered and watched as fast as the machine can, and the same questions are asked again and again. A
machine's speed drifts in the minutes that this takes by more than the effect we look for. So a second, young memory watches
the last fifteen minutes too: its minutes 5-15 are the old one's last ten, and both are asked in turn.
"""
import argparse
import contextlib
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from statekv_ros.backbones import Backbone, load_backbone
from statekv_ros.bench.hardware import versions
from statekv_ros.bench.sizes import parse_size
from statekv_ros.bench.tiered import TieredMemory, check_bounds
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError
from statekv_ros.memory import parse_answer_policy
from statekv_ros.patrol.render import render
from statekv_ros.patrol.world import make_patrol
from statekv_ros.terminal import narrow_table

WINDOW_S, EARLY_S = 600, 300        # windows of ten minutes, the first of which begins after five
YOUNG_S = EARLY_S + WINDOW_S        # so long before the end the young memory joins
SLOPE_FROM_S = 1800
BESIDE_EVERY = 10                   # rounds
QUESTIONS = ('what is in view?', 'which room are you in?', 'how many balls did you see?', 'what colour was the first ball?',
             'did you see a red box?')
_MAX_TOKENS, _SLICE_TOKENS = 8, 4
_NS = 10**9


def run(args: argparse.Namespace) -> dict:
    """Watch and ask.

    Returns:
        {'windows': [{'from_s', 'to_s', 'step_ms_p50', 'detailed_bytes', 'rss_bytes', 'answers': {policy: {...}}}], 'ratios':
        {policy: {...}}, 'step_ratio', 'rss_mb_per_hour', ...}. A ratio is the last ten minutes over minutes 5-15: `over_early`
        of the same memory, `in_turn` of the young one, `as_long` of those answers of both, asked in turn, that have as many tokens:
        a memory that knows other things is not dearer for it. RSS is main memory of the process; its slope leaves out the first half
        hour, and the last fifteen minutes, when the process holds the young memory too; windows tell of both.
        `peak_bytes` is the most that the detailed cache ever took, by tier. `disk_planned_bytes` is what the planner says that
        the steps held take of the file, `disk_bytes`.

    Raises:
        ParameterError, PolicyError: an argument that cannot work.
    """
    policies, beside = ([str(parse_answer_policy(text)) for text in texts] for texts in (args.answer_policy, args.beside))
    for name in ('hours', 'rate', 'every'):
        if not 0 < getattr(args, name) < float('inf'):
            raise ParameterError(f'--{name} must be a positive number, got {getattr(args, name)}')
    seconds = args.hours * 3600
    if seconds < EARLY_S + 2 * WINDOW_S:
        raise ParameterError(f'--hours must be at least {(EARLY_S + 2 * WINDOW_S) / 3600:.3f}, so that the last ten minutes '
                             f'are not minutes 5-15, got {args.hours:g}')
    check_bounds(args)
    size = parse_size('--size', args.size)
    if args.device in ('auto', 'cpu'):
        torch.set_num_threads(1)    # small matrices: more threads only add noise
    backbone = load_backbone(args.model, device=args.device, weights=args.weights)
    with contextlib.ExitStack() as folders:
        return _watch(args, backbone, seconds, size, policies, beside, folders)


def _watch(args: argparse.Namespace, backbone: Backbone, seconds: float, size: tuple[int, int], policies: list[str],
           beside: list[str], folders: contextlib.ExitStack) -> dict:
    old, young = (_Watch(backbone, args, folders) for _ in range(2))
    steps, joins = int(seconds * args.rate), int((seconds - YOUNG_S) * args.rate)
    asked_s, rounds = 0.0, 0
    footage = _footage(steps, args.rate, args.seed, backbone.frames_per_step, size)
    shown = track(footage, 'watching', steps, console=Console(stderr=True), disable=args.json)
    for number, (time_s, frames) in enumerate(shown):
        watches = [old] if number < joins else [old, young]
        for watch in watches:
            watch.step(time_s, frames)
        if time_s - asked_s >= args.every:
            asked_s, rounds = time_s, rounds + 1
            for watch in watches:
                watch.ask(time_s, policies + beside * (rounds % BESIDE_EVERY == 0))
    result = {
        'benchmark': 'hours', 'model': args.model, 'hours': args.hours, 'steps_per_second': args.rate, 'steps': steps,
        'prefill_policy': str(old.stream.prefill_policy), 'device_cache_bytes': round(args.device_cache_mb * 1e6),
        'host_cache_bytes': round(args.host_cache_mb * 1e6), 'disk_cache_bytes': round(args.disk_cache_gb * 1e9),
        'detailed_format': args.detailed_format, 'device': device_name(backbone.device), 'versions': versions(),
        **_summary(old, young, seconds, policies + beside)}
    if not args.json:
        _print(result)
    return result


class _Rows:
    """What was measured, a row of numbers each time, its simulated second first: as objects, what is known of a step would be a
    good part of what the process is found to grow by."""

    def __init__(self, columns: int):
        self._columns, self._numbers = columns, array('d')

    def add(self, *row: float) -> None:
        self._numbers.extend(row)

    def cut(self, begin: float, end: float) -> np.ndarray:
        """Rows [n, columns] from second `begin` until `end`."""
        rows = np.frombuffer(self._numbers).reshape(-1, self._columns)
        return rows[(begin <= rows[:, 0]) & (rows[:, 0] < end)]


class _Watch(TieredMemory):
    """One memory, and what was measured of it.

    Attributes:
        step_ms: of frame steps; sizes: bytes of detailed cache and process; answers: by policy, first token ms, total ms and
            tokens.
    """

    def __init__(self, backbone: Backbone, args: argparse.Namespace, folders: contextlib.ExitStack):
        super().__init__(backbone, args, folders)
        self.step_ms, self.sizes = _Rows(2), _Rows(3)
        self.answers: dict[str, _Rows] = defaultdict(lambda: _Rows(4))

    def step(self, time_s: float, frames: list[tuple[int, np.ndarray]]) -> None:
        self.step_ms.add(time_s, self.watch(frames).total_ms)

    def ask(self, time_s: float, policies: Sequence[str]) -> None:
        """All questions under each policy, decoded in slices as the node does."""
        self.sizes.add(time_s, self.stream.detailed_bytes, _rss_bytes())
        for question in QUESTIONS:
            for policy in policies:
                asked = time.perf_counter()
                answering = self.stream.begin_answer(question, policy, max_tokens=_MAX_TOKENS)
                begun = time.perf_counter()
                while not answering.advance(_SLICE_TOKENS):
                    pass
                answer = answering.result()
                begin_ms, total_ms = ((until - asked) * 1e3 for until in (begun, time.perf_counter()))
                self.answers[policy].add(time_s, begin_ms + answer.first_token_ms, total_ms, answer.answer_tokens)

    def window(self, begin: float, end: float) -> dict:
        """Medians and 90th percentiles of what was measured from second `begin` until `end`."""
        answers = {policy: rows.cut(begin, end) for policy, rows in self.answers.items()}
        sizes = self.sizes.cut(begin, end)
        return {'from_s': begin, 'to_s': end, 'step_ms_p50': round(float(np.median(self.step_ms.cut(begin, end)[:, 1])), 4),
                'detailed_bytes': int(sizes[-1, 1]) if len(sizes) else None,
                'rss_bytes': int(sizes[-1, 2]) if len(sizes) else None,
                'answers': {policy: _of_answers(rows) for policy, rows in answers.items() if len(rows)}}


def _footage(steps: int, rate: float, seed: int, each: int,
             size: tuple[int, int]) -> Iterator[tuple[float, list[tuple[int, np.ndarray]]]]:
    """(second, [(stamp in ns, frame)] of a frame step) of one endless patrol; no two frames are alike."""
    patrol = make_patrol(steps, np.random.default_rng(seed))
    for number, step in enumerate(patrol.steps):
        shown = render(step, np.random.default_rng([seed, number]), *size)
        stamps = (_NS + round((number + part / each) / rate * _NS) for part in range(each))
        yield number / rate, [(stamp, shown[part % len(shown)]) for part, stamp in enumerate(stamps)]


def _of_answers(rows: np.ndarray) -> dict:
    first, total, tokens = rows[:, 1], rows[:, 2], rows[:, 3]
    return {'n': len(rows), 'tokens_mean': round(float(tokens.mean()), 3), **{
        f'{name}_ms_p{percent}': round(float(np.percentile(ms, percent)), 3)
        for name, ms in (('first_token', first), ('total', total)) for percent in (50, 90)}}


def _summary(old: _Watch, young: _Watch, seconds: float, policies: Sequence[str]) -> dict:
    begins = [*np.arange(EARLY_S, seconds - 2 * WINDOW_S + 1, WINDOW_S).tolist(), seconds - WINDOW_S]
    windows = [old.window(begin, begin + WINDOW_S) for begin in begins]
    late, in_turn = windows[-1], young.window(seconds - WINDOW_S, seconds)
    ratios = {policy: {**{name: _ratios(late['answers'].get(policy), other['answers'].get(policy))
                          for name, other in (('over_early', windows[0]), ('in_turn', in_turn))},
                       'as_long': _as_long(*(watch.answers[policy].cut(seconds - WINDOW_S, seconds) for watch in (old, young)))}
              for policy in policies}
    return {'windows': windows, 'young': in_turn, 'ratios': ratios,
            'step_ratio': {name: round(float(late['step_ms_p50'] / other['step_ms_p50']), 4)
                           for name, other in (('over_early', windows[0]), ('in_turn', in_turn))},
            'rss_mb_per_hour': _rss_slope(old.sizes, seconds - YOUNG_S), 'peak_bytes': dict(old.peak_bytes),
            'disk_bytes': old.store.file_bytes() if old.store else 0, 'disk_planned_bytes': old.planned_disk_bytes(),
            'steps_below_device': old.stream.detailed.steps_below,
            'forgotten_frames': old.stream.forgotten_frames, 'detailed_tokens': old.stream.detailed_tokens}


def _rss_slope(sizes: _Rows, joined_s: float) -> float | None:
    """MB an hour that the process grew by, from the half hour until the young memory joined; None where that is too short.

    Args:
        sizes: as of `_Watch`.
    """
    settled = sizes.cut(SLOPE_FROM_S, joined_s)
    return round(float(np.polyfit(settled[:, 0] / 3600, settled[:, 2] / 1e6, 1)[0]), 3) if len(settled) > 2 else None


def _ratios(late: dict | None, early: dict | None) -> dict | None:
    if late is None or early is None:
        return None
    return {name: round(late[name] / early[name], 4) for name in late if '_ms_' in name}


def _as_long(late: np.ndarray, young: np.ndarray) -> dict | None:
    """Ratios over those answers, a row for each question asked in turn, that have as many tokens, and how many these are."""
    alike = late[:, 3] == young[:, 3]
    if not alike.any():
        return None
    late, young = _of_answers(late[alike]), _of_answers(young[alike])
    return {'n': late['n'], **_ratios(late, young)}


def _rss_bytes() -> int:
    """Main memory that the process takes, without what it has mapped of files, which the system takes back where it wants it; 0
    where the system does not say."""
    try:
        with open('/proc/self/status', encoding='ascii') as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith('RssAnon'))
    except (OSError, StopIteration):
        return 0


def _print(result: dict) -> None:
    table = narrow_table(f'{result["hours"]:g} h, {result["steps"]} steps on {result["device"]}, model {result["model"]}; ms and MB',
                         'answers', 'hour', 'step', 'detailed', 'RSS', 'n', 'first token,\np50 / p90', 'total,\np50 / p90')
    windows = result['windows']
    for window in [*windows[:-1:max(1, len(windows) // 8)], windows[-1]]:
        size = [f'{window[key] / 1e6:.1f}' if window[key] is not None else '' for key in ('detailed_bytes', 'rss_bytes')]
        head = [f'{window["to_s"] / 3600:.2f}', f'{window["step_ms_p50"]:.2f}', *size]
        for policy, row in window['answers'].items():
            table.add_row(policy, *head, str(row['n']), *(f'{row[f"{name}_ms_p50"]:.1f} / {row[f"{name}_ms_p90"]:.1f}'
                                                          for name in ('first_token', 'total')))
            head = [''] * len(head)
    console = Console()
    console.print(table)
    console.print(f'last ten minutes over minutes 5-15: steps {result["step_ratio"]}; answers {result["ratios"]}')
    console.print(f'RSS {result["rss_mb_per_hour"]} MB an hour after the first half hour; at most '
                  + ', '.join(f'{tier} {size / 1e6:.1f} MB' for tier, size in result['peak_bytes'].items())
                  + f'; on disk {result["disk_bytes"] / 1e6:.1f} MB, planned {result["disk_planned_bytes"] / 1e6:.1f}; '
                  f'{result["steps_below_device"]} steps below the device')
