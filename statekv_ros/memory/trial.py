"""A loaded model tried out before anybody relies on it, and what to say of one that is only for trying things out."""
import numpy as np

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.checks import as_model_error
from statekv_ros.memory.stream import VideoStream

_SIDE = 64      # pixels


def try_out(backbone: Backbone) -> None:
    """Watch one small frame and begin an answer about it, in a memory of its own that is dropped at the end.

    What loads may still fail at its first frame, or compute nothing but NaN. And on a GPU, kernels are compiled and libraries
    set up here, so that the first camera image need not wait for it.

    Raises:
        ModelError: vision tower, text model or logits fail, or are not finite.
    """
    frame = np.arange(_SIDE * _SIDE * 3, dtype=np.uint32).astype(np.uint8).reshape(_SIDE, _SIDE, 3)
    with as_model_error(f'model {backbone.name!r} loads, but fails at its first frame; its files may be damaged, or not of '
                        'one checkpoint'):
        stream = VideoStream(backbone, 'statekv(64)', cuda_graph='off')
        for stamp_ns in range(1, backbone.frames_per_step + 1):
            stream.step(frame, stamp_ns)
        stream.answer('What is in view?', max_tokens=1)


def demonstration_warning(backbone: Backbone, remedy: str = 'set the parameter "model"') -> str:
    """What a user must be told of a model that is a demonstration; empty for any other. `remedy`: where to name another."""
    if not backbone.demonstration:
        return ''
    return (f'model {backbone.name!r} is a demonstration that knows {backbone.demonstration} only, and answers anything else '
            f'with nonsense: {remedy} to a checkpoint that has seen the world')
