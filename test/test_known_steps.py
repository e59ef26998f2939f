"""Hours of watching: what is known of each step is little, in a memory that watched them and in one that was brought back."""
import gc
import random
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statekv_ros import memory, store
from statekv_ros.store import MemoryStore
from statekv_ros.store.leaving import Held, Leaving
from statekv_ros.store.step_set import StepSet
from test_packed_memory import backbones  # noqa: F401
from test_restart_tiers import FORMATS, QUOTA, Watched

STEPS, BEFORE = 480, 100
MOST_BYTES = 300        # of a step
MOST_PEAK_BYTES = 1500  # of a step, while a memory is brought back; the headers of all steps at once are some 5 kB each


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """What gives the bytes that Python and NumPy have taken in the memory and the store since then, and still have."""
    ours = [tracemalloc.Filter(True, f'{Path(package.__file__).parent}/*') for package in (memory, store)]
    gc.collect()
    tracemalloc.start()

    def taken() -> int:
        gc.collect()
        return sum(line.size for line in tracemalloc.take_snapshot().filter_traces(ours).statistics('filename'))
    try:
        yield taken
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('form', FORMATS)
def test_a_step_that_lies_on_disk_takes_a_few_hundred_bytes_of_main_memory(form, backbones, frames, tmp_path):  # noqa: F811
    backbone = backbones['internvl']
    with MemoryStore.open(tmp_path / 'memory', {'model': 'tiny'}, QUOTA) as opened:
        watched = Watched(backbone, opened, form)
        watched.see(frames, 0, BEFORE)
        with traced() as taken:
            watched.see(frames, BEFORE, STEPS)
            assert taken() < MOST_BYTES * (STEPS - BEFORE)
        assert watched.stream.detailed.steps_below > STEPS - 60 and not watched.stream.forgotten_frames
    del watched
    with traced() as taken, MemoryStore.open(tmp_path / 'memory', {'model': 'tiny'}, QUOTA) as opened:
        again = Watched(backbone, opened, form)
        assert tracemalloc.get_traced_memory()[1] < MOST_PEAK_BYTES * STEPS
        assert again.stream.detailed.steps_below > STEPS - 60
        assert taken() < MOST_BYTES * STEPS


def test_set_of_steps_is_a_set_whatever_comes_and_goes():
    draw = random.Random(0)
    for _ in range(50):
        steps, right = StepSet([3, 4, 9]), {3, 4, 9}
        for _ in range(100):
            step = draw.randint(-2, 20)
            getattr(steps, name := draw.choice(['add', 'discard']))(step)
            getattr(right, name)(step)
            assert [step in steps for step in range(-3, 23)] == [step in right for step in range(-3, 23)]


def test_set_of_steps_that_follow_each_other_is_where_they_begin_and_end():
    steps = StepSet(range(28_800))
    steps.discard(0)
    assert steps._ends == [1, 28_800] and 28_799 in steps and 28_800 not in steps and 0 not in steps


@pytest.mark.parametrize('in_order', [True, False])
def test_what_may_leave_is_as_a_dict_in_the_order_of_age(in_order):
    draw = random.Random(0)
    for _ in range(50):
        leaving, right = Leaving(), OrderedDict()
        for age in range(100):
            camera, newest = draw.choice('ab'), max((step for _, step in right), default=0)
            name = camera, newest + draw.randint(0, 1) if in_order else draw.randint(0, 20)
            if name in right and draw.random() < .5:
                assert leaving.pop(name) == right.pop(name)
            else:
                leaving[name] = right[name] = Held(right[name].age if name in right else age, draw.randint(1, 9))
            assert list(leaving.items()) == list(right.items()) and list(leaving) == list(right)
            assert [leaving.get(each) for each in (name, ('c', 0))] == [right.get(name), None]
    with pytest.raises(KeyError):
        leaving['front', 0]
