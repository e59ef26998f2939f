"""Write a tiny checkpoint with random weights from a fixed seed: a real architecture and a real tokenizer, for tests,
benchmarks and first steps. What such a model says means nothing."""
import argparse
import sys

FAMILIES = ('eagle2_5', 'internvl', 'llava_onevision', 'qwen2_5_vl', 'qwen3_vl')


def main(argv: list[str] | None = None) -> int:
    """`statekv-tiny-model FOLDER`; returns the exit code."""
    parser = argparse.ArgumentParser(prog='statekv-tiny-model', description=__doc__)
    parser.add_argument('folder', help='directory to write the checkpoint to')
    parser.add_argument('--family', choices=FAMILIES, default='qwen3_vl')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--layers', type=int, default=3)
    parser.add_argument('--hidden', type=int, default=64)
    parser.add_argument('--vision-depth', type=int, default=3)
    options = vars(parser.parse_args(argv))
    from statekv_ros.backbones.tiny import write_tiny_checkpoint    # takes seconds: after --help
    print(write_tiny_checkpoint(**options))
    return 0


if __name__ == '__main__':
    sys.exit(main())
