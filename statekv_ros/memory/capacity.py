"""What a configuration will need in memory, before the first frame: weights, carried state, detailed cache, workspace."""
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.backbones.size import ModelSize
from statekv_ros.errors import ParameterError
from statekv_ros.memory.answering.reading import MOST_IN_PARTS, MOST_SCORES
from statekv_ros.memory.detailed.cache import PAGE_TOKENS
from statekv_ros.memory.detailed.formats import RAW, find_format
from statekv_ros.memory.detailed.pages import page_lengths
from statekv_ros.memory.detailed.shares import is_main_memory
from statekv_ros.memory.detailed.sizes import index_bytes, step_bytes
from statekv_ros.memory.policies import UNLIMITED, PrefillPolicy

_TAG_BYTES = 12         # per slot of the compressed state: int64 ordinal and fp32 importance,
_PLACE_BYTES = 32       # and four int64 of its place, unless positions are native;
_RANK_BYTES = 32        # four int64 while it is ranked
_SECONDS_PER_HOUR = 3600
_PRODUCT_BYTES = 2**25          # workspace of matrix products that torch keeps for a stream: 32 MiB on sm_90, 8 on most others
_VISION_TOKEN_BYTES = 2**17     # temporaries of a vision tower's layer: 4 patches a token, 12 times 1280 numbers of 2 bytes
_SLICE_TOKENS = 64              # of a question, read at once, unless the parameter "slice_tokens" is set to more than 16


@dataclass(frozen=True)
class Plan:
    """Bytes that a configuration needs; all cameras together.

    Attributes:
        state_bytes: what is carried from step to step, once it is full.
        detailed_bytes_per_token: of keys and values in their format, scales and what says where they lie included.
        detailed_bytes_per_hour: growth of the detailed cache; detailed_bytes: after `hours`, or its bound. Without the index,
            and without the mean key of each step that the answer policy `retrieve` adds.
        index_bytes_per_hour, index_bytes: the same of the pages' index: growth over hours; what it is after `hours`, its newest
            pages included, which take more.
        workspace_bytes: estimate of a step's temporaries.
        reserve_bytes: estimate of what a GPU takes besides: for each camera the memory of its recorded steps, where a step's
            temporaries lie once more, and the workspace of its matrix products, and that of the recorded selection after them and
            of a recorded token of an answer; where there are several, that of the steps for all of them as one batch, recorded
            or not; temporaries of the vision tower; scores and masses of an answer, and the copy of one camera's state that it
            reads.
        steps_per_hour: frame steps.
    """
    size: ModelSize
    policy: PrefillPolicy
    cameras: int
    hours: float
    weights_bytes: int
    state_bytes: int
    detailed_bytes_per_token: float
    detailed_bytes_per_hour: int
    detailed_bytes: int
    index_bytes_per_hour: int
    index_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    detailed_format: str
    steps_per_hour: float

    @property
    def total_bytes(self) -> int:
        return self.at_start_bytes + self.detailed_bytes + self.index_bytes

    @property
    def at_start_bytes(self) -> int:
        """Without the detailed cache and its index: what must fit for the node to run at all."""
        return self.weights_bytes + self.state_bytes + self.workspace_bytes + self.reserve_bytes

    def hours_until_full(self, available_bytes: int) -> float:
        """Hours of watching until the detailed cache and its index have filled what is left of `available_bytes`."""
        left, per_hour = available_bytes - self.at_start_bytes, self.detailed_bytes_per_hour + self.index_bytes_per_hour
        return max(0.0, left / per_hour) if per_hour else float('inf')


def make_plan(size: ModelSize, policy: PrefillPolicy, rate_hz: float, cameras: int = 1, hours: float = 1.0,
              device_cache_bytes: int = 0, positions: str = '', detailed_format: str = RAW.name) -> Plan:
    """Count bytes for `cameras` cameras that are each watched at `rate_hz` frames per second.

    Args:
        device_cache_bytes: bound of each camera on the device, where nothing lies below it; 0 for none.
        positions, detailed_format: as a `VideoStream` takes them.

    Raises:
        ParameterError: the format is unknown, or cannot hold the model's heads.
    """
    steps_per_hour = rate_hz * _SECONDS_PER_HOUR / size.frames_per_step
    step = step_bytes(layout_of(size), find_format(detailed_format), size.position_axes, size.step_tokens, PAGE_TOKENS)
    held = steps_per_hour * hours
    if device_cache_bytes:
        held = min(held, device_cache_bytes / step.rows)
    state = _state_bytes(size, policy, positions, steps_per_hour * hours)
    index = index_bytes(layout_of(size), round(held * len(page_lengths(size.step_tokens, PAGE_TOKENS))))
    return Plan(size, policy, cameras, hours, size.weights_bytes, cameras * state, step.rows / size.step_tokens,
                cameras * round(steps_per_hour * step.rows), cameras * round(held * step.rows),
                cameras * round(steps_per_hour * step.index), cameras * index,
                _workspace_bytes(size, policy), _reserve_bytes(size, policy, cameras, state), detailed_format,
                cameras * steps_per_hour)


