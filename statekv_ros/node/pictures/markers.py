"""Where the robot was at what an answer looked at, for RViz and Foxglove."""
from collections.abc import Iterable, Mapping, Sequence

from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, Pose, Vector3
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

from statekv_ros.memory import Evidence
from statekv_ros.node.camera import Camera
from statekv_ros.node.messages import pose_stamped
from statekv_ros.node.pictures.darkroom import Darkroom
from statekv_ros.node.questions import CameraAnswer

_ARROW_M, _TEXT_M = 0.6, 0.25       # of a share of 1; height of letters
_LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def markers(evidence: Iterable[tuple[str, Evidence]]) -> MarkerArray:
    """An arrow for each frame step that has a pose, larger and redder with its share, with camera, stamp and share above it, and before
    them the end of all earlier ones."""
    array = MarkerArray(markers=[Marker(action=Marker.DELETEALL)])
    for number, (camera, step) in enumerate(evidence):
        if step.pose is None:
            continue
        told, share = pose_stamped(step.pose), min(1.0, max(0.0, step.share))
        length = _ARROW_M * (.4 + .6 * share)
        arrow = Marker(ns='evidence', id=number, type=Marker.ARROW, pose=told.pose,
                       scale=Vector3(x=length, y=length / 5, z=length / 5), color=ColorRGBA(r=.9, g=.7 * (1 - share), b=.1, a=.9))
        place = told.pose.position
        above = Pose(position=Point(x=place.x, y=place.y, z=place.z + 1.5 * _TEXT_M))
        label = Marker(ns='evidence_text', id=number, type=Marker.TEXT_VIEW_FACING, pose=above, scale=Vector3(z=_TEXT_M),
                       color=ColorRGBA(r=1., g=1., b=1., a=1.), text=f'{camera} {step.last_stamp_ns / 1e9:.1f} s {share:.0%}')
        for marker in (arrow, label):
            # Of no stamp, which means "now": transforms of hours ago are in no buffer any more.
            marker.header.frame_id = step.pose.frame_id
            array.markers.append(marker)
    return array


class EvidenceMarkers:
    """~/evidence_markers: places of the newest answer's evidence, made while somebody subscribes."""

    def __init__(self, node: LifecycleNode, darkroom: Darkroom):
        self._darkroom = darkroom
        self._publisher = node.create_lifecycle_publisher(MarkerArray, '~/evidence_markers', _LATCHED)

    def show(self, cameras: Mapping[str, Camera], answers: Sequence[CameraAnswer], asked: Time) -> None:
        """Have them made and published; neither waits nor raises."""
        if answers and self._publisher.get_subscription_count():
            steps = [(answer.camera, step) for answer in answers for step in answer.result.evidence]
            self._darkroom.draw(lambda: self._publisher.publish(markers(steps)))
