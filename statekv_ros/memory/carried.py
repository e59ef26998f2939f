"""From a prefill policy to the context that it carries from frame step to frame step."""
from statekv_ros.backbones.base import KVLayout
from statekv_ros.memory.policies import PrefillPolicy
from statekv_ros.memory.recent import RecentFrames
from statekv_ros.memory.state import CompressedState

CARRIED = {
    'statekv': lambda layout, policy: CompressedState(layout, policy.budget),
    'window': lambda layout, policy: RecentFrames(layout, policy.window_frames),
    'full': lambda layout, policy: RecentFrames(layout, None),
    'none': lambda layout, policy: RecentFrames(layout, 0),
}


def make_carried(layout: KVLayout, policy: PrefillPolicy) -> CompressedState | RecentFrames:
    """The carried context of a policy, empty."""
    return CARRIED[policy.kind](layout, policy)
