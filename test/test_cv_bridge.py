"""cv_bridge where a distribution has it: the same pixels of every encoding as OpenCV's, and no harm where it is broken."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from statekv_ros.images import ENCODINGS, bridge_for

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / 'test' / 'cv_bridge_parity.py'
PYTHONS = sys.executable, '/usr/bin/python3'        # a distribution's packages are its own Python's
# What cv_bridge 1.16 converts; that of ROS 2 knows more. Images that are RGB already need no conversion.
CONVERTED = {'bgr8', 'rgba8', 'bgra8', 'mono8', 'bgr16', 'rgba16', 'bgra16', 'mono16', 'yuv422',
             *(f'bayer_{pattern}{bits}' for pattern in ('rggb', 'bggr', 'gbrg', 'grbg') for bits in (8, 16))}


def run(python: str, *arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    """In a clean environment: libraries of the ROS wheels are not that Python's."""
    return subprocess.run([python, *arguments], env={'PYTHONPATH': f'{path}:{ROOT}', 'PATH': '/usr/bin:/bin'},
                          capture_output=True, text=True, timeout=120)


def test_every_encoding_has_the_same_pixels_by_cv_bridge_as_by_opencv():
    needed = 'import cv2, numpy, PIL; from cv_bridge import CvBridge; CvBridge()'
    python = next((python for python in PYTHONS if Path(python).exists() and run(python, '-c', needed).returncode == 0), None)
    if python is None:
        pytest.skip(f'cv_bridge cannot be imported by any of {", ".join(PYTHONS)} (Debian and Ubuntu: python3-cv-bridge)')
    done = run(python, str(PARITY))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told['versions'])
    assert told['installed'] and told['encodings'].keys() == ENCODINGS.keys()
    assert {name for name, found in told['encodings'].items() if found['bridge']} >= CONVERTED
    for name, found in told['encodings'].items():
        assert found['apart'] == 0, name
        if found['bridge']:     # by itself it scales 16 bits, and takes no upper byte
            assert found['apart_unchecked'] <= (1 if '16' in name else 0), name


@pytest.mark.parametrize('module', [
    "raise ImportError('numpy.core.multiarray failed to import')", "raise AttributeError('_ARRAY_API not found')", '',
    'class CvBridge:\n    def imgmsg_to_cv2(self, message, encoding):\n        raise KeyError(message.encoding)',
    'class CvBridge:\n    def imgmsg_to_cv2(self, message, encoding):\n        return message.data[..., :3] // 2'])
def test_a_cv_bridge_that_does_not_work_is_left_alone_and_opencv_converts(module, tmp_path):
    (tmp_path / 'cv_bridge').mkdir()
    (tmp_path / 'cv_bridge' / '__init__.py').write_text(module)
    done = run(sys.executable, str(PARITY), path=tmp_path)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    told = json.loads(done.stdout)
    assert told['installed'] == ('class' in module)
    assert not any(found['bridge'] for found in told['encodings'].values()), 'none made the same pixels'


def test_only_a_conversion_asks_for_cv_bridge():
    assert bridge_for('rgb8') is None and bridge_for('rgb16') is None


def test_a_distribution_is_asked_for_cv_bridge_and_wheels_are_not():
    assert '<exec_depend>cv_bridge</exec_depend>' in (ROOT / 'package.xml').read_text()
    assert 'cv-bridge' not in (ROOT / 'pyproject.toml').read_text().lower().replace('_', '-')
