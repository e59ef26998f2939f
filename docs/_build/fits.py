"""README's table of what fits where, counted: `python docs/_build/fits.py` writes it anew."""
import re
import sys
from argparse import Namespace
from pathlib import Path

from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.backbones.weights import AS_STORED
from statekv_ros.bench import floor
from statekv_ros.bench.chips import BOARDS
from statekv_ros.memory import parse_prefill_policy
from statekv_ros.memory.capacity import make_plan
from statekv_ros.store.hours import tier_hours
from statekv_ros.thumbnails import likely_bytes

README = Path(__file__).resolve().parents[2] / 'README.md'
BLOCK = re.compile(r'(?<=<!-- fits -->\n).*?(?=<!-- /fits -->)', re.DOTALL)
MODELS = 'Qwen3-VL-2B', 'Qwen3-VL-4B', 'Qwen3-VL-8B', 'InternVL3-2B', 'InternVL3-8B'
SHOWN = {'Orin-NX': 'Orin NX', 'AGX-Orin': 'AGX Orin', 'AGX-Thor': 'AGX Thor', 'RTX-4090': 'RTX 4090', 'H100': 'H100'}
BUDGET, WIDTH, HEIGHT = 4096, 640, 480
DEVICE, HOST, DISK = 8, 32, 200     # GB
SHARE = 0.75        # of a board's memory: the rest is for the robot, the newest steps and the index
PICTURE = 240, 75   # width and quality, the node's defaults


def counted() -> list[dict]:
    """Each model's rows of `statekv-bench floor`; what they count is the same on every board."""
    arguments = Namespace(device_name='AGX-Orin', models=list(MODELS), budget=BUDGET, read_tokens=8192,
                          size=f'{WIDTH}x{HEIGHT}', json=True)
    return floor.run(arguments)['rows']


def table(rows: list[dict]) -> str:
    """Markdown; takes what `counted` returns."""
    boards = [f'{name}, {BOARDS[board].memory_gb:g} GB' for board, name in SHOWN.items()]
    head = ['model', 'weights, GB: bf16, int4', f'hours in {DEVICE}, {HOST}, {DISK} GB', *boards]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [head, ['---'] * len(head), *map(_row, rows)]) + '\n'


def _row(row: dict) -> list[str]:
    exact, small = (_plan(row['model'], weights) for weights in (AS_STORED, 'int4'))
    hours = tier_hours(exact, DEVICE * 10**9, HOST * 10**9, DISK * 10**9, likely_bytes(HEIGHT, WIDTH, *PICTURE))
    return [row['model'], f'{exact.weights_bytes / 1e9:.1f}, {small.weights_bytes / 1e9:.1f}',
            f'{hours.device:.1f}, {hours.host:.1f}, {hours.disk:.0f}', *(_cell(row, exact, small, board) for board in SHOWN)]


def _plan(model: str, weights: str):
    return make_plan(PUBLISHED[model].size(HEIGHT, WIDTH, weights=weights), parse_prefill_policy(f'statekv({BUDGET})'), 1.0,
                     detailed_format='int4')


def _cell(row: dict, exact, small, board: str) -> str:
    """Milliseconds of a frame step at least; or that it takes weights in 4 bits, or does not fit at all."""
    rates, room = BOARDS[board], SHARE * BOARDS[board].memory_gb * 1e9
    if exact.at_start_bytes > room:
        return 'int4' if small.at_start_bytes <= room else 'no'
    operations = (row['vision_tflop'] + row['text_tflop']) / rates.tflops * 1e3
    return f'{max(operations, row["moved_gb"] / rates.gb_per_s * 1e3):.0f} ms'


if __name__ == '__main__':
    text, blocks = BLOCK.subn(lambda _: table(counted()), README.read_text())
    if blocks != 1:
        sys.exit(f'{README}: one block between <!-- fits --> and <!-- /fits --> was expected, got {blocks}')
    README.write_text(text)
