"""Behaviour trees: real ones of py_trees against a real node over DDS, and the C++ node's ports against the action."""
import inspect
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

py_trees = pytest.importorskip('py_trees', reason='py_trees is not installed (statekv_ros[trees])')
pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy  # noqa: E402
from py_trees.blackboard import Blackboard  # noqa: E402
from py_trees.common import Status  # noqa: E402

from live import PATIENCE_S, SECOND, docs_program, memory_node  # noqa: E402
from statekv_ros.action import Ask as AskAction  # noqa: E402
from statekv_ros.client import StateKVClient  # noqa: E402
from statekv_ros.errors import Code, QuestionError  # noqa: E402
from statekv_ros.node.messages import to_ns  # noqa: E402
from statekv_ros.trees import Ask, IsTrue, WaitFor  # noqa: E402
from test_watches_node import BALL, BOX, Watcher  # noqa: E402

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[1]
CPP = ROOT / 'statekv_ros/trees/cpp'
LONG = {'max_tokens': 60_000, 'temperature': 50.0, 'timeout_s': 250.0}


@pytest.fixture(scope='module')
def watcher(tmp_path_factory):
    """A node that has seen a red ball for a second."""
    with memory_node(tmp_path_factory.mktemp('trees'), 'patrol', cameras='[front]', budget=144, max_tokens=8) as running:
        watcher = Watcher(*running)
        watcher.graph.wait_for_state('active')
        watcher.show(BALL, checked=False)
        yield watcher
        assert watcher.node.alive and 'Traceback' not in watcher.node.log, watcher.node.log


@pytest.fixture
def memory(watcher):
    """A client in this process, which nobody spins but the test."""
    rclpy.init(args=[], domain_id=watcher.graph.context.get_domain_id())
    Blackboard.clear()
    with StateKVClient() as memory:
        assert memory.wait_until_ready(PATIENCE_S)
        yield memory
    rclpy.try_shutdown()


def tick(root, memory, until) -> list[Status]:
    """Tick a tree until that is so; the root's statuses. No tick may wait."""
    tree, statuses, end = py_trees.trees.BehaviourTree(root), [], time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < end, py_trees.display.unicode_tree(root, show_status=True)
        tree.tick()
        statuses.append(root.status)
        memory.spin_for(0.02)
    return statuses


def ended(root):
    return lambda: root.status in (Status.SUCCESS, Status.FAILURE)


def test_a_sequence_asks_judges_and_leaves_its_outputs_on_the_blackboard(watcher, memory):
    root = py_trees.composites.Sequence('look', memory=True, children=[
        Ask('what?', memory, 'what is in view?'), IsTrue('red?', memory, 'did you see a red ball?', key='red'),
        py_trees.composites.Selector('blue?', memory=True, children=[
            IsTrue('box?', memory, 'did you see a blue box?', key='blue'), py_trees.behaviours.Success('no')])])
    statuses = tick(root, memory, ended(root))
    assert statuses[0] is Status.RUNNING and statuses[-1] is Status.SUCCESS
    assert [Blackboard.get(f'/{key}/text') for key in ('answer', 'red', 'blue')] == [BALL, 'yes', 'no']
    assert to_ns(Blackboard.get('/answer/stamp')) == SECOND + SECOND // 2
    assert (Blackboard.get('/answer/error_code'), Blackboard.get('/answer/pose')) == (0, None)
    assert [child.status for child in root.children[2].children] == [Status.FAILURE, Status.SUCCESS]


def test_what_the_node_refuses_is_a_failure_with_its_code_and_sentence(watcher, memory):
    root = py_trees.composites.Sequence('ask', memory=True, children=[Ask('rear?', memory, 'what?', camera='rear')])
    tick(root, memory, ended(root))
    assert root.status is Status.FAILURE and Blackboard.get('/answer/error_code') == Code.UNKNOWN_CAMERA
    assert "unknown camera 'rear'" in root.children[0].feedback_message and Blackboard.get('/answer/text') == ''
    waiting = WaitFor('open?', memory, 'what is in view?', 'is open')
    tick(waiting, memory, ended(waiting))
    assert waiting.status is Status.FAILURE and Blackboard.get('/alert/error_code') == Code.INVALID_CONDITION
    for condition, kind in (('is open', QuestionError), ('changes', ValueError)):
        with pytest.raises(kind, match='condition'):
            IsTrue('open?', memory, 'what is in view?', condition)


def test_a_question_that_is_interrupted_is_canceled_at_once(watcher, memory):
    asking = Ask('endless', memory, 'what is in view?', **LONG)
    tick(asking, memory, lambda: asking.feedback_message)
    assert asking.status is Status.RUNNING
    asking.stop(Status.INVALID)
    memory.spin_for(0.5)
    watcher.graph.fresh_health()
    watcher.graph.wait(lambda: watcher.graph.health['engine'][2]['active_questions'] == '0', 'the end of the question')
    assert asking.status is Status.INVALID


