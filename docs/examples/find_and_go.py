"""Find and go: asks where something was seen, prints the pose and sends it to Nav2 as a goal.

    python find_and_go.py 'when did you see the red cone?' --camera front

The goal goes to the topic `goal_pose`, where Nav2 (and RViz's "2D Goal Pose") has it. With Nav2's Python package instead:
`BasicNavigator().goToPose(reply.answer.pose)`.
"""
import argparse
import sys
import time

import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.utilities import remove_ros_args

from statekv_ros.client import Result, StateKVClient

PATIENCE_S = 10.0       # until somebody listens to the goals


class FindAndGo(Node):
    """Asks once, without holding its executor: the robot's other callbacks go on meanwhile."""

    def __init__(self, question: str, camera: str):
        super().__init__('find_and_go')
        self.goals = self.create_publisher(PoseStamped, 'goal_pose', 10)
        self.memory = StateKVClient(node=self)
        self.exit_code: int | None = None
        asking = self.memory.ask_async(question, camera, timeout_s=30.0, on_text=lambda text: print('so far:', text, flush=True))
        asking.add_done_callback(lambda done: self.go(done.result()))

    def go(self, reply) -> None:
        """To where the robot was when it saw what the answer looked at most."""
        if reply.result is not Result.SUCCEEDED:
            print('no answer:', reply.error, file=sys.stderr)
            self.exit_code = 1
        elif not reply.answer.has_pose:
            print(f'{reply.answer.text!r}, but where the robot was then is not known (parameter "pose.topic")', file=sys.stderr)
            self.exit_code = 1
        else:
            goal = reply.answer.pose
            # The stamp says when the robot was there; a planner wants the goal's frame as it is now.
            goal.header.stamp = self.get_clock().now().to_msg()
            position = goal.pose.position
            print(f'{reply.answer.text!r}: going to x={position.x:.2f} y={position.y:.2f} in {goal.header.frame_id!r}', flush=True)
            end = time.monotonic() + PATIENCE_S
            self.create_timer(0.05, lambda: self.send(goal, end))

    def send(self, goal: PoseStamped, end: float) -> None:
        """Once somebody listens: what is published before the two have found each other is lost."""
        if self.goals.get_subscription_count():
            self.goals.publish(goal)
            self.exit_code = 0
        elif time.monotonic() > end:
            print('nobody listens to goal_pose: does the navigation run?', file=sys.stderr)
            self.exit_code = 1


def main() -> int:
    parser = argparse.ArgumentParser(description='ask where something was seen, and drive there')
    parser.add_argument('question')
    parser.add_argument('--camera', default='', help='name of one camera; all when left out')
    arguments = parser.parse_args(remove_ros_args(sys.argv)[1:])
    rclpy.init(args=sys.argv)
    node = FindAndGo(arguments.question, arguments.camera)
    while rclpy.ok() and node.exit_code is None:
        rclpy.spin_once(node)
    # A moment for the goal to leave: Nav2 hears it with reliable QoS.
    node.goals.wait_for_all_acked(Duration(seconds=2.0))
    node.destroy_node()
    rclpy.shutdown()
    return node.exit_code or 0


if __name__ == '__main__':
    sys.exit(main())