def layout_of(size: ModelSize) -> KVLayout:
    """Of a model's keys and values, on no device."""
    dtype = torch.float32 if size.value_bytes == 4 else torch.bfloat16
    return KVLayout(size.layers, size.kv_heads, size.head_dim, dtype, torch.device('meta'))


def require_fit(plan: Plan, available_bytes: int, where: str) -> None:
    """Refuse a configuration that cannot run.

    Args:
        available_bytes: memory that is there for it, weights included.
        where: name of that memory, for the message.

    Raises:
        ParameterError: it does not fit; names the part that is too large and the parameter to change.
    """
    if plan.at_start_bytes <= available_bytes:
        return
    parts = {
        f'a state of {plan.policy} for {plan.cameras} camera(s)': (plan.state_bytes, 'lower "budget" or "window_frames"'),
        f'workspace for {plan.size.step_tokens} tokens per step': (plan.workspace_bytes, 'lower "budget" or "max_frame_pixels"'),
        f'a reserve for {plan.cameras} camera(s) and answers': (plan.reserve_bytes, 'lower "budget", or watch fewer "cameras"'),
        'the weights': (plan.weights_bytes, 'take a smaller "model", "dtype" or "weights"'),
    }
    part, (size, remedy) = max(parts.items(), key=lambda item: item[1][0])
    raise ParameterError(f'this configuration needs {gigabytes(plan.at_start_bytes)}, but {where} has '
                         f'{gigabytes(available_bytes)}: most of it, {gigabytes(size)}, is {part}; {remedy}')


def detailed_bound(plan: Plan, asked_bytes: int, available_bytes: int, where: str) -> int:
    """Bytes that each camera's detailed cache may take: what is asked for, else a share of half of what is left.

    The other half is for the rest of the robot, and for the moment in which the cache grows and lies in memory twice.

    Args:
        asked_bytes: per camera; 0 for the default.
        available_bytes, where: as of `require_fit`, which must have passed.

    Raises:
        ParameterError: what is asked for cannot fit, or does not hold a single step.
    """
    left = available_bytes - plan.at_start_bytes
    step_bytes = plan.size.step_tokens * plan.size.kv_bytes_per_token
    bound = asked_bytes or left // 2 // plan.cameras
    if asked_bytes * plan.cameras > left:
        raise ParameterError(f'device_cache_mb of {plan.cameras} camera(s) takes {gigabytes(asked_bytes * plan.cameras)}, but '
                             f'{where} has {gigabytes(max(0, left))} left for it: lower "device_cache_mb", or set it to 0')
    if bound < step_bytes:
        raise ParameterError(f'a detailed cache of {gigabytes(bound)} does not hold one step of {plan.size.step_tokens} tokens, '
                             f'{gigabytes(step_bytes)}: ' + ('raise "device_cache_mb"' if asked_bytes else
                                                             'take a smaller "model" or "max_frame_pixels"'))
    return bound


def host_bound(asked_bytes: int, cameras: int, device: torch.device) -> int:
    """Bytes of main memory that each camera's steps may take once they have left the device.

    Args:
        asked_bytes: per camera; below 0 for the default, a share of a quarter of what is free, or none where device and main
            memory are one.

    Raises:
        ParameterError: what is asked for cannot fit.
    """
    if asked_bytes == 0 or asked_bytes < 0 and is_main_memory(device):
        return 0
    free, where = available_memory(torch.device('cpu'))
    if asked_bytes < 0:
        return free // 4 // cameras
    if asked_bytes * cameras > free:
        raise ParameterError(f'host_cache_mb of {cameras} camera(s) takes {gigabytes(asked_bytes * cameras)}, but {where} has '
                             f'{gigabytes(free)} left for it: lower "host_cache_mb", or set it to 0')
    return asked_bytes


