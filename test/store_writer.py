"""Writes steps into a memory until it is killed: `store_writer.py FOLDER FIRST_STEP`; prints each committed one."""
import sys

import torch

from statekv_ros.store import MemoryStore

IDENTITY = {'model': 'patrol', 'layout': '3 layers x 2 heads x 32'}
QUOTA_BYTES = 4_000_000
SHAPE = (3, 2, 300, 32)


def parts_of(step: int) -> dict[str, torch.Tensor | bytes]:
    """What step number `step` holds, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return {'key': torch.randn(SHAPE, generator=generator).bfloat16(),
            'scale': torch.randn(3, 2, 32, generator=generator).half(), 'note': f'step {step}'.encode()}


def main(folder: str, first: int, out=sys.stdout) -> None:
    with MemoryStore.open(folder, IDENTITY, QUOTA_BYTES, sync_period_s=.05, owner='/writer') as store:
        step = first
        while True:
            store.put('front', step, {'step': step}, parts_of(step))
            store.save_state('front', {'step': step}, {'state': parts_of(step)['scale']})
            print(step, file=out, flush=True)
            step += 1


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]))
