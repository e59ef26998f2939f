"""Big best-effort images arrive with the shipped Fast DDS profile; what it needs is found, or said."""
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from domains import new_domain
from statekv_ros import share, transport
from statekv_ros.bench import arguments
from statekv_ros.bench.transport import Case, measure, run
from statekv_ros.errors import ParameterError
from statekv_ros.transport import ProfileSource, find_shipped_profile, shared_memory_problem, use_shipped_profile


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No transport settings of the user; a domain of its own, on this machine only."""
    for name in (*transport.PROFILE_VARIABLES, 'FASTDDS_BUILTIN_TRANSPORTS', 'RMW_IMPLEMENTATION', 'ROS_DISTRO'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('ROS_DOMAIN_ID', str(new_domain()))
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.fixture
def restored_environment():
    """Undoes what use_shipped_profile sets."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize('width,height', [(640, 480), (1280, 720)])
def test_best_effort_images_arrive_with_the_shipped_profile(width, height, capsys):
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    case = dict(width=width, height=height, rate_hz=30.0, reliable=False)
    if problem := shared_memory_problem(processes=2):
        pytest.skip(problem)
    shipped = measure(Case(**case, seconds=10.0, shipped_profile=True))
    default = measure(Case(**case, seconds=2.0, shipped_profile=False))
    with capsys.disabled():     # a comparison for the reader of the log
        print(f'\n{width}x{height} rgb8 best-effort at 30 images/s'
              f'\n  shipped profile: {shipped}\n  Fast DDS defaults: {default}')
    assert shipped['sent'] == 300 and shipped['percent'] >= 99.0


def test_benchmark_reports_every_combination():
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    parser = argparse.ArgumentParser()
    arguments.transport(parser)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args(['--sizes', '64x48', '--seconds', '0.5', '--profiles', 'shipped', '--json'])
    result = run(args)
    assert [case['reliable'] for case in result['cases']] == [False, True]
    for case in result['cases']:
        assert case['sent'] == 15 and 0 < case['latency_ms_p50'] <= case['latency_ms_p95']
    assert result['cases'][1]['arrived'] == 15
    for bad in (['--sizes', '640'], ['--profiles', 'mine'], ['--rate', '0']):
        with pytest.raises(ParameterError, match=bad[0]):
            run(parser.parse_args(bad))


def test_shipped_profile_is_found_and_named_for_fast_dds(restored_environment):
    profile = use_shipped_profile()
    assert profile.source is ProfileSource.SHIPPED and profile.path == find_shipped_profile()
    assert os.environ['FASTDDS_DEFAULT_PROFILES_FILE'] == str(profile.path)
    assert 'FASTRTPS_DEFAULT_PROFILES_FILE' not in os.environ, 'Kilted warns of the old name'
    again = use_shipped_profile()
    assert (again.source, again.path) == (ProfileSource.SHIPPED, profile.path)


def test_jazzy_gets_the_name_that_its_fast_dds_knows(environment, restored_environment):
    environment.setenv('ROS_DISTRO', 'jazzy')
    use_shipped_profile()
    assert os.environ['FASTRTPS_DEFAULT_PROFILES_FILE'] == str(find_shipped_profile())


@pytest.mark.parametrize('name', ['FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE',
                                  'FASTDDS_BUILTIN_TRANSPORTS'])
def test_what_the_user_has_set_stays(environment, name):
    environment.setenv(name, 'mine')
    before = dict(os.environ)
    profile = use_shipped_profile()
    assert profile.source is ProfileSource.USER and name in profile.detail and dict(os.environ) == before


def test_profile_in_the_working_directory_is_the_users(tmp_path):
    Path('DEFAULT_FASTDDS_PROFILES.xml').write_text('<dds/>')
    before = dict(os.environ)
    assert use_shipped_profile().source is ProfileSource.USER and dict(os.environ) == before


def test_other_middleware_is_left_alone(environment):
    environment.setenv('RMW_IMPLEMENTATION', 'rmw_zenoh_cpp')
    before = dict(os.environ)
    assert use_shipped_profile().source is ProfileSource.OTHER and dict(os.environ) == before


def test_missing_profile_is_said(environment):
    environment.setattr(transport, 'PROFILE_NAME', 'no_such_profile.xml')
    profile = use_shipped_profile()
    assert profile.source is ProfileSource.MISSING and 'no_such_profile.xml' in profile.detail


def test_installed_profile_is_found_without_a_source_tree(tmp_path):
    """The package without the folders beside it, and the profile where colcon and pip install it."""
    (tmp_path / 'statekv_ros').mkdir()
    for module in (transport, share):
        shutil.copy(module.__file__, tmp_path / 'statekv_ros')
    installed = tmp_path / 'prefix/share/statekv_ros/config/fastdds_shm.xml'
    installed.parent.mkdir(parents=True)
    shutil.copy(find_shipped_profile(), installed)
    program = 'from statekv_ros import transport; print(transport.use_shipped_profile().path)'
    out = subprocess.run([sys.executable, '-c', program], text=True,
                         env=os.environ | {'AMENT_PREFIX_PATH': str(tmp_path / 'prefix'), 'PYTHONPATH': str(tmp_path)},
                         stdout=subprocess.PIPE, check=True).stdout
    assert out.strip() == str(installed)


def test_too_little_shared_memory_is_said_with_the_remedy(restored_environment):
    use_shipped_profile()
    assert shared_memory_problem(processes=0) is None
    problem = shared_memory_problem(processes=10**6)
    assert '/dev/shm' in problem and '--shm-size' in problem and str(find_shipped_profile()) in problem


def test_default_shared_memory_of_a_container_is_too_little():
    command = ('mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -c "from statekv_ros.transport import *; '
               'use_shipped_profile(); print(shared_memory_problem())"')
    done = subprocess.run(['unshare', '--map-root-user', '--mount', 'sh', '-c', command, sys.executable], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(transport.__file__).parents[1])
    if done.returncode:
        pytest.skip(f'this machine does not let a test mount a small /dev/shm: {done.stderr.strip()}')
    assert done.stdout.startswith('/dev/shm has 64 MB') and 'docker run --shm-size=512m' in done.stdout


def test_no_profile_needs_no_shared_memory():
    assert shared_memory_problem(processes=10**6) is None
