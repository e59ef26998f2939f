"""ROS domains for tests. A process has its own to itself, whatever else is tested on this machine meanwhile."""
import fcntl
import os
import tempfile
from collections import deque
from itertools import cycle
from pathlib import Path

_DOMAINS = 101      # 1 to 101 are those whose ports Fast DDS finds free on any Linux
_AT_ONCE = 10       # more than any test and the fixtures around it use
_BEGIN = int(os.environ.get('ROS_DOMAIN_ID', '0'))
_turn = cycle([(_BEGIN + number) % _DOMAINS + 1 for number in range(_DOMAINS)])
_held, _kept = deque(), []      # lock files; the lock of one goes with it, or with the process


def new_domain(keep: bool = False) -> int:
    """A ROS domain (1 to 101) that no other process of this user has, and the one that this one used longest ago.

    It is this process's for the next 9 calls, with `keep` for good. Raises RuntimeError where all are taken.
    """
    if len(_held) == _AT_ONCE:
        _held.popleft().close()
    folder = Path(tempfile.gettempdir(), f'statekv_ros_tests_{os.getuid()}')
    folder.mkdir(exist_ok=True)
    for _, domain in zip(range(_DOMAINS), _turn):
        lock = (folder / f'domain_{domain}').open('w')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            (_kept if keep else _held).append(lock)
            return domain
    raise RuntimeError(f'all {_DOMAINS} ROS domains are taken by other tests (locks in {folder}): wait for those to end')
