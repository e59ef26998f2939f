"""How long the tiers of a memory last, and what the disk is written, known from a plan."""
from dataclasses import dataclass

from statekv_ros.memory.capacity import Plan, gigabytes, layout_of
from statekv_ros.memory.detailed.cache import PAGE_TOKENS
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.detailed.shares import share_out
from statekv_ros.store.retention import likely_cost
from statekv_ros.store.sizes import disk_step

PICTURES_IN_MEMORY = 64 * 10**6     # bytes of each camera's pictures that no disk holds; past it the oldest are dropped


@dataclass(frozen=True)
class TierHours:
    """Hours of watching until each tier is full, from the beginning; all cameras are watched alike.

    Attributes:
        device, host, disk: hours; None: no bound.
        disk_bytes_per_hour: that the file grows by.
        disk_written_bytes_per_s: that are handed to the disk.
    """
    device: float | None
    host: float | None
    disk: float | None
    disk_bytes_per_hour: int
    disk_written_bytes_per_s: int

    def __str__(self) -> str:
        tiers = {'on the device': self.device, 'in main memory': self.host, 'on disk': self.disk}
        return ', '.join(f'{hours:.1f} h {where}' if hours is not None else f'all {where}' for where, hours in tiers.items()
                         if hours != 0)


def tier_hours(plan: Plan, device_bytes: int, host_bytes: int, disk_bytes: int, picture: int = 0,
               one_memory: bool = False) -> TierHours:
    """Of a plan's cameras together.

    Args:
        device_bytes: bound of each camera, 0 for none; host_bytes: of each camera; 0: no such tier.
        disk_bytes: of the folder; 0: no such tier.
        picture: bytes of a step's picture, about; 0: none is kept.
        one_memory: as of `is_main_memory`.
    """
    size, policy = plan.size, plan.policy
    step = disk_step(layout_of(size), find_format(plan.detailed_format), size.position_axes, size.step_tokens,
                     policy.budget if policy.kind == 'statekv' else 0, PAGE_TOKENS, picture=picture)
    per_hour = plan.detailed_bytes_per_hour / plan.cameras
    shares = share_out(device_bytes, host_bytes, bool(disk_bytes), one_memory)
    return TierHours(shares.rows / per_hour if device_bytes else None, shares.host / per_hour,
                     disk_bytes / (plan.steps_per_hour * step.kept), round(plan.steps_per_hour * step.kept),
                     round(plan.steps_per_hour * step.written / 3600))


def pictures_per_hour(plan: Plan, picture: int) -> int:
    """Bytes of the file that the pictures of an hour take, where one of them has about `picture` bytes; all cameras together."""
    return round(plan.steps_per_hour * likely_cost(picture)) if picture else 0


def describe(plan: Plan, device_bytes: int, host_bytes: int, disk_bytes: int, picture: int = 0,
             one_memory: bool = False) -> str:
    """What watching will hold, for a log; `picture`: bytes of a step's picture, about."""
    hours = tier_hours(plan, device_bytes, host_bytes, disk_bytes, picture, one_memory)
    disk = f'; the disk grows by {gigabytes(hours.disk_bytes_per_hour)} per hour' if disk_bytes else ''
    kept = f', {gigabytes(pictures_per_hour(plan, picture))} per hour of it' if disk_bytes else \
        f', in main memory, the newest {gigabytes(PICTURES_IN_MEMORY)} of each camera'
    shown = f'; pictures about {picture / 1e3:.1f} kB a step (by real footage{kept})' if picture else ''
    return (f'detailed cache {gigabytes(plan.detailed_bytes_per_hour)} per hour ({plan.detailed_format}), its index '
            f'{gigabytes(plan.index_bytes_per_hour)}, of each camera {gigabytes(device_bytes)} on the device: the newest '
            f'{hours}{disk}{shown}')
