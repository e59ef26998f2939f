"""Arguments of the benchmarks, apart from what they run on, so that --help is there before torch is imported."""
import argparse

from statekv_ros.bench.chips import BOARDS

# What other modules define that take seconds to import; a test holds them together.
DTYPES = ('bf16', 'fp16', 'fp32')                       # hardware.DTYPES
CUDA_GRAPH = ('auto', 'off')                            # memory.graphs.CUDA_GRAPH
IMPLEMENTATIONS = ('naive', 'triton')                   # kernels.fitness.IMPLEMENTATIONS
KERNEL_MODELS = ('Qwen3-VL-2B', 'Qwen3-VL-4B', 'Qwen3-VL-8B', 'InternVL3-1B', 'InternVL3-2B', 'InternVL3-8B')     # kernel.MODELS
GPU_MODELS = ('InternVL3-8B', 'Qwen3-VL-8B')
CHIPS = (80, 87, 89, 90, 100, 110, 120)


def step(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench step`."""
    parser.add_argument('--policy', default='statekv,window,full', help='comma-separated prefill policies')
    parser.add_argument('--frames', type=int, nargs='+',
                        help='frame steps, 400 unless given (Qwen3-VL takes two camera frames for each); with '
                             '--random-weights, after how many to measure: 16 64 256 512 1024')
    parser.add_argument('--runs', type=int, default=3, help='staggered streams per policy')
    parser.add_argument('--budget', type=int, nargs='+',
                        help='tokens of a policy "statekv" without a number, 512 unless given; with --random-weights those to '
                             'measure: 256 1024 4096 16384')
    parser.add_argument('--window', type=int, default=16, help='frames of a policy "window" without a number')
    parser.add_argument('--model', default='tiny', help='directory or hub id; "tiny" makes a small one with random weights')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--weights', default='auto', help='auto, as_stored, int8 or int4, as the node\'s parameter')
    parser.add_argument('--size', help='camera frames, WIDTHxHEIGHT; 128x128 unless given, 448x448 with --random-weights')
    whole = parser.add_argument_group('a whole step at true shapes')
    whole.add_argument('--random-weights', action='store_true',
                       help='measure a published model by name (--model InternVL3-8B) with random weights on the device: '
                            'statekv at each budget and full attention')
    whole.add_argument('--layers', type=int, help='cut the model and its vision tower to so many layers, for small machines')
    whole.add_argument('--dtype', choices=DTYPES, help='default: bf16')
    whole.add_argument('--cuda-graph', choices=CUDA_GRAPH, default='auto',
                       help='auto: replay steps as CUDA graphs on a GPU, as streams do; default: %(default)s')
    whole.add_argument('--rounds', type=int, default=10, help='measurements of each, taken in turn; default: %(default)s')
    whole.add_argument('--plot', metavar='FILE', help='draw step time over frames (png, pdf or svg)')
    whole.add_argument('--profile', metavar='FILE', help='write where a step\'s time goes, by torch\'s profiler')


def cameras(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench cameras`."""
    parser.add_argument('--cameras', type=int, nargs='+', default=[1, 2, 4, 8], metavar='N',
                        help='how many; default: %(default)s')
    parser.add_argument('--rounds', type=int, default=60, help='steps of each, both ways in turn; default: %(default)s')
    parser.add_argument('--prefill-policy', default='statekv(144)', help='default: %(default)s')
    _model(parser)


def answers(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench answers`."""
    parser.add_argument('--steps', type=int, nargs='+', default=[600, 3600, 28800], metavar='N',
                        help='frame steps of memory to ask over; default: %(default)s')
    parser.add_argument('--rounds', type=int, default=10, help='how often each question is asked; default: %(default)s')
    parser.add_argument('--tokens', type=int, default=16, help='of an answer; default: %(default)s')
    parser.add_argument('--policy', default='sparse(8192)', help='answer policy; default: %(default)s')
    _tiers(parser, detailed_format='int4')
    parser.add_argument('--seed', type=int, default=0, help='of the noise; default: %(default)s')
    _model(parser)


def decode(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench decode`."""
    parser.add_argument('--steps', type=int, nargs='+', default=[600, 3600], metavar='N',
                        help='frame steps of memory to ask over; default: %(default)s')
    parser.add_argument('--rounds', type=int, default=64, help='tokens of each, both ways in turn; default: %(default)s')
    parser.add_argument('--policy', default='sparse(8192)', help='answer policy; default: %(default)s')
    _tiers(parser, detailed_format='int4')
    parser.add_argument('--seed', type=int, default=0, help='of the noise; default: %(default)s')
    _model(parser)


def questions(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench questions`."""
    parser.add_argument('--questions', type=int, nargs='+', default=[1, 2, 4, 8], metavar='N',
                        help='how many; default: %(default)s')
    parser.add_argument('--rounds', type=int, default=96, help='tokens of each, both ways in turn; default: %(default)s')
    parser.add_argument('--steps', type=int, default=128, help='frame steps seen before; default: %(default)s')
    parser.add_argument('--prefill-policy', default='statekv(144)', help='default: %(default)s')
    parser.add_argument('--answer-policy', default='sparse(288)', help='default: %(default)s')
    _model(parser)


def hours(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench hours`."""
    parser.add_argument('--hours', type=float, default=8.0, help='of simulated time; default: %(default)s')
    parser.add_argument('--rate', type=float, default=1.0, help='frame steps a simulated second; default: %(default)s')
    parser.add_argument('--policy', '--answer-policy', dest='answer_policy', nargs='+', default=['sparse(288)'],
                        help='answer policies to ask under; default: %(default)s')
    parser.add_argument('--beside', nargs='*', default=[], metavar='POLICY',
                        help='answer policies to ask under in every tenth round only, as all, whose cost grows')
    parser.add_argument('--prefill-policy', default='statekv(144)', help='default: %(default)s')
    parser.add_argument('--every', type=float, default=60.0,
                        help='simulated seconds from one round of questions to the next; default: %(default)s')
    _tiers(parser, detailed_format='bf16')
    parser.add_argument('--model', default='patrol', help='directory, hub id or patrol; default: %(default)s')
    parser.add_argument('--size', default='64x64', help='camera frames, WIDTHxHEIGHT; default: %(default)s')
    parser.add_argument('--seed', type=int, default=6_000_000, help='of the patrol; default: %(default)s')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--weights', default='auto', help='auto, as_stored, int8 or int4, as the node\'s parameter')


def kernel(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench kernel`."""
    parser.add_argument('--models', nargs='+', default=['all'], metavar='MODEL', help=f'all, or of {", ".join(KERNEL_MODELS)}')
    parser.add_argument('--budgets', nargs='+', type=int, default=[256, 1024, 4096, 16384], metavar='B',
                        help='tokens of the state; default: %(default)s')
    parser.add_argument('--tokens', type=int, default=0, help='tokens of a frame step; default: those of the model')
    parser.add_argument('--dtype', choices=DTYPES, default='bf16', help='default: %(default)s')
    parser.add_argument('--device', default='cuda', help='default: %(default)s')
    parser.add_argument('--implementation', choices=IMPLEMENTATIONS, help='default: the best on the device')


def gpu(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench gpu`."""
    parser.add_argument('--out', required=True, metavar='FOLDER', help='where to write the results; must not exist yet')
    parser.add_argument('--models', nargs='+', default=GPU_MODELS, metavar='MODEL',
                        help='published models whose whole step to measure; default: %(default)s')
    parser.add_argument('--device', default='cuda', help='default: %(default)s')
    parser.add_argument('--minutes', type=float, default=10.0,
                        help='what has not begun by then is left out; default: %(default)s')
    parser.add_argument('--part-minutes', type=float, default=5.0,
                        help='a part that takes longer hangs and is ended; default: %(default)s')


def aot(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench aot`."""
    parser.add_argument('--chips', type=int, nargs='+', default=CHIPS, metavar='SM',
                        help='compute capabilities without the dot; default: %(default)s')
    parser.add_argument('--all', action='store_true',
                        help='all head dims, dtypes and passes, rather than bf16 on the shapes of the models')
    parser.add_argument('--loops', action='store_true',
                        help='also tell what the inner loops consist of, and the cycles that each pipe needs for them')
    parser.add_argument('--processes', type=int, default=2, help='compile so many at a time; default: %(default)s')


def floor(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench floor`."""
    parser.add_argument('--device-name', default='AGX-Orin', metavar='NAME',
                        help=f'of {", ".join(BOARDS)}; a last part will do: orin; default: %(default)s')
    parser.add_argument('--models', nargs='+', default=['all'], metavar='MODEL', help='all, or published models by name')
    parser.add_argument('--budget', type=int, default=4096, help='B of statekv in tokens; default: %(default)s')
    parser.add_argument('--size', default='448x448', help='camera frames, WIDTHxHEIGHT; default: %(default)s')
    parser.add_argument('--read-tokens', type=int, default=8192, metavar='N', help='that an answer reads; default: %(default)s')


def transport(parser: argparse.ArgumentParser) -> None:
    """Of `statekv-bench transport`."""
    parser.add_argument('--sizes', default='640x480,1280x720', help='image sizes, WIDTHxHEIGHT, comma-separated')
    parser.add_argument('--rate', type=float, default=30.0, help='images per second; default: %(default)s')
    parser.add_argument('--seconds', type=float, default=10.0, help='length of each run; default: %(default)s')
    parser.add_argument('--profiles', default='shipped,default', help='Fast DDS profiles; default: %(default)s')
    parser.add_argument('--reliability', default='best_effort,reliable', help='default: %(default)s')


def _tiers(parser: argparse.ArgumentParser, detailed_format: str) -> None:
    """Of `tiered.TieredMemory`."""
    parser.add_argument('--device-cache-mb', type=float, default=0.0,
                        help='bound on keys and values on the device in MB, past which the oldest steps move down; default: none')
    parser.add_argument('--host-cache-mb', type=float, default=0.0, help='the same in main memory; default: no such tier')
    parser.add_argument('--disk-cache-gb', type=float, default=0.0,
                        help='the same on disk, in a folder that is removed again; default: no such tier')
    parser.add_argument('--detailed-format', default=detailed_format,
                        help='bf16 (the model\'s own dtype), int8 or int4; default: %(default)s')


def _model(parser: argparse.ArgumentParser) -> None:
    """Of `models.find_backbone`, and the frames that it sees."""
    parser.add_argument('--model', default='patrol', help='directory, hub id or patrol; default: %(default)s')
    parser.add_argument('--random-weights', action='store_true',
                        help='a published model by name (--model InternVL3-8B) with random weights on the device')
    parser.add_argument('--layers', type=int, help='of a model with random weights and its vision tower, for small machines')
    parser.add_argument('--dtype', choices=DTYPES, help='of random weights; default: bf16')
    parser.add_argument('--weights', default='auto',
                        help='auto, as_stored, int8 or int4, as the node\'s parameter; of a model that is loaded')
    parser.add_argument('--size', default='64x64', help='camera frames, WIDTHxHEIGHT; default: %(default)s')
    parser.add_argument('--device', default='auto')


# By the benchmark's name.
ADD = {'step': step, 'cameras': cameras, 'decode': decode, 'questions': questions, 'answers': answers, 'hours': hours,
       'kernel': kernel, 'gpu': gpu, 'aot': aot, 'floor': floor, 'transport': transport}
