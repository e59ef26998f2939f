"""`statekv-eval`: ask a model questions with known answers, under several policies, and write a report."""
import argparse
import json
import sys
from pathlib import Path

from statekv_ros.errors import ParameterError, StateKVError
from statekv_ros.evaluation import AGES_S, LOCAL_RAY
from statekv_ros.evaluation.benchmarks import BENCHMARKS

FAILED, INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit code: 0, 2 for a bad input (a line on stderr for each mistake), 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        from statekv_ros.evaluation.evaluate import attention_statistics, evaluate    # takes seconds: after --help
        if args.stats or args.formats is not None or args.compare:
            _refuse_watching(args)
        if args.compare:
            from statekv_ros.evaluation.comparison import compare
            report = compare(args)
        elif args.formats is not None:
            from statekv_ros.evaluation.gate import gate
            report = gate(args)
        else:
            report = attention_statistics(args) if args.stats else evaluate(args)
    except StateKVError as error:
        print(f'statekv-eval: {error}', file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print('statekv-eval: interrupted; what is done is kept, and the same command goes on from there', file=sys.stderr)
        return INTERRUPTED
    if args.json:
        print(json.dumps(report))
    elif args.formats is not None:
        for form, found in report.items():
            print(f'{form}: {found["verdict"]}; {found["same_words"]} of {found["questions"]} answers in the same words, '
                  f'{found["low"]:.1%}-{found["high"]:.1%} of {found["tokens"]} tokens the same, {found["kl"] or 0:.4f} nats')
    else:
        print(f'{args.out / "index.html"}')
    return 0


def _refuse_watching(args: argparse.Namespace) -> None:
    """Raises ParameterError for options that --stats, --formats and --compare do not have."""
    for name in ('layout', 'rope_length', 'positions', 'max_frame_pixels'):
        if (value := getattr(args, name)) != _parser().get_default(name):
            raise ParameterError(f'--{name.replace("_", "-")} is for questions files, got {value!r} with --stats, --formats or --compare: '
                                 'leave it out')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='statekv-eval', description=__doc__)
    parser.add_argument('inputs', type=Path, nargs='+', metavar='QUESTIONS.yaml', help='questions files (docs/questions.md); '
                        'with --stats or --formats bags, videos or folders of images')
    parser.add_argument('--out', type=Path, required=True, metavar='RUN_DIR', help='folder for results and report; one that '
                        'holds a part of the same run is gone on with')
    parser.add_argument('--model', default='patrol', help='checkpoint directory, hub id or patrol; default: %(default)s')
    parser.add_argument('--policies', nargs='+', default=['full x all', 'statekv(4096) x all'], metavar='POLICY',
                        help='"PREFILL x ANSWER", where a bare PREFILL means x all and may have a format or positions of its '
                        'own ("statekv(64)/int4/native x all"), or rlivs; default: %(default)s')
    parser.add_argument('--benchmark', metavar='NAME', help='the inputs are the JSON files of a published benchmark: '
                        f'{", ".join(BENCHMARKS)} (docs/streaming_benchmarks.md)')
    parser.add_argument('--videos', type=Path, metavar='FOLDER', help='where the paths in them begin; default: where the first file is')
    parser.add_argument('--rate-hz', type=float, metavar='HZ', help='frames to watch per second, where the benchmark has another')
    parser.add_argument('--context', type=float, metavar='S', help='how far a question may look back; default: to the start')
    parser.add_argument('--prompts', type=Path, metavar='FOLDER', help='a copy of the benchmark\'s repository, to ask in its words')
    parser.add_argument('--skip-broken', action='store_true', help='go on past videos that cannot be read, and count their questions '
                        'as errors')
    parser.add_argument('--against', default='', metavar='POLICY', help='the one that the tables compare the others with; '
                        'default:  full x all, or else the first')
    parser.add_argument('--ages', type=float, nargs='+', default=AGES_S, metavar='S', help='edges of the tables\' age bands')
    parser.add_argument('--so-far', action='store_true', help='watch nothing: report what is done of a run')
    parser.add_argument('--compare', action='store_true', help='watch nothing: the inputs are run folders of several checkpoints with the '
                        'same questions, and become one report')
    parser.add_argument('--stats', action='store_true', help='instead: how attention is spread over a stream')
    parser.add_argument('--formats', nargs='*', metavar='FORMAT', help='instead: watch bags, videos or folders of images exactly '
                        'and in these formats (default: all), and say of each whether to keep or refuse it')
    parser.add_argument('--questions', nargs='+', default=[], metavar='TEXT', help='that --formats asks; default: four general ones')
    parser.add_argument('--every', type=float, default=30.0, metavar='S', help='seconds from one round of them to the next')
    parser.add_argument('--budgets', type=int, nargs='+', default=[64, 256, 1024, 4096], help='B in tokens, of --stats')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--online', action='store_true', help='play bags through DDS into a live node')
    where.add_argument('--ray', nargs='?', const=LOCAL_RAY, metavar='ADDRESS', help='run jobs side by side on a Ray cluster; '
                       'without an address on one started here')
    parser.add_argument('--rate', type=float, default=1.0, help='bag seconds per second, online; default: 1')
    parser.add_argument('--max-tokens', type=int, default=64, help='of an answer; default: %(default)s')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:<n>')
    parser.add_argument('--dtype', default='auto', help='auto, float32, bfloat16 or float16')
    parser.add_argument('--weights', default='auto', help='auto, as_stored, int8 or int4, as the node\'s parameter')
    parser.add_argument('--lockstep', type=int, default=1, metavar='N', help='watch N videos of one shape at once, offline: '
                        'much faster for small models, but steps are not timed; default: %(default)s')
    parser.add_argument('--ask-alone', action='store_true', help='in lockstep, ask each video by itself: slower, but it is '
                        'known where the answers looked')
    parser.add_argument('--detailed-format', default='bf16', metavar='FORMAT', help='as the node\'s parameter; default: '
                        '%(default)s')
    parser.add_argument('--layout', default='model', metavar='LAYOUT', help='model: text around frames and questions as the model\'s '
                        'own processor writes it; released: as StateKV\'s released evaluation (InternVL3); default: %(default)s')
    parser.add_argument('--rope-length', default='', metavar='N', help='positions to scale a dynamic-NTK RoPE for, once for all '
                        'policies; auto: for video + prompt + answer + 128; 0: as trained; default: auto with the layout released, '
                        'else 0')
    parser.add_argument('--positions', default='', metavar='POLICY', help='native, contiguous or lazy_shift, where a policy does '
                        'not say; default: native where RoPE is scaled, else as the node')
    parser.add_argument('--max-frame-pixels', type=int, default=0, metavar='N', help='as the node\'s parameter; default: as the '
                        'model advises')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of each process; default: %(default)s')
    parser.add_argument('--json', action='store_true', help='print the report as one JSON object')
    return parser


if __name__ == '__main__':
    sys.exit(main())
