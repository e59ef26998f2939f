"""Train the patrol model from scratch: `statekv-train-patrol FOLDER`."""
import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Train, or go on training, and export; returns the exit code."""
    parser = argparse.ArgumentParser(prog='statekv-train-patrol', description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('folder', type=Path, help='of the run: its state, its log and, in model/, the checkpoint')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--look-steps', type=int, default=1000, help='batches of pictures alone, before the videos')
    parser.add_argument('--steps', type=int, default=2700, help='batches of videos; the curriculum is a share of them')
    parser.add_argument('--polish-steps', type=int, default=2400, help='batches of long videos at the end')
    parser.add_argument('--pictures', type=int, default=500, help='renders of each object and door')
    parser.add_argument('--threads', type=int, default=0, help='CPU threads; 0: all. Take 1 when others use this machine')
    args = parser.parse_args(argv)
    import torch    # takes seconds: after --help

    from statekv_ros.patrol.train import Trainer, export
    if args.threads:
        torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        trainer = Trainer(args.folder, args.seed, args.look_steps, args.steps, args.polish_steps, args.pictures)
    except ValueError as error:
        print(f'statekv-train-patrol: {error}', file=sys.stderr)
        return 2
    try:
        trainer.run(trainer.steps)
    except KeyboardInterrupt:
        trainer.save()
        print(f'stopped at step {trainer.step}; the same command goes on from there', file=sys.stderr)
        return 130
    export(trainer, args.folder / 'model')
    (args.folder / 'log.json').write_text(json.dumps(trainer.losses))
    print(args.folder / 'model')
    return 0


if __name__ == '__main__':
    sys.exit(main())
