"""The one way from the host to the device that never makes the host wait."""
import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`. On CUDA it goes through pinned memory, which torch keeps until the copy is done: a copy
    from ordinary memory would stop the host until everything before it has run."""
    if device.type == 'cuda':
        host = host.contiguous().pin_memory()
    return host.to(device, non_blocking=True)


def copy_to_device(host: torch.Tensor, target: torch.Tensor) -> None:
    """As `to_device`, into a tensor that is there already."""
    if target.device.type == 'cuda':
        host = host.contiguous().pin_memory()
    target.copy_(host, non_blocking=True)
