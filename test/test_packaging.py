"""The package as a user gets it: from `colcon build`, as a wheel, and what its metadata promises."""
import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from xml.etree import ElementTree

import pytest

try:
    import tomllib
except ModuleNotFoundError:     # Python 3.10; pytest brings this one there
    import tomli as tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import statekv_ros

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
SOURCE_FOLDERS = ('statekv_ros', 'kernels', 'msg', 'srv', 'action', 'launch', 'config', 'models')
GENERATED = tuple(ROOT / 'statekv_ros' / name for name in ('msg', 'srv', 'action'))
BUILD_TIMEOUT_S = 300
ROS_PREFIXES = os.environ.get('AMENT_PREFIX_PATH') or sys.prefix
# Asks a service and an action of the package's own types, from the interpreter that runs it, and says where everything came from.
ASK_BOTH = '''
import rclpy, statekv_ros, statekv_ros.kernels, statekv_ros.msg
from rclpy.action import ActionClient, ActionServer
from statekv_ros.action import Ask
from statekv_ros.msg import Answer, Evidence
from statekv_ros.srv import Query

def answer(request, response):
    response.success = True
    response.answers = [Answer(text=request.question.upper(), evidence=[Evidence(share=0.5)])]
    return response

rclpy.init()
node = rclpy.create_node('packaging_test')
node.create_service(Query, '~/query', answer)
client = node.create_client(Query, '~/query')
assert client.wait_for_service(30.0)
future = client.call_async(Query.Request(question='seen?'))
rclpy.spin_until_future_complete(node, future, timeout_sec=30.0)
print(future.result().answers[0].text, future.result().answers[0].evidence[0].share)

def execute(goal):
    goal.publish_feedback(Ask.Feedback(text=goal.request.question))
    goal.abort()
    return Ask.Result(error_code=Ask.Result.CANCELED)

server, asker = ActionServer(node, Ask, '~/ask', execute), ActionClient(node, Ask, '~/ask')
assert asker.wait_for_server(30.0)
accepted = asker.send_goal_async(Ask.Goal(question='seen?'))
rclpy.spin_until_future_complete(node, accepted, timeout_sec=30.0)
result = accepted.result().get_result_async()
rclpy.spin_until_future_complete(node, result, timeout_sec=30.0)
print(result.result().result.error_code)
for module in (statekv_ros, statekv_ros.kernels, statekv_ros.msg):
    print(module.__file__)
'''


def ros_comes_from_wheels() -> bool:
    try:
        return bool(version('ros-rclpy'))
    except PackageNotFoundError:
        return False


needs_wheels = pytest.mark.skipif(not ros_comes_from_wheels(), reason='ROS comes from a distribution here: pip does not '
                                  'build the package')