def test_wait_for_is_running_until_the_alert_and_its_watch_ends_with_it(watcher, memory):
    waiting = WaitFor('a box', memory, 'what is in view?', f'equals {BOX}')
    for expected in (BOX, BOX):     # it can be entered again
        watcher.show('nothing', checked=False)
        tick(waiting, memory, lambda: watcher.list() or watcher.graph.executor.spin_once(0.01))
        assert waiting.status is Status.RUNNING
        watcher.show('nothing', BOX, checked=False)
        tick(waiting, memory, ended(waiting))
        assert waiting.status is Status.SUCCESS and Blackboard.get('/alert/text') == expected
        memory.spin_for(0.3)
        watcher.listed(0)


def test_wait_for_that_is_interrupted_ends_its_watch_whenever_that_is(watcher, memory):
    waiting = WaitFor('a box', memory, 'what is in view?', f'equals {BOX}')
    waiting.tick_once()
    waiting.stop(Status.INVALID)        # before the node has heard of it
    memory.spin_for(1.0)
    watcher.listed(0)
    tick(waiting, memory, lambda: watcher.list() or watcher.graph.executor.spin_once(0.01))
    waiting.stop(Status.INVALID)
    memory.spin_for(0.5)
    watcher.listed(0)


def test_the_program_of_the_docs_finds_the_ball(watcher):
    process = docs_program(ROOT / 'docs/trees.md', watcher.graph.context.get_domain_id())
    try:
        watcher.listed(1)
        watcher.show('nothing', BALL, checked=False)
        out, _ = process.communicate(timeout=PATIENCE_S)
        assert out.startswith(f'SUCCESS {BALL} ') and out.strip().endswith(' 0'), out
    finally:
        process.kill()


# --- the C++ node, which the ROS wheels cannot compile -----------------------------------------------------------------

def test_ports_of_the_xml_model_are_those_of_the_source_and_of_the_action():
    model = ElementTree.parse(CPP / 'statekv_nodes.xml').getroot().find("TreeNodesModel/Action[@ID='AskMemory']")
    source = (CPP / 'ask_node.cpp').read_text()
    ports = {kind: {port.get('name'): port.get('type') for port in model.findall(f'{kind}_port')} for kind in ('input', 'output')}
    for kind, name in (('input', 'InputPort'), ('output', 'OutputPort')):
        assert ports[kind] == {port: type for type, port in re.findall(rf'BT::{name}<([\w:]+)>\("(\w+)"', source)}
    defaults = {port.get('name'): port.get('default') for port in model.findall('input_port') if port.get('default') is not None}
    assert defaults == {port: value.strip('"').removesuffix('.0f') for port, value in
                        re.findall(r'BT::InputPort<[\w:]+>\("(\w+)", ("\w*"|[\d.]+f), "', source)}
    assert float(defaults['timeout_s']) == inspect.signature(StateKVClient.ask_async).parameters['timeout_s'].default
    assert 'registerNodeType<statekv_ros::AskMemory>("AskMemory")' in source
    goal = AskAction.Goal.get_fields_and_field_types()
    types = {'std::string': 'string', 'float': 'float', 'uint16_t': 'uint16', 'builtin_interfaces::msg::Time':
             'builtin_interfaces/Time', 'geometry_msgs::msg::PoseStamped': 'geometry_msgs/PoseStamped'}
    assert {port: types[type] for port, type in ports['input'].items() if port != 'memory'} == {
        name: goal[name] for name in ('question', 'camera', 'timeout_s')}
    answer = type(AskAction.Result().answer).get_fields_and_field_types()
    result = AskAction.Result.get_fields_and_field_types()
    fields = {'text': answer['text'], 'stamp': answer['last_stamp'], 'pose': answer['pose'], 'error_code': result['error_code']}
    assert {port: types[type] for port, type in ports['output'].items()} == fields


def test_the_source_reads_and_writes_fields_and_constants_that_there_are():
    source = (CPP / 'ask_node.cpp').read_text()
    assert all(hasattr(AskAction.Result, name) for name in re.findall(r'Ask::Result::([A-Z_]{2,})', source))
    for owner, message in (('goal_', AskAction.Goal()), ('answer', AskAction.Result().answer), ('result', AskAction.Result())):
        names = set(re.findall(rf'\b{owner}\.(\w+)', source))
        assert names and all(hasattr(message, name) for name in names), (owner, names)
    built = (ROOT / 'CMakeLists.txt').read_text()
    assert 'statekv_ros/trees/cpp/ask_node.cpp' in built and 'share/${PROJECT_NAME}/trees' in built
