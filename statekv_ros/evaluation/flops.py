"""Floating point operations of a frame step, counted from the model's sizes: what a policy costs on any machine."""
from statekv_ros.backbones.size import ModelSize


def step_flops(size: ModelSize, tokens: int, carried: int, scored: bool) -> int:
    """Operations of the text model for one frame step; a multiplication and its addition are two.

    Counted per layer, for T `tokens` and S `carried` ones:
        projections: 4 T hidden q_width for queries and output, 4 T hidden kv_width for keys and values, where a width is
            heads x head_dim;
        feed forward: 6 T hidden mlp (three matrices);
        attention: 4 q_width for each pair of a query and a key that it sees, half for the scores and half for the sum of
            values; there are T S + T (T + 1) / 2 pairs, since a frame's tokens see all of the state and each other causally;
        importance: 2 q_width more for each pair, half an attention, because a pass of its own computes the scores again.
    Not counted: the vision tower and the prefix, which cost every policy the same, norms, softmax, rotations and the top-B,
    and the output layer, which a frame step does not use.

    Args:
        tokens: of this step.
        carried: keys per layer and KV head from before this step.
        scored: whether importance is computed (`statekv`).
    """
    q_width, kv_width = size.q_heads * size.head_dim, size.kv_heads * size.head_dim
    projections = 4 * tokens * size.hidden * (q_width + kv_width)
    feed_forward = 6 * tokens * size.hidden * size.mlp
    pairs = tokens * carried + tokens * (tokens + 1) // 2
    return size.layers * (projections + feed_forward + pairs * q_width * (6 if scored else 4))
