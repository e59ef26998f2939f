"""The images' files: linted, and held to what they promise. Whether their install script works: `make docker-check`."""
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from test_packaging import PYPROJECT

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / 'docker'
IMAGES = ('cpu', 'cuda', 'jetson')
SCRIPTS = PYPROJECT['project']['scripts']


class _Loader(yaml.SafeLoader):
    """YAML with compose's own tag for what an earlier file says."""


_Loader.add_constructor('!reset', lambda loader, node: None)


def compose(name: str) -> dict:
    return yaml.load((DOCKER / name).read_text(), _Loader)


def instructions(image: str, name: str) -> list[str]:
    """Arguments of each such instruction of an image's file, continued lines joined."""
    lines = (DOCKER / f'{image}.Dockerfile').read_text().replace('\\\n', ' ').splitlines()
    return [line.partition(' ')[2].strip() for line in lines if line.startswith(f'{name} ')]


@pytest.mark.parametrize('image', IMAGES)
def test_dockerfiles_pass_hadolint(image):
    if not shutil.which('hadolint'):
        pytest.skip('hadolint is not installed')
    done = subprocess.run(['hadolint', '--no-color', '--config', DOCKER / 'hadolint.yaml', DOCKER / f'{image}.Dockerfile'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('script', ['install.sh', 'check.sh'])
def test_scripts_can_be_read_by_bash(script):
    assert subprocess.run(['bash', '-n', DOCKER / script], capture_output=True, text=True).stderr == ''


@pytest.mark.parametrize('image', IMAGES)
def test_images_run_the_one_install_script_without_rights_and_ask_the_node_how_it_is(image):
    assert ['docker/install.sh' in run for run in instructions(image, 'RUN')] == [True]
    assert instructions(image, 'USER') == ['10001']
    assert instructions(image, 'VOLUME') == ['/memory']
    (health,) = instructions(image, 'HEALTHCHECK')
    assert health.endswith('CMD ["/opt/statekv/run", "statekv-health"]')
    (distro,) = (value for value in instructions(image, 'ARG') if value.startswith('ROS_DISTRO'))
    assert distro == 'ROS_DISTRO=jazzy'


def test_compose_runs_commands_that_there_are_and_gives_them_what_they_need():
    services = compose('compose.yaml')['services']
    assert services.keys() == {'node', 'bag', 'view'}
    for name, service in services.items():
        assert service['cap_drop'] == ['ALL'] and service['read_only'], name
    assert [services[name]['command'][0] for name in services] == ['statekv-node', 'statekv-bag', 'statekv-view']
    assert {'statekv-node', 'statekv-bag', 'statekv-health'} <= SCRIPTS.keys()
    assert services['node']['ipc'] == 'shareable' and services['node']['shm_size'] == '512mb'
    assert {services[name]['ipc'] for name in ('bag', 'view')} == {'service:node'}, 'images travel through shared memory'
    assert 'memory:/memory' in services['node']['volumes']
    assert all(port.startswith('127.0.0.1:') for port in services['view']['ports'])


@pytest.mark.parametrize('name', ['compose.cuda.yaml', 'compose.robot.yaml'])
def test_compose_files_for_machines_change_services_that_there_are(name):
    assert compose(name)['services'].keys() <= compose('compose.yaml')['services'].keys()


def test_every_distribution_is_in_the_workflow_and_its_test_files_are_there():
    jobs = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())['jobs']
    assert jobs['distribution']['strategy']['matrix']['ros_distro'] == ['jazzy', 'kilted', 'rolling']
    steps = ' '.join(step.get('run', '') for step in jobs['distribution']['steps'])
    named = [word for word in steps.split() if word.startswith('test/')]
    assert named and all((ROOT / word).is_file() for word in named)
    assert jobs['wheels']['strategy']['matrix']['python'] == ['3.10', '3.11', '3.12']
