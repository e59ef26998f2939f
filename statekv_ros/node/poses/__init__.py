"""Where the robot was: from a topic or from tf2, for the stamps of camera frames."""
from statekv_ros.node.poses.source import PoseSource
from statekv_ros.node.poses.topic import TopicPoses
from statekv_ros.node.poses.transforms import TransformPoses

__all__ = ['PoseSource', 'make_source']


def make_source(node, topic: str, kind: str, target_frame: str, source_frame: str, tolerance_s: float) -> PoseSource | None:
    """What the parameters `pose.*` ask for; None where they ask for nothing.

    Raises:
        ParameterError: tf2 is asked for and is not installed.
    """
    if topic:
        return TopicPoses(node, topic, kind, target_frame, tolerance_s)
    return TransformPoses(node, target_frame, source_frame, tolerance_s) if target_frame else None
