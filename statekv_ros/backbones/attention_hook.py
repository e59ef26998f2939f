"""The one place where we enter Transformers' forward pass: an attention function registered under the name "statekv".

No mask function goes with it, so the library builds no mask; and the library's own cache stays unused, because the memory
that each call is given keeps the keys and values.
"""
from transformers import AttentionInterface

ATTENTION = 'statekv'


def statekv_attention(module, query, key, value, attention_mask, scaling=None, statekv=None, **kwargs):
    """Hand one layer's queries, keys and values to the memory of this call (see `AttentionMemory`)."""
    if statekv is None:
        raise ValueError('attention "statekv" needs the keyword statekv=<memory>: call the model through its backbone')
    output = statekv.attend(module.layer_idx, query, key, value, scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, statekv_attention)
