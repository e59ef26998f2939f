"""`statekv-memory info|export|check FOLDER`: look into a memory on disk, also while the node writes it."""
import argparse
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from statekv_ros.errors import StoreError
from statekv_ros.store.reader import StoreReader
from statekv_ros.terminal import narrow_table

DAMAGED, FAILED, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 0, 1 where something is damaged, 2 for a bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog='statekv-memory', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    info = commands.add_parser('info', help='model, cameras, steps, hours and bytes')
    info.set_defaults(run=_info)
    info.add_argument('--json', action='store_true', help='print one JSON object as the last line of output')
    export = commands.add_parser('export', help='write its steps as safetensors files')
    export.set_defaults(run=_export)
    check = commands.add_parser('check', help='compare everything with its checksums')
    check.set_defaults(run=_check)
    for command in (info, export, check):
        command.add_argument('folder', type=Path, help='the node\'s parameter "memory_dir"')
    export.add_argument('out', type=Path, help='folder to create')
    export.add_argument('--camera', help='default: all')
    export.add_argument('--steps-per-file', type=int, default=64, metavar='N', help='default: %(default)s')
    args = parser.parse_args(argv)
    try:
        with StoreReader.look(args.folder) as store:
            return args.run(store, args)
    except StoreError as error:
        print(f'statekv-memory {args.command}: {error}', file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f'statekv-memory {args.command}: interrupted', file=sys.stderr)
        return INTERRUPTED


def describe(store: StoreReader) -> dict:
    """What a memory holds, as plain values; `seconds` is the time that a camera's headers span (key `first_stamp_ns`)."""
    cameras = {}
    for camera in store.cameras():
        steps = [(step, header) for step, header in store.steps(camera) if step >= 0]      # no prefix
        stamps = [header[key] for _, header in steps for key in ('first_stamp_ns', 'last_stamp_ns') if key in header]
        cameras[camera] = {'steps': len(steps), 'first_step': steps[0][0] if steps else None,
                           'last_step': steps[-1][0] if steps else None, 'bytes': store.bytes(camera),
                           'seconds': (max(stamps) - min(stamps)) / 1e9 if stamps else None}
    return {'folder': str(store.folder), 'identity': store.identity, 'file_bytes': store.file_bytes(), 'cameras': cameras}


def export(store: StoreReader, out: Path, camera: str | None = None, steps_per_file: int = 64) -> list[str]:
    """Write `<camera>-<first step>.safetensors` into a new folder: tensors named `<step>.<part>`, headers in the metadata.

    Returns:
        A line for each step that is damaged and was left out.

    Raises:
        StoreError: nothing to export, an unknown camera, a bad number, or a folder that exists or cannot be written.
    """
    cameras = store.cameras()
    if steps_per_file < 1:
        raise StoreError(f'--steps-per-file must be at least 1, got {steps_per_file}')
    if camera is not None and camera not in cameras:
        raise StoreError(f'{store.folder} has no camera {camera!r}; it has {", ".join(cameras) or "none"}')
    wanted = {name: list(store.records(name)) for name in cameras if camera in (None, name)}
    if not any(wanted.values()):
        raise StoreError(f'{store.folder} holds no steps: there is nothing to export')
    damaged: list[str] = []
    try:
        out.mkdir(parents=True)
        for name, steps in wanted.items():
            for first in range(0, len(steps), steps_per_file):
                _write(store, name, steps[first:first + steps_per_file], out, damaged)
    except FileExistsError as error:
        raise StoreError(f'{out} exists: choose another folder') from error
    except OSError as error:
        raise StoreError(f'{out} cannot be written: {error}') from error
    return damaged


def _write(store: StoreReader, camera: str, steps: list[int], out: Path, damaged: list[str]) -> None:
    import torch        # the other commands do without
    from safetensors.torch import save_file
    tensors, headers = {}, {}
    for step in steps:
        try:
            loaded = store.load_step(camera, step)
        except StoreError as error:
            damaged.append(str(error))
            continue
        if loaded is None:      # the node forgot it meanwhile
            continue
        headers[str(step)] = json.dumps(loaded[0])
        tensors.update({f'{step}.{name}': torch.tensor(list(part), dtype=torch.uint8) if isinstance(part, bytes) else part
                        for name, part in loaded[1].items()})
    if headers:
        # A camera's name may hold what a file's name may not.
        stem = re.sub(r'[^\w.-]', '_', camera)
        save_file(tensors, out / f'{stem}-{steps[0]:08d}.safetensors', {'camera': camera, **headers})


def _info(store: StoreReader, args: argparse.Namespace) -> int:
    held = describe(store)
    if args.json:
        print(json.dumps(held))
        return 0
    table = narrow_table(f'{held["folder"]}, {held["file_bytes"] / 1e6:,.1f} MB on disk (10^6 bytes)', 'camera', 'steps', 'first',
                         'last', 'hours', 'MB')
    for name, camera in held['cameras'].items():
        hours = '' if camera['seconds'] is None else f'{camera["seconds"] / 3600:.2f}'
        table.add_row(name, f'{camera["steps"]:,}', str(camera['first_step']), str(camera['last_step']), hours,
                      f'{camera["bytes"] / 1e6:,.1f}')
    console = Console()
    console.print(table)
    for name, value in held['identity'].items():
        console.print(f'{name}: {value}', markup=False, highlight=False)
    return 0


def _export(store: StoreReader, args: argparse.Namespace) -> int:
    return _report(export(store, args.out, args.camera, args.steps_per_file), f'{args.out}: written')


def _check(store: StoreReader, args: argparse.Namespace) -> int:
    return _report(store.check(), f'{args.folder}: whole')


def _report(damaged: list[str], fine: str) -> int:
    print('\n'.join(damaged) or fine)
    return DAMAGED if damaged else 0


if __name__ == '__main__':
    sys.exit(main())
