"""From a prefill policy to the context that it carries from frame step to frame step."""
from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.carried.positions import PositionPolicy
from statekv_ros.memory.carried.recent import RecentFrames
from statekv_ros.memory.carried.rekv import PromptAndWindow
from statekv_ros.memory.carried.state import CompressedState
from statekv_ros.memory.policies import PrefillPolicy

CARRIED = {
    'statekv': lambda backbone, policy, positions: CompressedState(backbone, policy.budget, positions),
    'window': lambda backbone, policy, positions: RecentFrames(backbone, policy.window_frames, positions),
    'rekv': lambda backbone, policy, positions: PromptAndWindow(backbone, policy.window_tokens, positions),
    'full': lambda backbone, policy, positions: RecentFrames(backbone, None, positions),
    'none': lambda backbone, policy, positions: RecentFrames(backbone, 0, positions),
}


def make_carried(backbone: Backbone, policy: PrefillPolicy, positions: PositionPolicy) -> CompressedState | RecentFrames:
    """The carried context of a policy, empty."""
    return CARRIED[policy.kind](backbone, policy, positions)
