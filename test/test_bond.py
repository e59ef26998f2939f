"""The bond with a lifecycle manager, with the real bondpy where that is installed."""
import pytest

pytest.importorskip('rclpy')
pytestmark = pytest.mark.timeout(180)

from lifecycle_msgs.msg import Transition  # noqa: E402
from live import memory_node  # noqa: E402
from statekv_ros.node.bonding import Owner  # noqa: E402


def test_without_bondpy_or_a_manager_there_is_no_bond(tiny_model_dir, tmp_path):
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]') as (_, graph):
        graph.wait_for_state('active')
        assert '/bond' not in dict(graph.node.get_topic_names_and_types())


def test_a_manager_is_bonded_while_the_node_is_active_and_told_when_it_is_not(tiny_model_dir, tmp_path):
    bondpy = pytest.importorskip('bondpy.bondpy', reason='the ROS package bondpy is not installed')
    told = []
    with memory_node(tmp_path, tiny_model_dir, cameras='[front]', autostart='false') as (node, graph):
        for _ in range(2):
            told.clear()
            assert graph.lifecycle(Transition.TRANSITION_CONFIGURE) and graph.lifecycle(Transition.TRANSITION_ACTIVATE)
            bond = bondpy.Bond(Owner(graph.node), 'bond', 'statekv', on_broken=lambda: told.append('broken'),
                               on_formed=lambda: told.append('formed'))
            bond.start()
            graph.wait(lambda: told == ['formed'], 'a bond')
            assert graph.lifecycle(Transition.TRANSITION_DEACTIVATE) and graph.lifecycle(Transition.TRANSITION_CLEANUP)
            graph.wait(lambda: told == ['formed', 'broken'], 'its end')
            bond.shutdown()
