"""What the device that a model runs on is called."""
import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """A GPU's own name, or the processor's."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith(('model name', 'Model'))]
    return next(filter(None, names), platform.processor() or platform.machine())