def available_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that can be had on a device, and its name.

    A GPU without memory of its own (Jetson, DGX Spark) reports as free what nobody uses, and leaves out what the kernel would
    give back of its page cache: on a robot that records bags or has just read a checkpoint, that is most of it. There, and on a
    CPU, it is Linux's own estimate (MemAvailable) that counts.
    """
    if device.type != 'cuda':
        return _available_main_memory(), 'this machine\'s main memory'
    free, name = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    return (max(free, _available_main_memory()) if is_main_memory(device) else free), name


def _available_main_memory() -> int:
    try:
        lines = dict(line.split(':', 1) for line in Path('/proc/meminfo').read_text().splitlines())
        return int(lines['MemAvailable'].split()[0]) * 1024
    except (OSError, KeyError, ValueError):     # not Linux, or an old one
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def gigabytes(size: float) -> str:
    """Bytes in words: MB are 10^6 bytes, GB 10^9, TB 10^12."""
    if size < 1e9:
        return f'{size / 1e6:.1f} MB'
    return f'{size / 1e9:.2f} GB' if size < 1e13 else f'{size / 1e12:.0f} TB'


def _state_bytes(size: ModelSize, policy: PrefillPolicy, positions: str, steps: float) -> int:
    token, step = size.kv_bytes_per_token, size.step_tokens
    if policy.kind == 'statekv':
        budget = policy.budget if policy.budget < UNLIMITED else round(steps * step)
        slot = _TAG_BYTES + (0 if positions == 'native' else _PLACE_BYTES)
        return (budget + step) * (token + size.layers * size.kv_heads * slot)
    # The buffer of recent frames is moved to its front when full, so it has room for twice what it holds.
    held = {'window': -(-policy.window_frames // size.frames_per_step), 'rekv': policy.window_tokens / step, 'full': steps,
            'none': 0}[policy.kind]
    return round(2 * (held + 1) * step * token)


def _workspace_bytes(size: ModelSize, policy: PrefillPolicy) -> int:
    """Largest temporaries of one decoder layer, a matrix of 8 bits made wide for its product, and the logits of one token."""
    tokens, value = size.step_tokens, size.value_bytes
    keys = tokens + (policy.budget if policy.kind == 'statekv' and policy.budget < UNLIMITED else tokens)
    projections = tokens * (size.q_heads + 2 * size.kv_heads) * size.head_dim * value
    feed_forward = tokens * (3 * size.mlp + 4 * size.hidden) * value
    # Scores and their softmax, for the query heads of one KV head at a time (the naive twin; fused kernels need none).
    scores = 2 * tokens * (size.q_heads // size.kv_heads) * keys * 4
    return max(feed_forward, projections + scores) + 4 * size.vocabulary + size.unpacked_bytes


def _reserve_bytes(size: ModelSize, policy: PrefillPolicy, cameras: int, state_bytes: int) -> int:
    """state_bytes: of one camera."""
    workspace, vision = _workspace_bytes(size, policy), size.step_tokens * _VISION_TOKEN_BYTES
    bounded = policy.kind == 'statekv' and policy.budget < UNLIMITED
    scores = min(MOST_SCORES, size.q_heads * _SLICE_TOKENS * (policy.budget + size.step_tokens)) if bounded else MOST_SCORES
    answer = 3 * 4 * scores + (state_bytes if policy.kind == 'statekv' else 0)     # scores, their exponentials, keys in fp32
    step = max(workspace, vision)
    batch = (2 * cameras - 1) * step + _PRODUCT_BYTES if cameras > 1 else 0
    recorded = step + _PRODUCT_BYTES + _selection_bytes(size, policy) + _token_bytes(size)
    return cameras * recorded + batch + _PRODUCT_BYTES + vision + answer


def _selection_bytes(size: ModelSize, policy: PrefillPolicy) -> int:
    """Temporaries of what selects the state, all layers at once: ranks of slots, and the keys or values of a step that move."""
    if policy.kind != 'statekv' or policy.budget == UNLIMITED:
        return 0
    slots = size.layers * size.kv_heads * (policy.budget + size.step_tokens)
    return _RANK_BYTES * slots + size.step_tokens * size.kv_bytes_per_token // 2


def _token_bytes(size: ModelSize) -> int:
    """Of an answer's recorded pass of one token: logits, a matrix of 8 bits made wide, and of what it reads as it lies keys and
    values in fp32, scores, their softmax and what is noted of them in a layer, and mass in all of them."""
    heads = 2 * size.kv_heads * size.head_dim + 3 * size.q_heads + size.layers * size.kv_heads
    return _PRODUCT_BYTES + 4 * size.vocabulary + size.unpacked_bytes + 4 * heads * MOST_IN_PARTS
