"""The launch files: their arguments, what those mean to the node, and, where launch is installed, a launch for real."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statekv_ros.launch_arguments import (absolute_topic, cameras_of_topics, format_cameras, node_parameters,
                                          parse_cameras, parse_switch)

LAUNCH = Path(__file__).resolve().parents[1] / 'launch'
NODE_ARGUMENTS = {'model', 'cameras', 'params_file', 'namespace', 'use_sim_time', 'log_level', 'autostart', 'respawn',
                  'view', 'view_host', 'view_port'}
names = st.from_regex(r'[A-Za-z][A-Za-z0-9_]{0,8}', fullmatch=True)
topics = st.from_regex(r'/?[a-z][a-z0-9_]{0,5}(/[a-z][a-z0-9_]{0,5}){0,3}', fullmatch=True)


def declared_arguments(file: str) -> set[str]:
    """First arguments of all DeclareLaunchArgument(...) in a launch file, read without importing launch."""
    tree = ast.parse(compile_source(file))
    return {call.args[0].value for call in ast.walk(tree)
            if isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'DeclareLaunchArgument'}


def compile_source(file: str) -> str:
    source = (LAUNCH / file).read_text()
    compile(source, file, 'exec')
    return source


def test_node_launch_file_declares_its_arguments():
    assert declared_arguments('statekv.launch.py') == NODE_ARGUMENTS


def test_replay_launch_file_adds_the_bags_arguments():
    assert declared_arguments('replay.launch.py') == {'bag', 'rate', 'loop', 'exit_when_done', 'cameras', 'respawn'}
    assert 'statekv.launch.py' in compile_source('replay.launch.py')


def test_cameras_argument_becomes_names_and_topics():
    assert node_parameters('', 'front=/front/image_raw, rear=rear/image_raw/compressed', '', '') == {
        'cameras': ['front', 'rear'], 'front.topic': '/front/image_raw', 'rear.topic': 'rear/image_raw/compressed'}


def test_empty_arguments_leave_everything_to_the_parameter_file():
    assert node_parameters('', '', '', '') == {}


def test_camera_without_a_topic_keeps_the_nodes_default_topic():
    assert node_parameters('/m', 'front', 'False', 'true') == {
        'model': '/m', 'autostart': False, 'use_sim_time': True, 'cameras': ['front']}


@given(st.dictionaries(names, st.one_of(st.just(''), topics), max_size=4))
def test_any_cameras_survive_being_written_and_read(cameras):
    assert parse_cameras(format_cameras(cameras)) == cameras


@pytest.mark.parametrize(('text', 'bad'), [
    ('1front=/x', '1front'), ('fr ont=/x', 'fr ont'), ('=/x', "''"), ('front=', "''"), ('front=/x/', '/x/'),
    ('front=//x', '//x'), ('front=/x y', '/x y'), ('front=/x=/y', '/x=/y'), ('front=/1x', '/1x'),
    ('a=/x,a=/y', "'a'")])
def test_bad_camera_is_an_error_that_names_it(text, bad):
    with pytest.raises(ValueError, match='cameras') as error:
        parse_cameras(text)
    assert bad in str(error.value)


@pytest.mark.parametrize('text', ['yes', '1', '', 'tru'])
def test_switch_takes_true_and_false_only(text):
    with pytest.raises(ValueError, match='loop must be true or false'):
        parse_switch('loop', text)


@pytest.mark.parametrize(('topic', 'camera'), [
    ('/camera/image_raw', 'camera'), ('/front/image_raw/compressed', 'front'), ('/image_raw', 'camera'),
    ('/robot/left/color/image_raw', 'robot_left'), ('/video', 'video'), ('/_1/image', 'camera_1')])
def test_topic_tells_the_cameras_name(topic, camera):
    assert cameras_of_topics([topic]) == {camera: topic}
    assert parse_cameras(format_cameras({camera: topic})) == {camera: topic}


def test_raw_topic_is_preferred_to_the_same_cameras_compressed_one():
    assert cameras_of_topics(['/a/image_raw/compressed', '/a/image_raw']) == {'a': '/a/image_raw'}


def test_topics_resolve_as_the_nodes_do():
    assert absolute_topic('/x', 'robot') == '/x'
    assert absolute_topic('x/y', '/robot') == '/robot/x/y'
    assert absolute_topic('x', '') == '/x'
    assert absolute_topic('~/x', 'robot') == '/robot/statekv/x'


LAUNCH_A_REPLAY = '''
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
file, *arguments = sys.argv[1:]
service = LaunchService()
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(
    PythonLaunchDescriptionSource(file), launch_arguments=[argument.split(':=') for argument in arguments])]))
sys.exit(service.run())
'''


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run replay.launch.py to its end, in a process of its own."""
    environment = {**os.environ, 'AMENT_PREFIX_PATH': os.environ.get('AMENT_PREFIX_PATH') or sys.prefix,
                   'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
                   'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', 'ROS_LOG_DIR': str(cwd)}
    return subprocess.run([sys.executable, '-c', LAUNCH_A_REPLAY, str(LAUNCH / 'replay.launch.py'), *arguments],
                          cwd=cwd, env=environment, timeout=240, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def launch_installed():
    pytest.importorskip('launch_ros', reason='launch comes with a ROS distribution; it has no wheel')


def test_replay_launch_plays_a_bag_into_the_node_and_ends(launch_installed, tiny_model_dir, frames, tmp_path):
    from statekv_ros.replay.bag_writer import BagOptions, write_bag
    write_bag(tmp_path / 'bag', ((index * 10**8, picture) for index, picture in enumerate(frames)),
              BagOptions(topic='/front/image_raw'))
    done = launch(f'bag:={tmp_path / "bag"}', f'model:={tiny_model_dir}', 'exit_when_done:=true', 'rate:=2.0',
                  cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f'{len(frames)} images in' in done.stdout, done.stdout
    assert 'front on /front/image_raw' in done.stdout, done.stdout


def test_replay_launch_names_a_bag_that_does_not_exist(launch_installed, tiny_model_dir, tmp_path):
    done = launch('bag:=/no/such/bag', f'model:={tiny_model_dir}', cwd=tmp_path)
    assert done.returncode != 0
    assert '/no/such/bag' in done.stdout, done.stdout
