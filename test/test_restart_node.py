"""Restarts of a real node: what it goes on from, and what it says where it cannot. Kills at random moments are the class
`restarts` of the campaign."""
import signal
import subprocess
from importlib.util import find_spec

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from live import SECOND, Graph, image, memory_node  # noqa: E402
from statekv_ros.backbones.tiny import write_tiny_checkpoint  # noqa: E402
from statekv_ros.node.messages import to_stamp  # noqa: E402
from statekv_ros.store import StoreReader  # noqa: E402

pytestmark = pytest.mark.timeout(400)
QUESTION = 'is the door open?'


@pytest.fixture(scope='module')
def other_model_dir(tmp_path_factory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp('other') / 'tiny', seed=1))


def running(folder, model: str, memory, ending=signal.SIGKILL, **parameters):
    """A node that keeps its memory in `memory`, killed at the end, and a graph beside it."""
    return memory_node(folder, model, ending, cameras='[front]', memory_dir=memory, **parameters)


def picture(number: int, side: int = 64):
    """The image that is number `number` of all that is ever sent."""
    return image((number + 1) * SECOND, side, side, seed=number)


def seen(graph: Graph) -> int:
    """Frames that the camera's memory has taken in, forgotten ones included."""
    graph.fresh_health()
    return told(graph)


def told(graph: Graph) -> int:
    """As `seen`, from the newest message that is here."""
    values = graph.health['front'][2]
    return int(values['frames_held']) + int(values['frames_forgotten'])


def watch(graph: Graph, begin: int, end: int, side: int = 64) -> None:
    """Images one by one, each watched before the next."""
    for number in range(begin, end):
        graph.publish(picture(number, side))
        graph.wait(lambda: told(graph) == number + 1, f'frame {number}')


def engine_status(graph: Graph) -> tuple[int, str, dict]:
    return graph.fresh_health()['engine']


def test_a_reset_forgets_on_disk_too_and_a_second_node_on_the_folder_is_refused_by_name(tiny_model_dir, tmp_path):
    memory = tmp_path / 'memory'
    with running(tmp_path, tiny_model_dir, memory) as (node, graph):
        graph.wait_for_state('active')
        watch(graph, 0, 5)
        with running(tmp_path, tiny_model_dir, memory) as (_, second):
            reason = second.wait(lambda: second.health.get('engine', (0, ''))[1].startswith(str(memory))
                                 and second.health['engine'][1], 'a refusal')
            assert f'is being written by process {node.process.pid} on ' in reason and '(/statekv)' in reason
            assert 'memory_dir' in reason and second.lifecycle_state() == 'unconfigured'
        graph.wait(graph.reset.service_is_ready, 'the reset service')
        response = graph.response(graph.reset.call_async(graph.reset.srv_type.Request()))
        assert response.success and response.frames_forgotten == 5
        with StoreReader.look(memory) as store:
            assert store.cameras() == []
        watch(graph, 0, 3)
    with running(tmp_path, tiny_model_dir, memory, signal.SIGINT) as (_, graph):
        graph.wait_for_state('active')
        assert seen(graph) == 3


def test_what_another_model_made_stays_and_is_found_again(tiny_model_dir, other_model_dir, tmp_path):
    memory = tmp_path / 'memory'
    with running(tmp_path, tiny_model_dir, memory, signal.SIGINT) as (_, graph):
        graph.wait_for_state('active')
        watch(graph, 0, 4)
    with running(tmp_path, other_model_dir, memory, restore='require') as (_, graph):
        reason = graph.wait(lambda: graph.health.get('engine', (0, ''))[1].startswith('the memory in')
                            and graph.health['engine'][1], 'a refusal')
        assert 'another model (qwen3_vl ' in reason and 'dtype' not in reason
    for begin in (0, 2):        # the second start with the other model goes on in the folder that the first began
        with running(tmp_path, other_model_dir, memory) as (node, graph):
            graph.wait_for_state('active')
            assert seen(graph) == begin
            watch(graph, begin, begin + 2)
            assert 'was made with another model' in node.log and 'memory on disk: ' in node.log
    with running(tmp_path, tiny_model_dir, memory, restore='never') as (_, graph):
        graph.wait_for_state('active')
        assert seen(graph) == 0
    with running(tmp_path, tiny_model_dir, memory, budget=32) as (node, graph):
        graph.wait_for_state('active')
        assert seen(graph) == 0 and 'another prefill_policy (statekv(64) there, statekv(32) here)' in node.log
    with running(tmp_path, tiny_model_dir, memory) as (_, graph):
        graph.wait_for_state('active')
        assert seen(graph) == 4


@pytest.mark.skipif(find_spec('torchao') is None, reason='torchao is not installed: pip install .[weights]')
def test_what_other_weights_made_stays_and_is_named(tiny_model_dir, tmp_path):
    memory = tmp_path / 'memory'
    with running(tmp_path, tiny_model_dir, memory, signal.SIGINT, weights='int8') as (_, graph):
        graph.wait_for_state('active')
        watch(graph, 0, 3)
        assert engine_status(graph)[2]['weights'] == 'int8' and graph.ask(QUESTION).success
    with running(tmp_path, tiny_model_dir, memory, restore='require') as (_, graph):
        reason = graph.wait(lambda: graph.health.get('engine', (0, ''))[1].startswith('the memory in')
                            and graph.health['engine'][1], 'a refusal')
        assert 'another weights (int8 there, as_stored here); it' in reason
    with running(tmp_path, tiny_model_dir, memory, weights='int8') as (_, graph):
        graph.wait_for_state('active')
        assert seen(graph) == 3


