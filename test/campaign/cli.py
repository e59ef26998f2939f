"""The command: one class or all of them, a table to read, and `--json`."""
import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

from campaign.record import MOST_FAILURES, Record
from campaign.subject import Broken

# Share of the time of `all`; what a class leaves over goes to those after it, and the soak lasts for all that is left.
CLASSES = {'bags': 0.03, 'checkpoints': 0.10, 'lifecycle': 0.15, 'services': 0.07, 'kills': 0.15, 'images': 0.13,
           'intake': 0.02, 'places': 0.09, 'restarts': 0.1, 'watches': 0.05, 'goals': 0.06, 'soak': 0.05}
_MINUTES = 20.0


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code is 1 when a promise was broken."""
    args = _parser().parse_args(argv)
    begun, share, records = time.monotonic(), 0.0, []
    for name in CLASSES if args.name == 'all' else [args.name]:
        share += CLASSES[name] if args.name == 'all' else 1.0
        records.append(run_class(name, args.seed, begun + share * args.minutes * 60 - time.monotonic(), args.trials, args.only))
        _show(records[-1])
    seconds, classes = time.monotonic() - begun, [record.as_dict() for record in records]
    if args.report:
        from campaign.report import write_report    # draws: seconds that a run without a report need not wait
        write_report(args.report, classes, seconds, _command(args))
        print(f'report: {args.report}/index.html')
    if args.json:
        passed = all(record.passed for record in records)
        print(json.dumps({'passed': passed, 'seconds': round(seconds, 1), 'classes': classes}))
    return 0 if all(record.passed for record in records) else 1


def run_class(name: str, seed: int = 1, seconds: float = _MINUTES * 60, trials: int | None = None, only: range | None = None,
              slack_mb: float = 5.0) -> Record:
    """Run one class and return its books.

    Args:
        seconds: no trial begins later.
        trials: how many; None: as many as a full run has.
        only: these alone.
        slack_mb: how much resident memory may grow.
    """
    module = importlib.import_module(f'campaign.{name}')
    with tempfile.TemporaryDirectory(prefix=f'campaign_{name}_') as folder:
        record = Record(name, seed, module.WANTED if trials is None else trials, seconds, Path(folder), only, slack_mb)
        try:
            module.run(record)
        except (Broken, AssertionError) as error:       # not even begun, or not begun again
            record.fail_whole('the node does not start', str(error))
        record.ended = time.monotonic()
    return record


def _command(args: argparse.Namespace) -> str:
    """What makes the same run, wherever its report went."""
    chosen = {'--seed': args.seed, '--minutes': f'{args.minutes:g}', '--trials': args.trials,
              '--only': args.only and f'{args.only[0]}-{args.only[-1]}'}
    options = (f'{name} {value}' for name, value in chosen.items() if value is not None)
    return ' '.join(['python test/campaign', args.name, *options])


def _show(record: Record) -> None:
    told = record.as_dict()
    print(f'{record.name}: {"passed" if record.passed else "FAILED"}, {record.trials} of {told["wanted"]} trials in '
          f'{told["seconds"]} s, seed {record.seed}')
    if record.trials < told['wanted']:
        print(f'  cut short: {"time is over" if len(record.failures) < MOST_FAILURES else "too much failed"}')
    for outcome, count in record.outcomes.most_common(12):
        print(f'  {count:6} {outcome}')
    if record.figures:
        print('  ' + ', '.join(f'{key} {value}' for key, value in record.figures.items()))
    for when in ('before', 'after'):
        if told[when]:
            print(f'  {when}: ' + ', '.join(f'{key} {value}' for key, value in told[when].items()))
    for failure in record.failures:
        first, *others = failure.detail.splitlines() or ['']
        print(f'  FAILURE {failure.kind}: {failure.given[:300]}\n    {first[:300]}')
        print(*(f'    ... {line[:200]}\n' for line in others[-1:]), f'    again: {failure.command}', sep='')
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python test/campaign', description='The fault campaign: see docs/reliability.md.')
    parser.add_argument('name', choices=('all', *CLASSES), metavar='class', help='all, ' + ', '.join(CLASSES))
    parser.add_argument('--seed', type=int, default=1, help='of everything that is chosen at random (default: 1)')
    parser.add_argument('--minutes', type=float, default=_MINUTES, help='no trial begins later, a soak lasts so long; for all '
                        f'classes together (default: {_MINUTES:g})')
    parser.add_argument('--trials', type=int, help='how many (default: as many as a full run has)')
    parser.add_argument('--only', type=_span, metavar='N[-M]', help='these trials of a run with the same seed alone')
    parser.add_argument('--report', type=Path, metavar='FOLDER', help='write report.json and index.html there')
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line of output')
    return parser


def _span(text: str) -> range:
    first, _, last = text.partition('-')
    return range(int(first), int(last or first) + 1)
