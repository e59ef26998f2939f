"""The node's life: models and parameters that cannot work, lifecycle transitions, signals, cameras that stop."""
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from lifecycle_msgs.msg import Transition
from rcl_interfaces.srv import DescribeParameters, GetParameters, SetParameters
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from live import SECOND, Graph, image, memory_node, new_domain
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.node.messages import to_stamp
from statekv_ros.node.parameters import NODE, camera_specs

pytestmark = pytest.mark.timeout(300)


def half_a_file(folder: Path) -> None:
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])


def no_video(folder: Path) -> None:
    (folder / 'config.json').write_text(json.dumps({'model_type': 'bert'}))


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize('breaks, words', [(gone, 'does not exist'), (half_a_file, 'model.safetensors'), (no_video, "'bert'")])
def test_a_model_that_cannot_watch_leaves_the_node_unconfigured_with_the_reason(breaks, words, tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / 'model'))
    breaks(folder)
    assert_refused(tmp_path, words, model=str(folder))


@pytest.mark.parametrize('values', [
    {'budget': ('0', 'budget must be at least 1, got 0'), 'rate_hz': ('.nan', 'rate_hz must be a finite number'),
     'prefill_policy': ('magic', "'magic'"), 'cameras': ('[all]', "'all'")},
    {'budget': ('-5', 'got -5'), 'rate_hz': ('0.0', 'rate_hz must be at least 0.001'), 'answer_policy': ('last(0)', 'last(0)'),
     'cameras': ("['a b']", "'a b'"), 'slice_tokens': ('0', 'slice_tokens')},
    {'budget': ('lots', "got 'lots'"), 'rate_hz': ('.inf', 'rate_hz must be a finite number'), 'cameras': ('[a, a]', 'differ')},
    {'device': ('abacus', "'abacus'")},
])
def test_parameters_that_cannot_work_leave_the_node_unconfigured_with_the_reasons(values, tiny_model_dir, tmp_path):
    assert_refused(tmp_path, *(words for _, words in values.values()), model=tiny_model_dir,
                   **{name: value for name, (value, _) in values.items()})


def test_a_stopped_node_leaves_no_shared_memory_behind(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir) as (node, graph):
        graph.wait_for_state('active')
        mapped = Path(f'/proc/{node.process.pid}/maps').read_text()
        segments = {Path(f'/dev/shm/{name}') for name in re.findall(r'/dev/shm/(fastdds_[0-9a-f]+)$', mapped, re.MULTILINE)}
        if not any(segment.stat().st_size > 10**6 for segment in segments):
            pytest.skip('no shared memory transport here')
        code, _ = node.stop()
        assert code == 0
    assert not [segment for segment in segments if segment.exists()]


def test_a_mistyped_parameter_is_named_and_the_node_runs_on(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, buget='7', **{'lidar.frame_id': 'x'}) as (node, graph):
        graph.wait_for_state('active')
        assert 'parameter "buget" is not one of this node and has no effect: is "budget" meant?' in node.log
        assert 'parameter "lidar.frame_id" is not one of this node and has no effect' in node.log
        assert node.log.count('is not one of this node') == 2


def assert_refused(folder: Path, *reasons: str, model: str, **parameters) -> None:
    with memory_node(folder, model, **parameters) as (node, graph):
        graph.wait_for_state('unconfigured')
        graph.wait(lambda: reasons[0] in graph.health['engine'][1], reasons[0])
        assert graph.lifecycle_state() == 'unconfigured'
        response = graph.ask()
        assert not response.success
        for words in reasons:
            assert words in response.error and words in graph.health['engine'][1] and words in node.log
        assert node.alive
        code, _ = node.stop(signal.SIGTERM)
        assert code == 0


