"""Every command that README and docs/ show: what can run here is run as it stands, all else is held to its parser."""
import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from doc_commands import ROOT, Shown, shown_commands
from statekv_ros.node.parameters import NODE, camera_specs
from test_packaging import PYPROJECT

sys.path.append(str(ROOT / 'docs/_build'))
import command_page  # noqa: E402

COMMANDS = shown_commands()
SCRIPTS = PYPROJECT['project']['scripts']
# Commands of others, which this package cannot check.
OTHERS = {'git', 'rosdep', 'pip', 'colcon', 'source', 'export', 'docker', 'apt', 'sudo', 'for'}
# Why a command is not run here; each is parsed all the same.
NOT_RUN = {
    'make ': 'what CI is, or what runs for minutes; tests of their own',
    'statekv-bench (step|decode|answers|hours|aot)': 'a GPU or minutes; test_bench_*.py',
    'statekv-bench floor --device-name orin$': 'half a minute for ten models; test_bench_floor.py',
    'statekv-patrol make (p64|p128|f64|shifts)': 'hundreds of videos',
    'statekv-eval (p64|f64|shifts)/': 'hours',
    'statekv-eval questions_real.json|python -m lmms_eval': 'data sets and checkpoints that are not here',
    'python -m statekv_ros.patrol.heldout': 'minutes',
    'python test/campaign': 'minutes; test_campaign.py',
    'python test/view_bench.py': 'minutes, and a quiet machine',
    'statekv-(node|view)|statekv-bag play|python ask.py': 'runs until it is stopped, or wants a node: test_readme_call.py',
    'ros2 ': 'the tools of a ROS distribution',
}


def reason_not_to_run(shown: Shown) -> str:
    """Why it is not run; empty where it is."""
    line = ' '.join(shown.words)
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, line)), '')


# A shell's assignments are none.
OURS = [shown for shown in COMMANDS if shown.words[0] not in OTHERS and not re.match(r'\w+=', shown.words[0])]
RUN = [shown for shown in OURS if not reason_not_to_run(shown)]


def parsed(script: str, arguments: list[str], about: object) -> None:
    """Have a command's own parser look at its arguments."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            command_page.parser_of(command_page.scripts()[script]).parse_args(arguments)
    except SystemExit:
        pytest.fail(f'{about}: {errors.getvalue().splitlines()[-1]}')


def check_make(shown: Shown) -> None:
    """Targets that there are, and arguments that go on to commands of ours."""
    targets = re.findall(r'^([a-z-]+):.*##', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    for word in shown.words[1:]:
        name, given, value = word.partition('=')
        assert given or word in targets, f'{shown}: no target {word}'
        if name == 'BENCH_ARGS':
            parsed('statekv-bench', value.split(), shown)


def check_launch(shown: Shown) -> None:
    """A launch file that there is, with arguments that it declares, or the one that it includes."""
    _, _, package, file, *arguments = shown.words
    source = (ROOT / 'launch' / file).read_text() + (ROOT / 'launch/statekv.launch.py').read_text()
    assert package == 'statekv_ros'
    for argument in arguments:
        assert f"DeclareLaunchArgument('{argument.split(':=')[0]}'" in source, f'{shown}: no argument {argument}'


@pytest.mark.parametrize('shown', OURS, ids=str)
def test_command_on_a_page_is_one_that_there_is(shown):
    name, *arguments = shown.words
    if name == 'statekv-node':
        known = {spec.name for spec in (*NODE, *camera_specs('camera', 2.0, 'best_effort'))} | {'use_sim_time'}
        assert arguments[0] == '--ros-args' and set(re.findall(r' -p ([\w.]+):=', ' '.join(arguments))) <= known
    elif name in SCRIPTS:
        parsed(name, arguments, shown)
    elif name == 'make':
        check_make(shown)
    elif shown.words[:2] == ['ros2', 'launch']:
        check_launch(shown)
    elif shown.words[:3] == ['python', '-m', 'statekv_ros.patrol.heldout']:
        assert importlib.util.find_spec(shown.words[2])
    else:
        assert reason_not_to_run(shown), f'{shown}: what is this?'


def test_every_reason_not_to_run_a_command_has_one_and_the_rest_is_run():
    lines = [' '.join(shown.words) for shown in OURS]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in lines)] == []
    run = {shown.words[0] for shown in RUN}
    assert {'statekv-patrol', 'statekv-bag', 'statekv-eval', 'statekv-plan', 'statekv-tiny-model'} <= run


@pytest.fixture(scope='module')
def desk(tmp_path_factory) -> Path:
    """A folder with the video that a page takes for granted."""
    folder = tmp_path_factory.mktemp('desk')
    video = cv2.VideoWriter(str(folder / 'walk.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 10, (64, 48))
    for shade in range(0, 250, 10):
        video.write(np.full((48, 64, 3), shade, np.uint8))
    video.release()
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize('page', sorted({shown.page for shown in RUN}))
def test_commands_of_a_page_run_in_order(page, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    for shown in (shown for shown in RUN if shown.page == page):
        module, function = SCRIPTS[shown.words[0]].split(':')
        assert getattr(importlib.import_module(module), function)(shown.words[1:]) == 0, f'{shown}\n{capsys.readouterr().err}'
    assert capsys.readouterr().out
