"""How the bounds on the device and on main memory are shared out between steps and what answers read of those further down."""
from typing import NamedTuple

import torch

_STAGING_SHARE, _STAGING_BYTES = 4, 2**26   # of the bound on the device, and what it is without one
_KEPT_SHARE = 4     # of the bound on main memory, where it lends the rest


class Shares(NamedTuple):
    """Bytes.

    Attributes:
        rows: bound on steps on the device; 0 for none.
        host: bound on steps in main memory; 0 for no such tier.
        staging: room for pages that are brought up from below the device.
        lent: of the staging, what counts as main memory rather than the device's.
    """
    rows: int
    host: int
    staging: int
    lent: int


def share_out(device_bytes: int, host_bytes: int, below: bool, one_memory: bool) -> Shares:
    """What bounds on the device (0 for none) and on main memory (0 for no such tier) are used for.

    Args:
        below: whether there are tiers further down, which have every step.
        one_memory: as of `is_main_memory`.
    """
    if not host_bytes and not below:
        return Shares(device_bytes, 0, 0, 0)
    own = device_bytes // _STAGING_SHARE
    # Steps that the tier below has too are in main memory to be read sooner. Where that is the device's memory, more is won by
    # pages that answers read again and again, kept as they are staged.
    lent = host_bytes - host_bytes // _KEPT_SHARE if below and one_memory and device_bytes else 0
    return Shares(device_bytes - own, host_bytes - lent, (own or _STAGING_BYTES) + lent, lent)


def is_main_memory(device: torch.device) -> bool:
    """Whether what is on the device is in main memory: a CPU, or a GPU that has no memory of its own, as of a Jetson."""
    return device.type != 'cuda' or bool(getattr(torch.cuda.get_device_properties(device), 'is_integrated', False))
