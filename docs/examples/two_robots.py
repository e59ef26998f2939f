"""Asks two robots the same question, at once, and prints who saw it.

    python two_robots.py 'did you see the red cone?'
"""
import sys

import rclpy
from rclpy.node import Node
from rclpy.utilities import remove_ros_args

from statekv_ros.client import Result, StateKVClient

ROBOTS = 'robot_1', 'robot_2'


def main() -> int:
    _, question = remove_ros_args(sys.argv)
    rclpy.init(args=sys.argv)
    node = Node('two_robots')
    memories = {robot: StateKVClient(f'/{robot}/statekv', node) for robot in ROBOTS}
    askings = {robot: memory.ask_async(question) for robot, memory in memories.items()}
    failed = 0
    for robot, asking in askings.items():
        reply = asking.wait()
        good = reply.result is Result.SUCCEEDED
        print(f'{robot}: {reply.answer.text if good else reply.error}', flush=True)
        failed += not good
    for memory in memories.values():
        memory.close()
    node.destroy_node()
    rclpy.shutdown()
    return failed


if __name__ == '__main__':
    sys.exit(main())
