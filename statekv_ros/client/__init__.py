"""A planner's way to the memory: ask a question, hear the answer grow, get it with its stamps, in a few lines.

    rclpy.init()
    with StateKVClient() as memory:
        memory.wait_until_ready()
        reply = memory.ask('where did you last see the red toolbox?', timeout_s=5.0)
        if reply.result is Result.SUCCEEDED:
            print(reply.answer.text, reply.answer.last_stamp)
        else:
            print(reply.error)

From inside a node: `StateKVClient(node=self)` and `await memory.ask_async(...)`, see docs/client.md.
"""
from statekv_ros.client.asking import Asking
from statekv_ros.client.memory_client import StateKVClient
from statekv_ros.client.replies import Reply, Result
from statekv_ros.client.spinning import WouldBlock
from statekv_ros.client.watching import WatchRefused

__all__ = ['Asking', 'Reply', 'Result', 'StateKVClient', 'WatchRefused', 'WouldBlock']