def run(*command: str, cwd: Path, **environment: str) -> str:
    """stdout of a command that must succeed; the assertion shows all of its output."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, timeout=BUILD_TIMEOUT_S,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f'{" ".join(command)} exited with {done.returncode}:\n{done.stdout}'
    return done.stdout


def copy_sources(target: Path) -> Path:
    """What a clone holds, without what builds have put into this tree."""
    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in ('__pycache__', 'build', 'install', 'log') or name.endswith('.so')
                or name.startswith(('.git', '.venv', '.hypothesis', '.pytest_cache')) or Path(folder, name) in GENERATED]
    return shutil.copytree(ROOT, target, ignore=ignore)


def python_modules() -> set[str]:
    """Every hand-written module, as its path under site-packages."""
    own = [path.relative_to(ROOT) for path in ROOT.glob('statekv_ros/**/*.py')
           if not any(folder in path.parents for folder in GENERATED)]
    kernels = ['statekv_ros' / path.relative_to(ROOT) for path in ROOT.glob('kernels/**/*.py')]
    return {str(path) for path in [*own, *kernels]}


def share_files() -> set[str]:
    """What must lie in share/statekv_ros."""
    files = [path.relative_to(ROOT) for name in ('msg', 'srv', 'action', 'launch', 'config', 'models')
             for path in (ROOT / name).rglob('*') if path.is_file() and '__pycache__' not in path.parts]
    return {'package.xml', 'trees/statekv_nodes.xml', *map(str, files)}


def compiled() -> set[str]:
    """What is compiled for CPUs, beside the modules; on some machines there is more."""
    return {f'statekv_ros/{path.parents[1].name}_any.so' for path in ROOT.glob('kernels/*/cpp/*.cpp')}


def executables() -> set[str]:
    return {name.replace('-', '_') for name in PYPROJECT['project']['scripts']}


def interfaces() -> set[str]:
    """Names of the types in msg/, srv/ and action/."""
    return {path.stem for folder in ('msg', 'srv', 'action') for path in (ROOT / folder).iterdir()}


@pytest.fixture(scope='module')
def colcon_prefix(tmp_path_factory) -> Path:
    """Prefix of the package, built and installed by colcon in a workspace of its own."""
    pytest.importorskip('colcon_core', reason='colcon is not installed (colcon-common-extensions)')
    workspace = tmp_path_factory.mktemp('workspace')
    copy_sources(workspace / 'src/statekv_ros')
    run('colcon', 'build', '--cmake-args', '-DBUILD_TESTING=OFF', f'-DPython3_EXECUTABLE={sys.executable}',
        '-DCMAKE_BUILD_TYPE=None',      # what is generated is much: not optimised, it is compiled in half of the time
        cwd=workspace, PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        CMAKE_PREFIX_PATH=ROS_PREFIXES, AMENT_PREFIX_PATH=ROS_PREFIXES)
    return workspace / 'install/statekv_ros'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """The wheel that `pip install .` makes here, where the editable install has compiled the same messages before."""
    folder = tmp_path_factory.mktemp('wheel')
    for left in ('lib', f'bdist.{sysconfig.get_platform()}'):       # of an earlier wheel: modules that are no more would come along
        shutil.rmtree(ROOT / 'build' / left, ignore_errors=True)
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', str(folder), '.',
        cwd=ROOT, AMENT_PREFIX_PATH=ROS_PREFIXES)
    return next(folder.glob('*.whl'))


def test_colcon_installs_every_module(colcon_prefix):
    site = next(colcon_prefix.rglob('statekv_ros/__init__.py')).parents[1]
    installed = {str(path.relative_to(site)) for path in site.glob('statekv_ros/**/*.py')}
    assert python_modules() <= installed
    assert [name for name in compiled() if not (site / name).is_file()] == []


def test_colcon_installs_launch_config_and_interfaces(colcon_prefix):
    share = colcon_prefix / 'share/statekv_ros'
    assert [name for name in sorted(share_files()) if not (share / name).is_file()] == []
    assert (colcon_prefix / 'share/ament_index/resource_index/packages/statekv_ros').is_file()


def test_colcon_installs_an_executable_for_every_console_script(colcon_prefix):
    found = {path.name for path in (colcon_prefix / 'lib/statekv_ros').iterdir() if os.access(path, os.X_OK)}
    assert found == executables()
    # --symlink-install links to the built ones.
    built = colcon_prefix.parents[1] / 'build/statekv_ros/executables'
    assert all(os.access(built / name, os.X_OK) for name in executables())


def test_types_and_kernels_work_from_a_sourced_workspace(colcon_prefix):
    setup = colcon_prefix.parent / 'local_setup.bash'
    output = run('bash', '-c', f'source {setup} && exec {sys.executable} -c "$0"', ASK_BOTH, cwd=colcon_prefix,
                 AMENT_PREFIX_PATH=ROS_PREFIXES, ROS_AUTOMATIC_DISCOVERY_RANGE='LOCALHOST')
    reply, code, *files = output.split('\n')[-6:-1]
    assert (reply, code) == ('SEEN? 0.5', '10009')
    assert all(file.startswith(str(colcon_prefix)) for file in files), files


@needs_wheels
def test_wheel_holds_modules_launch_config_and_interfaces(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    data = next(name for name in names if '.data/data/' in name).split('.data/data/')[0] + '.data/data/'
    assert python_modules() | compiled() <= names
    assert {f'{data}share/statekv_ros/{name}' for name in share_files()} <= names
    assert f'{data}share/ament_index/resource_index/packages/statekv_ros' in names
    assert all(modes[f'{data}lib/statekv_ros/{name}'] & 0o111 for name in executables())


@needs_wheels
def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    run(sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'venv'), cwd=tmp_path)
    python = tmp_path / 'venv/bin/python'
    run(sys.executable, '-m', 'pip', '--python', str(python), 'install', '--no-deps', str(wheel), cwd=tmp_path, PYTHONPATH='')
    # All else comes from the tests' environment; PYTHONPATH reads no .pth files, so not its editable statekv_ros.
    dependencies = next(path for path in sys.path if path.startswith(sys.prefix) and path.endswith('-packages'))
    libraries = [str(tmp_path / 'venv/lib'), os.environ.get('LD_LIBRARY_PATH', '')]
    output = run(str(python), '-c', ASK_BOTH, cwd=tmp_path, PYTHONPATH=dependencies,
                 LD_LIBRARY_PATH=os.pathsep.join(libraries), ROS_AUTOMATIC_DISCOVERY_RANGE='LOCALHOST',
                 AMENT_PREFIX_PATH=os.pathsep.join([str(tmp_path / 'venv'), ROS_PREFIXES]))
    reply, code, *files = output.split('\n')[-6:-1]
    assert (reply, code) == ('SEEN? 0.5', '10009')
    assert all(file.startswith(str(tmp_path)) for file in files), files


@needs_wheels
def test_message_that_cannot_be_compiled_fails_the_editable_install(tmp_path):
    """setuptools reports success when a build step of an editable install raises an ordinary exception."""
    source = copy_sources(tmp_path / 'source')
    (source / 'msg/Evidence.msg').write_text('no_such_type x\n')
    done = subprocess.run([sys.executable, '-c', 'from setuptools import build_meta; build_meta.build_editable(".")'],
                          cwd=source, env={**os.environ, 'AMENT_PREFIX_PATH': ROS_PREFIXES}, timeout=BUILD_TIMEOUT_S,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode != 0
    assert 'building the interfaces failed' in done.stdout


def test_unsuitable_python_is_an_error_that_names_it(tmp_path):
    done = subprocess.run(['make', 'check-machine', 'PYTHON=/no/such/python'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert '/no/such/python' in done.stderr and '3.11' in done.stderr


def test_interfaces_are_the_ones_in_msg_srv_and_action():
    from statekv_ros import action, msg, srv
    assert {name for module in (msg, srv, action) for name in dir(module)} >= interfaces()


@pytest.mark.parametrize('script', PYPROJECT['project']['scripts'].values())
def test_console_script_names_a_function(script):
    module, function = script.split(':')
    assert callable(getattr(importlib.import_module(module), function))


def test_version_and_licence_are_the_same_everywhere():
    manifest = ElementTree.parse(ROOT / 'package.xml').getroot()
    newest = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)[1]
    assert manifest.findtext('version') == PYPROJECT['project']['version'] == statekv_ros.__version__ == newest
    assert manifest.findtext('license') == PYPROJECT['project']['license'] == 'Apache-2.0'
    assert 'Apache License' in (ROOT / 'LICENSE').read_text()


def requirements(*lists: list[str]) -> list[Requirement]:
    return [Requirement(text) for one in lists for text in one]


def pins() -> dict[str, list[Requirement]]:
    """Lines of constraints.txt by distribution; one line per range of Python versions."""
    pinned: dict[str, list[Requirement]] = {}
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        if line and not line.startswith('#'):
            requirement = Requirement(line)
            pinned.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pinned


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12'])
def test_every_dependency_has_one_exact_pin_within_its_range(python):
    project, pinned = PYPROJECT['project'], pins()
    for wanted in requirements(PYPROJECT['build-system']['requires'], project['dependencies'],
                               *project['optional-dependencies'].values()):
        lines = [pin for pin in pinned.get(canonicalize_name(wanted.name), [])
                 if pin.marker is None or pin.marker.evaluate({'python_version': python})]
        assert len(lines) == 1, f'{wanted.name} on Python {python}: {list(map(str, lines))} in constraints.txt'
        (specifier,) = lines[0].specifier
        assert specifier.operator == '==' and wanted.specifier.contains(specifier.version), f'{lines[0]} for {wanted}'


NAMED_OTHERWISE = {'tf2_ros_py': 'tf2_ros'}     # ROS packages, and what they are imported by


def imported_packages(folders: tuple[str, ...]) -> set[str]:
    """Top-level names that the sources import and that are neither the standard library's nor ours."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob('*.py')):
        if any(generated in path.parents for generated in GENERATED):
            continue
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.Import):
                names |= {alias.name.partition('.')[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom) and not statement.level:
                names.add(statement.module.partition('.')[0])
    return names - set(sys.stdlib_module_names) - {'statekv_ros', 'kernels'}


PACKAGES = {'tf2_ros': 'tf2_ros_py'}    # ROS packages whose module has another name


@needs_wheels
def test_every_import_is_a_declared_dependency():
    """In package.xml for ROS packages, in pyproject.toml for all that pip installs."""
    manifest = ElementTree.parse(ROOT / 'package.xml').getroot()
    ros = {element.text for tag in ('depend', 'exec_depend') for element in manifest.iter(tag)}
    ros |= {module for package, module in NAMED_OTHERWISE.items() if package in ros}
    extras = {name: wanted for name, wanted in PYPROJECT['project']['optional-dependencies'].items() if name != 'test'}
    python = {canonicalize_name(wanted.name) for wanted in requirements(PYPROJECT['project']['dependencies'], *extras.values())}
    distributions = packages_distributions()
    # What is not installed, as an extra may be, has the name that it is imported by.
    undeclared = {name: distributions.get(name, [name]) for name in imported_packages(('statekv_ros', 'kernels', 'launch'))
                  if PACKAGES.get(name, name) not in ros and python.isdisjoint(map(canonicalize_name, distributions.get(name, [name])))}
    assert undeclared == {}


# Of those that are tempting.
NEWER = {'typing': {'Self', 'LiteralString', 'Never', 'NotRequired', 'Required', 'TypeVarTuple', 'Unpack', 'assert_never', 'assert_type',
                    'dataclass_transform', 'override', 'reveal_type'},
         'enum': {'StrEnum', 'member', 'nonmember'}, 'datetime': {'UTC'}, 'contextlib': {'chdir'}, 'itertools': {'batched'},
         'asyncio': {'TaskGroup', 'Runner', 'timeout', 'Barrier'}, 'tomllib': {'load', 'loads'}}


def test_nothing_is_imported_that_the_oldest_python_lacks():
    assert PYPROJECT['project']['requires-python'].startswith('>=3.10'), 'what came with which Python is written down above'
    found = [f'{path.relative_to(ROOT)}:{statement.lineno}: {alias.name}'
             for folder in ('statekv_ros', 'kernels', 'launch') for path in (ROOT / folder).rglob('*.py')
             for statement in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10)))
             if isinstance(statement, ast.ImportFrom) for alias in statement.names if alias.name in NEWER.get(statement.module, ())]
    assert not found


@needs_wheels
def test_ros_packages_come_as_wheels_where_no_distribution_supplies_them():
    """Every interface package that package.xml names is in pyproject.toml too; launch has no wheel."""
    manifest = ElementTree.parse(ROOT / 'package.xml').getroot()
    wheels = {wanted.name.removeprefix('ros-kilted-').replace('-', '_')
              for wanted in requirements(PYPROJECT['project']['dependencies']) if wanted.name.startswith('ros-kilted-')}
    messages = {element.text for tag in ('depend', 'exec_depend') for element in manifest.iter(tag)
                if re.fullmatch(r'\w+_msgs', element.text)}
    assert messages <= wheels


@pytest.mark.parametrize('machine, wanted', [('x86_64', True), ('aarch64', True), ('riscv64', False)])
def test_triton_comes_along_where_it_has_wheels(machine, wanted):
    [triton] = [each for each in map(Requirement, PYPROJECT['project']['dependencies']) if each.name == 'triton']
    assert triton.marker.evaluate({'sys_platform': 'linux', 'platform_machine': machine}) == wanted
    assert not triton.marker.evaluate({'sys_platform': 'darwin', 'platform_machine': 'aarch64'})
