"""What one processor (SM) of each architecture does in a clock cycle, from its maker's tables."""
from typing import NamedTuple


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
