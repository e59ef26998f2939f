"""How pip builds the package: run CMakeLists.txt against ROS 2, then pack what it installed.

`colcon build` never runs this file (package.xml says ament_cmake). Metadata and dependencies are in pyproject.toml.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = 'statekv_ros'
GENERATED = ('msg', 'srv', 'action')
BUILD, STAGE = ROOT / 'build/pip/cmake', ROOT / 'build/pip/stage'


def ros_prefixes() -> list[Path]:
    """Prefixes whose share/ holds ROS packages: those of a sourced distribution, then the folders of ROS wheels.

    Raises RuntimeError when none of them has the interface generators.
    """
    named = [Path(p) for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    # Wheels install share/ beside lib/python3.x/site-packages: three folders up from any entry of sys.path.
    wheels = [Path(p).resolve().parents[2] for p in sys.path if Path(p).name in ('site-packages', 'dist-packages')]
    prefixes = [p for p in dict.fromkeys(named + wheels) if (p / 'share/ament_index').is_dir()]
    if not any((p / 'share/rosidl_default_generators').is_dir() for p in prefixes):
        raise RuntimeError(
            f'rosidl_default_generators was found neither beside this Python ({sys.prefix}) nor in AMENT_PREFIX_PATH '
            f'({os.environ.get("AMENT_PREFIX_PATH", "not set")}): run pip without --no-build-isolation, or '
            'install the build requirements of pyproject.toml first')
    return prefixes


def require_build_tools() -> None:
    """Raise RuntimeError, naming the package to install, without a C++ compiler or Python's own headers."""
    compilers = os.environ.get('CXX', 'c++ g++ clang++').split()
    if not any(map(shutil.which, compilers)):
        raise RuntimeError(f'no C++ compiler ({", ".join(compilers)}) found, and the messages of msg/, srv/ and '
                           'action/ are compiled: install one (Debian, Ubuntu: "apt install g++")')
    header = Path(sysconfig.get_paths()['include'], 'Python.h')
    if not header.is_file():
        version = f'{sys.version_info.major}.{sys.version_info.minor}'
        raise RuntimeError(f"{header} is missing: install Python's headers "
                           f'(Debian, Ubuntu: "apt install python{version}-dev")')


def drop_stale_build(inputs: str) -> None:
    """Keep the build directory, so that a rebuild takes seconds, only while it was made from the same `inputs`.

    An isolated build environment has a new folder each time, and its old one is gone.
    """
    record = BUILD / 'statekv_inputs.txt'
    if not record.is_file() or record.read_text() != inputs:
        shutil.rmtree(BUILD, ignore_errors=True)
        BUILD.mkdir(parents=True)
        record.write_text(inputs)
    shutil.rmtree(STAGE, ignore_errors=True)


def build_stage() -> None:
    """Run CMakeLists.txt; afterwards STAGE holds lib/ and share/ as an install prefix would."""
    require_build_tools()
    prefixes = [str(p) for p in ros_prefixes()]
    env = {**os.environ, 'AMENT_PREFIX_PATH': os.pathsep.join(prefixes),
           'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
    cmake = shutil.which('cmake')
    if cmake is None:
        raise RuntimeError('cmake was not found: run pip without --no-build-isolation, or "pip install cmake"')
    configure = [cmake, '-S', str(ROOT), '-B', str(BUILD), '-DCMAKE_BUILD_TYPE=Release', '-DBUILD_TESTING=OFF',
                 f'-DCMAKE_PREFIX_PATH={";".join(prefixes)}', f'-DCMAKE_INSTALL_PREFIX={STAGE}',
                 f'-DPython3_EXECUTABLE={sys.executable}', *(['-GNinja'] if shutil.which('ninja') else [])]
    drop_stale_build('\n'.join([*configure, *sys.path]))
    for command in (configure, [cmake, '--build', str(BUILD), '--parallel', str(os.cpu_count() or 1)],
                    [cmake, '--install', str(BUILD), '--strip']):
        subprocess.run(command, check=True, env=env)


class BuildFromStage(build_py):
    """Takes the Python package from the stage and hands the rest of the stage to pip as data files."""

    def run(self) -> None:
        super().run()
        try:
            build_stage()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            # Not an Exception: setuptools' editable install swallows those and reports success.
            raise SystemExit(f'{PACKAGE}: building the interfaces failed: {error}') from error
        staged = next(STAGE.rglob(f'{PACKAGE}/__init__.py')).parent
        if self.editable_mode:
            self.put_generated_modules(staged, ROOT / PACKAGE)
        else:
            shutil.copytree(staged, Path(self.build_lib) / PACKAGE, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns('*.c'))
        self.distribution.data_files[:] = self.prefix_files(python_dir=staged.parent)

    @staticmethod
    def put_generated_modules(staged: Path, source: Path) -> None:
        """An editable install runs from the source tree, so what was generated must lie there (git ignores it)."""
        for name in GENERATED:
            shutil.rmtree(source / name, ignore_errors=True)
            if (staged / name).is_dir():
                shutil.copytree(staged / name, source / name, ignore=shutil.ignore_patterns('*.c'))
        for library in staged.glob('*.so'):
            fresh = source / f'new_{library.name}'
            shutil.copy2(library, fresh)
            fresh.replace(source / library.name)    # not written in place: a node that runs has it mapped

    @staticmethod
    def prefix_files(python_dir: Path) -> list[tuple[str, list[str]]]:
        """(folder under the prefix, files) of the shared libraries, executables, launch files and the ament index."""
        folders: dict[str, list[str]] = {}
        for file in sorted(STAGE.rglob('*')):
            folder = file.relative_to(STAGE).parent
            if file.is_file() and folder.parts[0] in ('lib', 'share') and python_dir not in file.parents:
                folders.setdefault(str(folder), []).append(os.path.relpath(file, ROOT))
        return list(folders.items())


class PlatformDistribution(Distribution):
    """A wheel with compiled messages, for one platform and one Python."""

    def has_ext_modules(self) -> bool:
        return True

    def has_data(self) -> bool:
        # setuptools' editable install asks for this name; without it `pip install -e .` drops the data files silently.
        return self.has_data_files()


def packages() -> list[str]:
    """Every Python package: statekv_ros/ without the generated ones, and kernels/ as statekv_ros.kernels."""
    generated = [f'{PACKAGE}.{name}{tail}' for name in GENERATED for tail in ('', '.*')]
    own = find_packages(include=[PACKAGE, f'{PACKAGE}.*'], exclude=generated)
    kernels = [f'{PACKAGE}.{name}' for name in find_packages(include=['kernels', 'kernels.*'])]
    return own + kernels


setup(
    packages=packages(),
    package_dir={f'{PACKAGE}.kernels': 'kernels'},
    data_files=[],
    cmdclass={'build_py': BuildFromStage},
    distclass=PlatformDistribution,
)
