"""Everything that only a GPU can say, in one go: the tests that need one, the kernel, whole steps, cameras in batches, tokens
with and without their graphs, and answers over hours; results as files."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

import statekv_ros
from statekv_ros.bench.hardware import parse_device, versions
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError

TESTS = ('test_scored_attention.py', 'test_scored_streams.py', 'test_paged_attention.py', 'test_state_update.py',
         'test_sync_free.py', 'test_graphs.py', 'test_graphs_together.py', 'test_recorded_decode.py', 'test_warmup.py')
_TRUE_SIZE = ('--random-weights', '--size', '448x448')
# Ten minutes and an hour of a memory in few bits, all of it on the device.
_DECODE = ('--steps', '600', '3600', '--device-cache-mb', '30000')
# Hours of a memory in few bits, most of it in main memory: model, steps and the two bounds in MB.
ANSWERS = (('InternVL3-8B', '600 3600', '4000', '20000'), ('InternVL3-1B', '600 3600 28800', '4000', '32000'))


def run(args: argparse.Namespace) -> dict:
    """Run each part as a process of its own, so that none takes the others down; one that hangs is ended.

    Writes into FOLDER: tests.txt, kernel.json, step-<model>.json, .png and .profile.txt, cameras-<model>.json,
    decode-<model>.json, answers-<model>.json, and summary.json.

    Returns:
        {'benchmark', 'device', 'versions', 'parts': [{name, exit_code (None: left out), timed_out, seconds, output}],
        'failed': names of parts that failed, hung or were left out}.

    Raises:
        ParameterError: no such device, or the folder is there already.
    """
    device, out = parse_device(args.device, 'and a smaller benchmark: statekv-bench step'), Path(args.out)
    if device.type == 'cpu':
        raise ParameterError('this is what only a GPU can say: on a CPU take statekv-bench step')
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise ParameterError(f'--out {args.out} is there already: name a new folder, so that no result is lost') from None
    deadline, parts = time.monotonic() + 60 * args.minutes, []
    for name, command, output in commands(args.models, args.device, out):
        parts.append(run_part(name, command, output, deadline, 60 * args.part_minutes, Console(stderr=True, quiet=args.json)))
    result = {'benchmark': 'gpu', 'device': device_name(device), 'versions': versions(), 'parts': parts,
              'failed': [part['name'] for part in parts if part['exit_code'] != 0]}
    (out / 'summary.json').write_text(json.dumps(result, indent=1))
    return result


def commands(models: list[str], device: str, out: Path) -> list[tuple[str, list[str], Path]]:
    """Name, command and file for its output of each part; JSON files get its last line alone."""
    bench = [sys.executable, '-m', 'statekv_ros.bench.cli']
    parts = []
    tests = Path(statekv_ros.__file__).parents[1] / 'test'
    if tests.is_dir():  # a wheel brings none
        files = [str(tests / name) for name in TESTS]
        parts.append(('tests', [sys.executable, '-m', 'pytest', '-ra', '-k', 'cuda or gpu', *files], out / 'tests.txt'))
    parts.append(('kernel', [*bench, 'kernel', '--device', device, '--json'], out / 'kernel.json'))
    for model in models:
        base = out / f'step-{model}'
        parts.append((f'step {model}', [*bench, 'step', '--random-weights', '--model', model, '--device', device, '--json',
                                        '--plot', f'{base}.png', '--profile', f'{base}.profile.txt'], Path(f'{base}.json')))
    for model in models:
        parts.append((f'cameras {model}', [*bench, 'cameras', *_TRUE_SIZE, '--model', model, '--prefill-policy', 'statekv(4096)',
                                           '--rounds', '20', '--device', device, '--json'], out / f'cameras-{model}.json'))
    for model in models:
        parts.append((f'decode {model}', [*bench, 'decode', *_TRUE_SIZE, '--model', model, *_DECODE, '--device', device,
                                          '--json'], out / f'decode-{model}.json'))
    for model, steps, device_mb, host_mb in ANSWERS:
        bounds = ['--device-cache-mb', device_mb, '--host-cache-mb', host_mb]
        parts.append((f'answers {model}', [*bench, 'answers', *_TRUE_SIZE, '--model', model, '--steps', *steps.split(), *bounds,
                                           '--device', device, '--json'], out / f'answers-{model}.json'))
    return parts


def run_part(name: str, command: list[str], output: Path, deadline: float, limit_s: float, console: Console) -> dict:
    """Run one part, unless the deadline (of `time.monotonic`) is over; past `limit_s` seconds it and all that it started is
    ended, and what it had printed is kept."""
    begun = time.monotonic()
    if begun >= deadline:
        console.print(f'[red]left out[/] {name}: no time left (--minutes)')
        return {'name': name, 'exit_code': None, 'timed_out': False, 'seconds': 0.0, 'output': ''}
    console.print(f'running {name}')
    part = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if output.suffix == '.txt' else None,
                            text=True, start_new_session=True)
    try:
        printed, timed_out = part.communicate(timeout=limit_s)[0], False
    except subprocess.TimeoutExpired:
        os.killpg(part.pid, signal.SIGKILL)
        printed, timed_out = part.communicate()[0], True
    except BaseException:   # Ctrl-C reaches this process alone
        os.killpg(part.pid, signal.SIGKILL)
        raise
    lines = printed.splitlines(keepends=True)
    output.write_text(''.join(lines[-1:] if output.suffix == '.json' and not timed_out else lines))
    seconds = round(time.monotonic() - begun, 1)
    outcome = f'[red]hung, ended[/] {name}' if timed_out else f'{"[red]failed[/]" if part.returncode else "done"} {name}'
    console.print(f'{outcome} after {seconds} s{" (--part-minutes)" * timed_out}: {output}')
    return {'name': name, 'exit_code': part.returncode, 'timed_out': timed_out, 'seconds': seconds, 'output': output.name}
