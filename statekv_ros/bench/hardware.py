"""The device that a benchmark runs on: which one, with what software, and how fast it multiplies and copies."""
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from statekv_ros.errors import ParameterError

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}


def parse_device(name: str, on_a_cpu: str) -> torch.device:
    """The device of an argument --device; `on_a_cpu` are arguments to try the command with where there is no GPU.

    Raises:
        ParameterError: no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ParameterError(f'--device must be cuda, cuda:<number> or cpu, got {name!r}') from None
    if device.type not in ('cuda', 'cpu'):
        raise ParameterError(f'--device must be cuda, cuda:<number> or cpu, got {name!r}')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(f'--device {name} is not there (torch sees {torch.cuda.device_count()} CUDA devices): run on a '
                             f'machine with a GPU, or try the command with --device cpu {on_a_cpu}')
    return device


def versions() -> dict[str, str]:
    """Versions of the software that decides speed."""
    found = {'torch': torch.__version__, 'cuda': torch.version.cuda or 'none', 'transformers': transformers.__version__}
    try:
        import triton
    except ImportError:
        return found | {'triton': 'none'}
    return found | {'triton': triton.__version__}


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    size = 8192 if device.type == 'cuda' else 512
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda _: a @ b, [None], device) / 1e3)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second of a large copy."""
    source = torch.randn(2**29 if device.type == 'cuda' else 2**22, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda _: target.copy_(source), [None], device) / 1e3)


def median_ms(function: Callable, layers: list, device: torch.device) -> float:
    """Median milliseconds of one call; on a GPU replayed from a CUDA graph, so that launches from Python do not count."""
    for tensors in layers:  # compile, and let libraries make their plans
        function(tensors)
    if device.type == 'cpu':
        return statistics.median(_seconds(function, tensors) for _ in range(3) for tensors in layers) * 1e3
    from triton.testing import do_bench
    with torch.cuda.device(device):     # the stream that is recorded and the events that time it are those of the present device
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            for tensors in layers:
                function(tensors)
        return do_bench(graph.replay, warmup=50, rep=200, return_mode='median') / len(layers)


def _seconds(function: Callable, tensors) -> float:
    start = time.perf_counter()
    function(tensors)
    return time.perf_counter() - start
