"""Large libraries imported without looking for garbage meanwhile."""
import gc
import subprocess
import sys

import pytest

from statekv_ros.imports import nothing_collected

LOOKS = """
import gc
looks = []
gc.callbacks.append(lambda phase, info: looks.append(info['generation']) if phase == 'start' else None)
import statekv_ros.backbones
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
print(looks.count(2))
"""


def test_transformers_and_torch_are_imported_without_a_look_at_everything():
    done = subprocess.run([sys.executable, '-c', LOOKS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, '0\n'), done.stderr


def test_who_has_switched_it_off_finds_it_so():
    try:
        gc.disable()
        before = gc.get_freeze_count()
        with nothing_collected():
            assert not gc.isenabled()
        assert not gc.isenabled() and gc.get_freeze_count() <= before
    finally:
        gc.enable()


def test_it_is_on_again_after_an_import_that_fails():
    with pytest.raises(ImportError), nothing_collected():
        raise ImportError('no such library')
    assert gc.isenabled()
