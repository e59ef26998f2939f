"""Threads of the node share one heap, unless the user has chosen otherwise, and what is free in it is given back."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from live import image, memory_node

_PROGRAM = '''
import sys, threading
from pathlib import Path
from statekv_ros.node.allocator import use_one_arena
used = use_one_arena() if sys.argv[1] == "one" else None
held, done = [], threading.Barrier(5)
def work():
    held.append([bytes(3000) for _ in range(2000)])     # over 512 bytes: from malloc
    done.wait()
    done.wait()
for _ in range(4):
    threading.Thread(target=work).start()
done.wait()
print(used)
print(Path("/proc/self/maps").read_text())
done.wait()
'''
_HEAP_BYTES = 64 << 20      # glibc reserves the heaps of all arenas but the first in pieces of this size, at multiples of it


def thread_heaps(maps: str) -> int:
    """Heaps of glibc's other arenas in the text of /proc/PID/maps: what is in use, then what is reserved, 64 MB together."""
    lines = re.findall(r'^(\w+)-(\w+) (\S+) ', maps, re.MULTILINE)
    spans = [(int(first, 16), int(last, 16), mode) for first, last, mode in lines]
    return sum(used[2] == 'rw-p' and rest[2] == '---p' and used[1] == rest[0] and used[0] % _HEAP_BYTES == 0
               and rest[1] - used[0] == _HEAP_BYTES for used, rest in zip(spans, spans[1:]))


def run(arenas: str, **environment) -> tuple[str, int]:
    out = subprocess.run([sys.executable, '-c', _PROGRAM, arenas], env=os.environ | environment, text=True, check=True,
                         stdout=subprocess.PIPE).stdout
    return out.splitlines()[0], thread_heaps(out)


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch):
    for name in ('MALLOC_ARENA_MAX', 'GLIBC_TUNABLES'):
        monkeypatch.delenv(name, raising=False)


def test_threads_share_one_heap_and_have_their_own_without_the_setting():
    assert run('one') == ('True', 0)
    assert run('default')[1] > 0


@pytest.mark.parametrize('choice', [{'MALLOC_ARENA_MAX': '3'}, {'GLIBC_TUNABLES': 'glibc.malloc.arena_max=3'}])
def test_the_users_own_choice_stays(choice):
    used, heaps = run('one', **choice)
    assert used == 'False' and 0 < heaps


_HOLES = '''
import re
from pathlib import Path
from statekv_ros.memory.detailed.room import give_back_free_memory
def resident_mb():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, blocks = resident_mb(), [bytearray(60_000) for _ in range(1000)]
last = blocks.pop()     # at the heap's end
blocks.clear()
print(resident_mb() - before > 50, give_back_free_memory(), resident_mb() - before < 10)
'''


def test_what_is_free_behind_a_small_block_is_given_back():
    out = subprocess.run([sys.executable, '-c', _HOLES], text=True, check=True, stdout=subprocess.PIPE).stdout
    assert out.split() == ['True', 'True', 'True']


def test_a_watching_node_has_one_heap(tmp_path):
    with memory_node(tmp_path, 'patrol', cameras='[front]') as (node, graph):
        graph.publish(image(10**9))
        graph.wait_for_camera('front', frames_processed=1)
        assert thread_heaps(Path(f'/proc/{node.process.pid}/maps').read_text()) == 0
