"""What chips can do, from their makers' tables: a processor (SM) of each architecture in a clock cycle, and boards by name."""
from typing import NamedTuple

from statekv_ros.errors import ParameterError


class Processor(NamedTuple):
    """Of one SM in one cycle.

    Attributes:
        tensor_flops: dense bf16 products summed in fp32, where a fused multiply and add counts two; that of data-center and
            professional boards: on GeForce boards of 8.6, 8.9 and 12.0 it is half.
        fp32_lanes, mufu_lanes, integer_lanes: results of FFMA, of an exponential and of an integer addition.
        issued: instructions of warps.
        shared_bytes: read from or written to shared memory.
    """

    tensor_flops: int
    fp32_lanes: int
    mufu_lanes: int
    integer_lanes: int
    issued: int = 4
    shared_bytes: int = 128


# By compute capability without the dot: CUDA C++ Programming Guide, throughput of native arithmetic instructions, and dense bf16
# peaks of the architectures' white papers and data sheets over their SMs and boost clocks.
PROCESSORS = {
    80: Processor(2048, 64, 16, 64),       # A100
    86: Processor(1024, 128, 16, 64),      # A40, RTX 30
    87: Processor(2048, 128, 16, 64),      # Jetson Orin
    89: Processor(1024, 128, 16, 64),      # L40S, RTX 40
    90: Processor(4096, 128, 16, 64),      # H100, H200
    100: Processor(8192, 128, 16, 64),     # B200
    103: Processor(8192, 128, 32, 64),     # B300
    110: Processor(8192, 128, 16, 64),     # Jetson Thor
    120: Processor(1024, 128, 16, 128),    # RTX PRO Blackwell, RTX 50
    121: Processor(1024, 128, 16, 128),    # DGX Spark
}


class Board(NamedTuple):
    """A device by its maker's data sheet.

    Attributes:
        tflops: dense products of bf16 or fp16 summed in fp32, in 10^12 operations a second, at the boost clock.
        gb_per_s: of device memory, in 10^9 bytes a second.
        memory_gb: of device memory.
    """

    tflops: float
    gb_per_s: float
    memory_gb: float


BOARDS = {
    'B200': Board(2250, 8000, 180),
    'H200': Board(989, 4800, 141),
    'H100': Board(989, 3350, 80),           # SXM
    'A100': Board(312, 2039, 80),           # SXM, 80 GB
    'L40S': Board(362, 864, 48),
    'L4': Board(121, 300, 24),
    'RTX-PRO-6000': Board(504, 1792, 96),
    'RTX-5090': Board(210, 1792, 32),
    'RTX-4090': Board(165, 1008, 24),
    'DGX-Spark': Board(125, 273, 128),
    'AGX-Thor': Board(259, 273, 128),
    'AGX-Orin': Board(42.5, 205, 64),       # 64 GB
    'Orin-NX': Board(15, 102, 16),          # 16 GB
}


def find_board(name: str) -> str:
    """The key of BOARDS that is meant, whatever its case; its last part will do where that names one ('orin', '4090').

    Raises:
        ParameterError: none, or more than one.
    """
    meant = [board for board in BOARDS if board.lower() == name.lower()]
    meant = meant or [board for board in BOARDS if board.lower().endswith(f'-{name.lower()}')]
    if len(meant) != 1:
        raise ParameterError(f'--device-name must be one of {", ".join(BOARDS)}, got {name!r}')
    return meant[0]
