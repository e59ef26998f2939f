"""What watching will need of the device, main memory and the disk, by the node's parameters."""
from collections.abc import Callable

from statekv_ros.backbones import Backbone
from statekv_ros.memory import PrefillPolicy
from statekv_ros.memory.capacity import available_memory, detailed_bound, gigabytes, host_bound, make_plan, require_fit
from statekv_ros.memory.detailed.shares import is_main_memory
from statekv_ros.node.parameters import Parameters
from statekv_ros.store.hours import describe
from statekv_ros.thumbnails import likely_bytes

# Images come after the memory is planned; this size, height x width, stands for them.
ASSUMED_FRAME = (480, 640)


def require_memory(get: Parameters, backbone: Backbone, policy: PrefillPolicy, keeps_on_disk: bool,
                   log: Callable[[str], None]) -> tuple[int, int]:
    """Say what watching will need; bytes of each camera's detailed cache on the device and in main memory.

    Raises:
        ParameterError: it cannot fit.
    """
    names = get['cameras']
    rate_hz = sum(get[f'{name}.rate_hz'] for name in names) / len(names)
    plan = make_plan(backbone.size(*ASSUMED_FRAME), policy, rate_hz, len(names), positions=get['positions'],
                     detailed_format=get['detailed_format'])
    free, where = available_memory(backbone.device)
    free += plan.weights_bytes      # they are loaded already
    require_fit(plan, free, where)
    device = detailed_bound(plan, get['device_cache_mb'] * 10**6, free, where)
    host = host_bound(get['host_cache_mb'] * 10**6, len(names), backbone.device)
    disk = int(get['disk_cache_gb'] * 1e9) if keeps_on_disk else 0
    width = get['thumbnail.width']
    picture = likely_bytes(*ASSUMED_FRAME, width, get['thumbnail.quality']) if width else 0
    log(f'memory, for camera images of {ASSUMED_FRAME[1]}x{ASSUMED_FRAME[0]} ({plan.size.step_tokens} tokens per step): '
        f'weights {gigabytes(plan.weights_bytes)}, state {gigabytes(plan.state_bytes)}, workspace about '
        f'{gigabytes(plan.workspace_bytes)}, reserve {gigabytes(plan.reserve_bytes)}; '
        f'{describe(plan, device, host, disk, picture, is_main_memory(backbone.device))}')
    return device, host