def test_a_memory_dir_that_is_a_file_is_named_and_the_node_watches_without(tiny_model_dir, tmp_path):
    file = tmp_path / 'file'
    file.write_text('mine')
    with running(tmp_path, tiny_model_dir, file) as (_, graph):
        graph.wait_for_state('active')
        level, message, _ = engine_status(graph)
        assert level == 1 and f'nothing is kept for a restart: {file} is a file' in message and 'memory_dir' in message
        watch(graph, 0, 3)
        assert graph.ask(QUESTION).success
    assert file.read_text() == 'mine'


def test_on_a_full_disk_it_says_so_watches_on_and_writes_again_once_there_is_room(tiny_model_dir, tmp_path, mounted):
    disk = mounted('-t', 'tmpfs', '-o', 'size=3m', 'tmpfs')
    number = 0
    ballast = disk / 'ballast'
    ballast.write_bytes(bytes(2_300_000))
    with running(tmp_path, tiny_model_dir, disk / 'memory') as (node, graph):
        graph.wait_for_state('active')
        while 'the disk is full' not in graph.health['engine'][1]:
            watch(graph, number, number + 1)
            number += 1
        assert engine_status(graph)[0] == 1
        for _ in range(3):
            watch(graph, number, number + 1)
            number += 1
        assert node.log.count('is not kept for a restart') == 1
    with StoreReader.look(disk / 'memory') as store:
        assert store.check() == []
        kept = sum(header['record']['frames'] for step, header in store.steps('front') if step >= 0)
    assert kept > 4
    with running(tmp_path, tiny_model_dir, disk / 'memory') as (node, graph):
        graph.wait_for_state('active')
        back = seen(graph)
        assert kept <= back <= kept + 1, 'what was stored is there again though the disk is still full'
        watch(graph, back, back + 2)
        ballast.unlink()
        number = back + 2
        while 'the disk is full' in graph.health['engine'][1]:
            watch(graph, number, number + 1)
            number += 1
    with running(tmp_path, tiny_model_dir, disk / 'memory') as (_, graph):
        graph.wait_for_state('active')
        assert number - 3 <= seen(graph) <= number


def test_in_a_read_only_folder_it_says_so_watches_and_answers_and_leaves_what_is_there(tiny_model_dir, tmp_path, mounted):
    with running(tmp_path, tiny_model_dir, tmp_path / 'memory') as (_, graph):
        graph.wait_for_state('active')
        watch(graph, 0, 3)
    before = (tmp_path / 'memory' / 'data.mdb').read_bytes()
    folder = mounted('--bind', str(tmp_path / 'memory'))
    subprocess.run(['mount', '-o', 'remount,ro,bind', str(folder)], check=True)
    with running(tmp_path, tiny_model_dir, folder) as (node, graph):
        graph.wait_for_state('active')
        level, message, _ = engine_status(graph)
        assert level == 1 and 'nothing is kept for a restart' in message and 'read-only file system' in message, message
        watch(graph, 0, 3)
        assert graph.ask(QUESTION).success
    assert (tmp_path / 'memory' / 'data.mdb').read_bytes() == before
    with running(tmp_path, tiny_model_dir, folder, restore='require') as (_, graph):
        graph.wait(lambda: 'read-only file system' in graph.health.get('engine', (0, ''))[1], 'a refusal')


@pytest.mark.parametrize('form', ['bf16', 'int4'])
def test_what_lies_on_disk_alone_is_answered_before_and_after_a_kill(form, tiny_model_dir, tmp_path):
    options = {'device_cache_mb': 1, 'detailed_format': form, 'answer_policy': 'sparse(300)'}
    count, asked = 80, []
    for life in range(2):
        with running(tmp_path, tiny_model_dir, tmp_path / 'memory', **options) as (_, graph):
            graph.wait_for_state('active')
            if not life:
                watch(graph, 0, count, side=256)
            values = graph.fresh_health()['front'][2]
            assert int(values['steps_below_device']) > 10 and int(values['frames_forgotten']) == 0
            assert float(values['device_mb']) <= 1 and float(values['host_mb']) == 0
            for span in ((), (3, 9)):       # all, and seconds that left the device long ago
                fields = dict(zip(('from_stamp', 'to_stamp'), (to_stamp(second * SECOND) for second in span)))
                response = graph.ask(QUESTION, **fields)
                assert response.success, response.error
                [answer] = response.answers
                asked.append((answer.text, answer.frames_covered, answer.first_stamp.sec, answer.last_stamp.sec,
                              [evidence.first_stamp.sec for evidence in answer.evidence]))
    assert asked[:2] == asked[2:]
    assert asked[0][1:4] == (count, 1, count) and asked[1][2] <= 3 and asked[1][3] >= 9
