"""How many threads PyTorch may use on the CPU: a robot's other processes need cores too."""
import os

import torch


def use_cpu_threads(asked: int) -> int:
    """Bound PyTorch's threads in this process and return their number.

    asked: threads, or 0: half the cores that this process may use, and no more than OMP_NUM_THREADS says. PyTorch's own default
        takes all cores; its threads wait for each other in a loop many times per layer, so that a single core that
        another process holds stops all of them.
    """
    threads = asked or min(torch.get_num_threads(), max(1, len(os.sched_getaffinity(0)) // 2))
    torch.set_num_threads(threads)
    return threads
