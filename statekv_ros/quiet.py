"""Keeps lines out of a robot's log that torchao, which Transformers imports where it is installed, writes about itself: libraries
for other chips that do not load here, and what it does in a way that torch will not allow later. Imported before Transformers is.
"""
import logging

_LINES = {'torchao': 'Failed to load ', 'torch.utils._pytree': '%s is an Enum subclass and is now natively supported'}


def _leave_out(start: str):
    return lambda record: not (record.levelno <= logging.WARNING and str(record.msg).startswith(start))


for _name, _start in _LINES.items():
    logging.getLogger(_name).addFilter(_leave_out(_start))
