"""`--help` of every command comes before the libraries that take seconds to import, so does a refusal."""
import os
import subprocess
import sys

import pytest

from test_packaging import PYPROJECT

SCRIPTS = dict(PYPROJECT['project']['scripts'])
# What takes long, or starts threads: torch and all that brings it along, ROS, drawing, bags.
HEAVY = ('torch', 'transformers', 'triton', 'rclpy', 'matplotlib', 'rosbags', 'jinja2', 'nicegui')
# A console script as pip writes it, and what it has imported when it ends.
RUN = '''
import importlib, sys
sys.argv = sys.argv[1:]
module, function = sys.argv.pop().split(':')
try:
    code = getattr(importlib.import_module(module), function)()
except SystemExit as error:
    code = error.code
print('imported:', *(name for name in {heavy} if name in sys.modules))
sys.exit(code)
'''.format(heavy=HEAVY)
COMMANDS = [[name] for name in SCRIPTS] + [
    ['statekv-bag', 'make'], ['statekv-bag', 'info'], ['statekv-bag', 'play'], ['statekv-patrol', 'make'],
    *(['statekv-bench', name] for name in ('step', 'cameras', 'questions', 'hours', 'kernel', 'gpu', 'aot', 'transport'))]


def run(command: list[str], argument: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', RUN, *command, argument, SCRIPTS[command[0]]], capture_output=True, text=True,
                          timeout=60, env=os.environ | {'COLUMNS': '100'})


def test_choices_that_benchmarks_offer_are_those_that_there_are():
    from statekv_ros.bench import arguments, cli, hardware, kernel
    from statekv_ros.kernels import fitness
    from statekv_ros.memory import graphs
    assert arguments.DTYPES == tuple(hardware.DTYPES)
    assert arguments.CUDA_GRAPH == graphs.CUDA_GRAPH
    assert arguments.IMPLEMENTATIONS == fitness.IMPLEMENTATIONS
    assert arguments.KERNEL_MODELS == tuple(kernel.MODELS)
    assert arguments.ADD.keys() == cli.BENCHMARKS.keys()


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_help_is_printed_before_anything_heavy_is_imported(command):
    done = run(command, '--help')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'usage: {" ".join(command)}')
    assert done.stdout.splitlines()[-1] == 'imported:'


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_an_unknown_argument_is_refused_before_anything_heavy_is_imported(command):
    done = run(command, '--helpp=1')
    assert done.returncode == 2
    assert done.stderr.startswith((f'usage: {command[0]}', f'{command[0]}: error: ')) and 'Traceback' not in done.stderr
    assert done.stdout.splitlines()[-1] == 'imported:'
