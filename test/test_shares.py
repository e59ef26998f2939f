"""What bounds on the device and on main memory are used for: never more than they are."""
import pytest

from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.memory import parse_prefill_policy
from statekv_ros.memory.capacity import make_plan
from statekv_ros.memory.detailed.shares import share_out
from statekv_ros.store.hours import tier_hours


@pytest.mark.parametrize('device', [0, 7, 8 * 10**6])
@pytest.mark.parametrize('host', [0, 9, 10**7])
@pytest.mark.parametrize('below', [False, True])
@pytest.mark.parametrize('one_memory', [False, True])
def test_steps_and_what_is_staged_are_no_more_than_the_bounds(device, host, below, one_memory):
    rows, in_main_memory, staging, lent = share_out(device, host, below, one_memory)
    assert in_main_memory + lent == host
    if device:
        assert rows + staging - lent == device
    else:
        assert rows == lent == 0 and bool(staging) == bool(host or below), 'no bound is none'
    if not below or not one_memory:
        assert not lent, 'what main memory alone has is not given up, and a GPU reads from its own'
    elif device and host:
        assert lent == host - host // 4


def test_a_plan_counts_what_main_memory_lends_where_it_is_the_devices():
    plan = make_plan(PUBLISHED['Qwen3-VL-2B'].size(448, 448), parse_prefill_policy('statekv(4096)'), 1.0)
    apart, one = (tier_hours(plan, 10**9, 4 * 10**9, 10**11, one_memory=one_memory) for one_memory in (False, True))
    assert one.host == apart.host / 4 and (one.device, one.disk) == (apart.device, apart.disk)
    assert tier_hours(plan, 10**9, 4 * 10**9, 0, one_memory=True).host == apart.host
