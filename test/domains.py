"""ROS domains for tests. Workers of pytest-xdist take theirs from sets that share none."""
import os
from itertools import cycle

_DOMAINS = 101      # 1 to 101 are those whose ports Fast DDS finds free on any Linux
_WORKERS = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
_WORKER = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw')) % _WORKERS
_BEGIN = int(os.environ.get('ROS_DOMAIN_ID', '0'))
_own = cycle([(_BEGIN + number) % _DOMAINS + 1 for number in range(_WORKER, _DOMAINS, _WORKERS)])


def new_domain() -> int:
    """A ROS domain (1 to 101) of this worker alone, and the one that it used longest ago."""
    return next(_own)
