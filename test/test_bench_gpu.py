"""The parts of `statekv-bench gpu`: one that hangs is ended with all that it started, and the next one runs."""
import sys
import time
from io import StringIO

import pytest
from rich.console import Console

from statekv_ros.bench.gpu import run_part

HANGS = '''
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print(child.pid, flush=True)
time.sleep(600)
'''


@pytest.mark.timeout(60)
def test_a_part_that_hangs_is_ended_and_named_and_what_it_printed_is_kept(tmp_path):
    told, begun = StringIO(), time.monotonic()
    part = run_part('kernel', [sys.executable, '-c', HANGS], tmp_path / 'kernel.json', begun + 600, 2.0,
                    Console(file=told, width=200))
    assert part['timed_out'] and part['exit_code'] != 0 and time.monotonic() - begun < 40
    assert 'hung, ended kernel' in told.getvalue() and '--part-minutes' in told.getvalue()
    child = int((tmp_path / 'kernel.json').read_text())
    assert not alive(child)


def test_a_part_that_ends_by_itself_is_told_by_its_exit_code(tmp_path):
    console = Console(file=StringIO())
    for code in (0, 3):
        part = run_part('step', [sys.executable, '-c', f'print(1); print(2); raise SystemExit({code})'], tmp_path / 'step.json',
                        time.monotonic() + 600, 60.0, console)
        assert (part['exit_code'], part['timed_out']) == (code, False) and (tmp_path / 'step.json').read_text() == '2\n'
    late = run_part('step', ['false'], tmp_path / 'none.json', time.monotonic() - 1, 60.0, console)
    assert late['exit_code'] is None and not (tmp_path / 'none.json').exists()


def alive(pid: int) -> bool:
    end = time.monotonic() + 10     # the kernel takes a moment
    while time.monotonic() < end:
        try:
            if open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] == 'Z':
                return False
        except FileNotFoundError:
            return False
        time.sleep(.05)
    return True