def test_the_transitions_tell_the_nodes_life(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', autostart='false') as (node, graph):
        assert graph.lifecycle_state() == 'unconfigured'
        assert 'not configured' in graph.ask().error
        assert graph.lifecycle(Transition.TRANSITION_CONFIGURE)
        graph.wait_for_state('inactive')
        assert graph.lifecycle(Transition.TRANSITION_ACTIVATE)
        graph.wait_for_state('active')
        for second in range(1, 6):
            graph.publish(image(second * SECOND))
            graph.wait_for_camera('front', frames_held=second)
        assert graph.lifecycle(Transition.TRANSITION_DEACTIVATE)
        graph.wait_for_state('inactive')
        assert graph.ask().answer.frames_covered == 5, 'the memory is kept and answers while inactive'
        assert graph.lifecycle(Transition.TRANSITION_ACTIVATE)
        graph.publish(image(6 * SECOND))
        graph.wait_for_camera('front', frames_held=6)
        assert graph.lifecycle(Transition.TRANSITION_DEACTIVATE) and graph.lifecycle(Transition.TRANSITION_CLEANUP)
        assert 'not configured' in graph.ask().error
        assert graph.lifecycle(Transition.TRANSITION_CONFIGURE) and graph.lifecycle(Transition.TRANSITION_ACTIVATE)
        graph.publish(image(7 * SECOND))
        graph.wait_for_camera('front', frames_held=1)


def test_parameters_are_described_ranged_and_guarded_at_run_time(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]') as (node, graph):
        graph.wait_for_state('active')

        def call(kind, **fields):
            client = graph.node.create_client(kind, f'/statekv/{_snake(kind.__name__)}')
            graph.wait(client.service_is_ready, kind.__name__)
            return graph.response(client.call_async(kind.Request(**fields)))

        def set_to(name, value):
            return call(SetParameters, parameters=[Parameter(name, value=value).to_parameter_msg()]).results[0]

        specs = [*NODE, *camera_specs('front', 2.0, 'best_effort')]
        for spec, told in zip(specs, call(DescribeParameters, names=[s.name for s in specs]).descriptors):
            assert told.description and told.read_only == spec.fixed, spec.name
            if spec.low is not None:
                assert told.integer_range or told.floating_point_range, spec.name
        for name, value in (('front.rate_hz', float('nan')), ('front.rate_hz', -1.0), ('slice_tokens', 0),
                            ('answer_policy', 'last(0)'), ('budget', 8), ('model', '/elsewhere')):
            result = set_to(name, value)
            assert not result.successful and result.reason, name
        assert set_to('front.rate_hz', 0.5).successful
        assert call(GetParameters, names=['front.rate_hz']).values[0].double_value == 0.5
        for second in range(1, 8):
            graph.publish(image(second * SECOND))
            health = graph.wait_for_camera('front', frames_in=second)
        assert health['frames_sampled'] == '4', 'one image in two seconds, from the first one on'


def _snake(name: str) -> str:
    return ''.join(f'_{c.lower()}' if c.isupper() else c for c in name).lstrip('_')


@pytest.fixture(scope='module')
def deep_model_dir(tmp_path_factory) -> str:
    """So many layers that a step takes long and a signal falls into it, and answers that never end by themselves."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp('models') / 'deep', layers=250)
    tensors = load_file(folder / 'model.safetensors')
    embeddings = tensors['model.language_model.embed_tokens.weight']
    embeddings[AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids('<|im_end|>')] = 0
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    return str(folder)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_mid_step_and_mid_answer_ends_the_node_cleanly_within_five_seconds(number, deep_model_dir, tmp_path):
    with memory_node(tmp_path, deep_model_dir, cameras='[front]', slice_tokens=1) as (node, graph):
        graph.wait_for_state('active')
        for second in (1, 2):
            graph.publish(image(second * SECOND, 448, 448))
            graph.wait_for_camera('front', frames_processed=second)
        future = graph.ask_later(max_tokens=60_000)
        graph.wait(lambda: graph.health['engine'][2]['active_questions'] == '1', 'an answer under way')
        graph.publish(image(3 * SECOND, 448, 448))
        graph.wait_for_camera('front', frames_processed=3)
        graph.publish(image(4 * SECOND, 448, 448))      # completes a step of hundreds of ms
        graph.wait_for_camera('front', frames_sampled=4)
        assert graph.health['front'][2]['frames_processed'] == '3', 'the step should be under way'
        assert not future.done(), 'and so should the answer'
        code, seconds = node.stop(number)
        print(f'{number.name}: exit code {code} after {seconds:.2f} s')
        assert code == 0 and seconds < 5.0, node.log
        assert 'Traceback' not in node.log, node.log


def test_a_camera_that_freezes_leaves_the_other_alone_and_shows_as_stale(tiny_model_dir, tmp_path):
    """Ten seconds of two cameras at 10 and 4 images a second; the first one stops after two."""
    with memory_node(tmp_path, tiny_model_dir, cameras='[front,rear]', stale_after_s='1.0') as (node, graph):
        graph.wait_for_state('active')
        sent = {'front': 0, 'rear': 0}

        def send(camera: str, period_ms: int) -> None:
            sent[camera] += 1
            graph.publish(image(SECOND + sent[camera] * period_ms * 10**6), f'/{camera}/image_raw')

        for tick in range(100):
            if tick < 20:
                send('front', 100)
            if tick % 5 in (0, 2):
                send('rear', 250)
            graph.spin(0.1)
            if tick == 15:
                assert graph.health['front'][0] == graph.health['rear'][0] == 0, graph.health
        rear = graph.wait_for_camera('rear', frames_processed=sent['rear'])
        level, message, front = graph.fresh_health()['front']
        assert level == 3 and message.startswith('stale: no new image for'), message
        assert graph.health['rear'][0] == 0, graph.health['rear']
        assert (int(front['frames_processed']), front['dropped'], rear['dropped']) == (20, '0', '0')
        response = graph.ask()
        assert [(a.camera, a.frames_covered) for a in response.answers] == [('front', 20), ('rear', sent['rear'])]


def test_while_a_simulated_clock_stands_still_nothing_becomes_stale(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', use_sim_time='true', stale_after_s='0.5') as (node, graph):
        graph.wait_for_state('active')
        clock = graph.node.create_publisher(Clock, '/clock', 10)

        def show(seconds: int) -> None:
            """Until the node's clock says so: one message could be lost, its subscription keeps none for later."""
            def shown() -> bool:
                clock.publish(Clock(clock=to_stamp(seconds * SECOND)))
                return graph.health_ns == seconds * SECOND
            graph.wait(shown, f'/clock at {seconds} s')

        graph.publish(image(99 * SECOND))
        graph.wait_for_camera('front', frames_in=1)
        show(100)
        assert graph.health['front'][0] == 0, 'an image before the clock began is not one of second 0'
        graph.publish(image(100 * SECOND))
        graph.wait_for_camera('front', frames_in=2)
        graph.spin(1.5)
        assert graph.fresh_health()['front'][0] == 0, graph.health['front']
        show(102)
        graph.wait(lambda: graph.health['front'][0] == 3, 'stale after the clock went on')
        show(10)
        graph.wait(lambda: graph.health['front'][0] == 0, 'silence counts anew after the clock went back')
        show(12)
        graph.wait(lambda: graph.health['front'][0] == 3, 'stale on the clock that went back')


def test_the_node_runs_in_a_namespace_with_remapped_topics(tiny_model_dir, tmp_path):
    domain = new_domain()
    arguments = ['-r', '__ns:=/robot1', '-r', 'front/image_raw:=/driver/image', '-p', f'model:={tiny_model_dir}', '-p',
                 'cameras:=[front]']
    import subprocess
    import sys

    from live import environment
    process = subprocess.Popen([sys.executable, '-m', 'statekv_ros.node', '--ros-args', *arguments], env=environment(domain))
    graph = Graph(domain)
    try:
        graph.wait(lambda: ('/robot1/statekv/query', ['statekv_ros/srv/Query']) in graph.node.get_service_names_and_types(),
                   'the service in its namespace')
        graph.wait(lambda: graph.node.count_subscribers('/driver/image') == 1, 'the remapped subscription')
        assert graph.node.count_publishers('/robot1/statekv/timing') == 1
        graph.wait(lambda: 'robot1/statekv: engine' in graph.health, 'a status that tells its node apart from others')
    finally:
        graph.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
