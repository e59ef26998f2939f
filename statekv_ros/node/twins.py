"""Nodes that have this one's name: ROS allows them, and a question then reaches all."""
from rclpy.node import Node


class Twins:
    """Counts the node's namesakes."""

    def __init__(self, node: Node):
        self._node = node
        self._known = 0

    def look(self) -> str:
        """What is wrong when other nodes have this one's name; logged when their number grows."""
        name = self._node.get_fully_qualified_name()
        names = [f'{space.rstrip("/")}/{node}' for node, space in self._node.get_node_names_and_namespaces()]
        twins = names.count(name) - 1
        sentence = '' if twins < 1 else (
            f'{twins} more node{"s have" if twins > 1 else " has"} the name {name}: a question reaches all of them, and the '
            'first answer counts; give each a name (-r __node:=...) or a namespace of its own')
        if twins > self._known:
            self._node.get_logger().warning(sentence)
        self._known = twins
        return sentence
