"""The call that README.md shows, as it stands there, against a node with its defaults (the patrol model, one camera)."""
import re
import subprocess
import sys

import pytest
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from doc_commands import ROOT, shown_commands
from live import SECOND, Graph, NodeProcess, environment, image, new_domain
from statekv_ros.patrol.cli import main as patrol_command

pytestmark = pytest.mark.timeout(240)

README, INTERFACES = (ROOT / 'README.md').read_text(), (ROOT / 'docs/interfaces.md').read_text()
WARN = 1


def call(domain: int, page: str = README, above: str = '## Ask it\n') -> str:
    """What a page's snippet prints in a process of its own; it must end well whatever comes."""
    snippet = re.search(re.escape(above) + r'\n```python\n(.*?)```', page, re.DOTALL)[1]
    done = subprocess.run([sys.executable, '-c', snippet], env=environment(domain), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    """A node without any parameter, active, and a graph beside it."""
    domain = new_domain()
    node, graph = NodeProcess(tmp_path_factory.mktemp('readme'), domain), Graph(domain)
    try:
        graph.wait_for_state('active')
        yield node, graph
    finally:
        graph.close()
        node.stop()


def show(graph: Graph, second: int) -> None:
    """An image, until it has been seen: of what is sent to a node with defaults, best-effort, some may be lost."""
    def seen() -> bool:
        graph.publish(image(second * SECOND), '/camera/image_raw')
        return graph.camera('camera')['frames_held'] == str(second)

    graph.wait(seen, f'image {second}')


def test_without_a_node_the_call_prints_what_to_look_for():
    assert call(new_domain()).startswith("unavailable: no memory node 'statekv': is it running")


def test_before_the_first_image_the_call_prints_the_nodes_reason(running):
    node, graph = running
    printed = call(graph.context.get_domain_id())
    assert printed.startswith('failed: ') and 'nothing has been seen' in printed


def test_after_it_the_call_prints_an_answer_with_its_stamp(running):
    node, graph = running
    show(graph, 1)
    show(graph, 2)
    printed = call(graph.context.get_domain_id())
    assert 'Time(sec=2, nanosec=0)' in printed and 'failed' not in printed, printed


def test_log_diagnostics_and_answers_say_that_the_model_is_a_demonstration(running):
    node, graph = running
    level, message, values = graph.fresh_health()['engine']
    assert level == WARN and 'demonstration' in message and 'set the parameter "model"' in message
    [line] = [line for line in node.log.splitlines() if 'demonstration' in line]
    assert '[WARN]' in line and 'made-up patrols' in line and 'set the parameter "model"' in line
    for second in range(int(graph.camera('camera')['frames_held']) + 1, 4):
        show(graph, second)
    response = graph.ask('what is in view?')
    assert response.success and response.answer.demonstration_model and response.answers[0].demonstration_model


def test_the_log_has_no_line_of_a_progress_bar(running):
    node, _ = running
    assert all(line.strip() and '%|' not in line for line in node.log.splitlines()), node.log


def test_the_tutorial_of_the_first_camera_ends_in_an_answer(running, tmp_path, monkeypatch):
    """Its commands and its program as they stand there; its node is the one that runs here."""
    node, graph = running
    monkeypatch.chdir(tmp_path)
    page = 'docs/tutorials/first_camera.md'
    make, play = (next(shown.words for shown in shown_commands() if shown.page == page and shown.words[:2] == command)
                  for command in (['statekv-patrol', 'make'], ['statekv-bag', 'play']))
    assert patrol_command(make[1:]) == 0
    played = subprocess.run([sys.executable, '-m', 'statekv_ros.replay.cli', *play[1:]], text=True, capture_output=True,
                            timeout=120, env=environment(graph.context.get_domain_id()))
    assert played.returncode == 0, played.stderr
    printed = call(graph.context.get_domain_id(), (ROOT / page).read_text(), 'where `ask.py` is\n')
    assert re.fullmatch(r'succeeded \w+ \[0\.\d+(, 0\.\d+)*\]\n', printed), printed


def test_the_table_of_interfaces_tells_what_is_there_and_its_qos(running):
    node, graph = running
    topics = re.findall(r'^\| `~/(\w+)` \| topic `(\w+/(?:msg/)?\w+)` \| ([^|]+) \|', INTERFACES, re.M)
    assert len(topics) >= 5
    for name, kind, told in topics:
        [info] = graph.node.get_publishers_info_by_topic(f'/statekv/{name}')
        assert info.topic_type.replace('/msg/', '/') == kind.replace('/msg/', '/'), name
        assert 'reliable' in told and info.qos_profile.reliability == ReliabilityPolicy.RELIABLE, name
        assert ('transient local' in told) == (info.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL), name
    there = {name for name, kinds in graph.node.get_topic_names_and_types()
             if kinds[0].startswith(('statekv_ros/', 'sensor_msgs/', 'visualization_msgs/'))
             and name.startswith('/statekv/') and '/_action/' not in name}
    assert there == {f'/statekv/{name}' for name, *_ in topics}
    services = {name.removeprefix('/statekv/') for name, kinds in graph.node.get_service_names_and_types()
                if kinds[0].startswith('statekv_ros/srv/') and '/_action/' not in name}
    assert services == set(re.findall(r'`~/(\w+)`(?=[^|]*\| services? )', INTERFACES))
