"""A GPU that is lost while the node runs: noticed by asking the device itself, and configured anew, once."""
import time
from collections.abc import Callable

import torch
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

from statekv_ros.errors import StateKVError

SUCCESS = TransitionCallbackReturn.SUCCESS
# A second loss within this time is not tried again: whatever it is, it comes back.
WINDOW_S = 600.0
_ON_DISK = 'the memory goes on where it stood on disk'
_FORGOTTEN = 'what was seen before is forgotten, for no "memory_dir" is set'


def is_lost(device: torch.device, error: Exception) -> bool:
    """Whether the CUDA context of a device is gone, after a step or a slice has failed with `error`.

    Errors of CUDA that ended a context come back with every later call; others do not. So the device is asked rather than the
    error read: waiting for it fails in the first case alone.
    """
    if device.type != 'cuda' or isinstance(error, (StateKVError, torch.OutOfMemoryError)):
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:   # AcceleratorError, or what older versions of torch raise
        return True
    return False


def free_device_memory(log: Callable[[str], None]) -> None:
    """Give what torch keeps for later back to the device; one that is lost cannot take it."""
    try:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except Exception as error:  # the rest of the node is to be freed all the same
        log(f'GPU memory could not be given back: {error}')


class Recovery:
    """Leaves the active state when the GPU is lost and configures the node again; a second loss within `WINDOW_S` leaves it
    inactive."""

    def __init__(self, node: LifecycleNode, state: Callable[[], str], blame: Callable[[str], str],
                 submit: Callable[[Callable[[], None]], None], now: Callable[[], float] = time.monotonic):
        """
        Args:
            state: the lifecycle state's name.
            blame: tells a reason as an error, on /diagnostics and in the log, and returns the one that stood there.
            submit: does work in the thread of the transitions; raises RuntimeError when the node is ending.
        """
        self._node, self._state, self._blame, self._submit, self._now = node, state, blame, submit, now
        self._lost_at, self._problem = float('-inf'), ''

    @property
    def problem(self) -> str:
        """What is to be told beside the node's state, for `WINDOW_S` after a loss that was got over; '' otherwise."""
        ago_s = self._now() - self._lost_at
        return f'{self._problem}, {ago_s:.0f} s ago' if self._problem and ago_s < WINDOW_S else ''

    def lost(self, reason: str, on_disk: bool, concerns: Callable[[], bool]) -> None:
        """Take note of a loss; from any thread, does not wait.

        Args:
            on_disk: the memory is, and goes on from there.
            concerns: false when the node has been freed by the time that its turn comes.
        """
        def recover() -> None:
            if concerns():
                self._recover(reason, _ON_DISK if on_disk else _FORGOTTEN)

        try:
            self._submit(recover)
        except RuntimeError:
            pass

    def _recover(self, reason: str, restored: str) -> None:
        again = self._now() - self._lost_at < WINDOW_S
        self._lost_at, self._problem = self._now(), ''
        was_active = self._state() == 'active'
        if was_active:
            self._node.trigger_deactivate()
        if again:
            self._blame(f'the GPU was lost a second time within {WINDOW_S:.0f} s ({reason}): look after it (nvidia-smi, dmesg), '
                        'then clean the node up and configure it, or start it again')
            return
        self._blame(f'the GPU was lost ({reason}): the node is being configured again, once')
        if self._node.trigger_cleanup() != SUCCESS or self._node.trigger_configure() != SUCCESS:
            why = self._blame(f'the GPU was lost ({reason}), and configuring again failed')
            self._blame(f'the GPU was lost ({reason}), and configuring again failed ({why}): within a process a CUDA context '
                        f'may stay lost, so start the node again; {restored}')
            return
        self._problem = f'the GPU was lost ({reason}) and the node was configured again: {restored}'
        self._node.get_logger().warning(self._problem)
        if was_active:
            self._node.trigger_activate()
