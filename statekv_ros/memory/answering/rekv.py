"""Answer policy `rekv(k)`: what ReKV retrieves (Di et al., ICLR 2025; arXiv 2503.00540).

As `retrieve(k)`, but by a pass of its own over the question's bare text, of which nothing is kept but what each layer chose; a
step's key is the mean of its visual tokens' keys.
"""
from statekv_ros.memory.answering.retrieval import Retrieval


class BareRetrieval(Retrieval):
    """See `Retrieval`; its question is the bare text, without what a chat template, a task or its options put around it."""
    visual = True
