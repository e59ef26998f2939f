"""The shipped SROS2 policies against the nodes that they are for. The memory node's and its client's are held against both of them
in test_client.py."""
import re

import pytest

from domains import new_domain
from policies import FOLDER, Policy, names_of

ENCLAVES = {'node': '/statekv', 'client': '/statekv_client', 'view': '/statekv_view', 'bag': '/statekv_bag'}


def test_every_part_has_a_policy_and_an_enclave_of_its_own():
    assert {file.name.removesuffix('.policy.xml') for file in FOLDER.iterdir()} == ENCLAVES.keys()
    for name, node in ENCLAVES.items():
        policy = Policy(name)
        assert (policy.enclave, policy.node) == (f'/statekv/{name}', node)


def test_only_the_node_may_publish_answers_and_nobody_shipped_may_change_it():
    for name in ENCLAVES.keys() - {'node'}:
        allowed = Policy(name).allowed
        assert not {topic for topic in allowed['publish'] if topic.startswith('/statekv/')}, name
        assert not {service for service in allowed['request'] if re.search('param|change_state', service)}, name
        assert not any(service.startswith('/statekv/') for service in allowed['reply']), name


def test_the_page_may_all_that_a_client_may():
    client, view = Policy('client').allowed, Policy('view').allowed
    assert client['request'] == view['request'] and client['subscribe'] <= view['subscribe']


def test_the_bag_players_policy_allows_what_it_has_and_no_more(monkeypatch):
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    from statekv_ros.replay.publishers import Publishers
    monkeypatch.setenv('ROS_DOMAIN_ID', str(new_domain()))
    images = {'/front/image_raw': 'sensor_msgs/msg/Image', '/rear/image_raw/compressed': 'sensor_msgs/msg/CompressedImage'}
    with Publishers(images, True, True, {'/odom': 'nav_msgs/msg/Odometry'}) as player:
        have = names_of(player._node, 'statekv_bag')
    policy = Policy('bag')
    assert policy.refuses(have) == [] and policy.misses(have) == []
    assert have['publish'] > {*images, '/odom', '/clock'}


def test_a_node_that_must_be_secured_and_cannot_does_not_run_open(monkeypatch, tmp_path):
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    from live import NodeProcess
    for name, value in {'ENABLE': 'true', 'STRATEGY': 'Enforce', 'KEYSTORE': str(tmp_path)}.items():
        monkeypatch.setenv(f'ROS_SECURITY_{name}', value)
    node = NodeProcess(tmp_path, new_domain())
    assert node.process.wait(60.0) == 1
    (line,) = [line for line in node.log.splitlines() if line.startswith('statekv-node: error: ')]
    assert re.search('security|keystore|enclave', line, re.IGNORECASE) and 'Traceback' not in node.log
