"""Starts the memory node on live cameras.

    ros2 launch statekv_ros statekv.launch.py model:=/models/Qwen3-VL-2B-Instruct cameras:=front=/front/image_raw

Arguments that are left empty leave it to the parameter file. `--show-args` lists them.
"""
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

from statekv_ros.launch_arguments import NODE_NAME, node_parameters, parse_switch
from statekv_ros.transport import use_shipped_profile

RESPAWN_DELAY_S = 2.0


def generate_launch_description() -> LaunchDescription:
    default_params = PathJoinSubstitution([FindPackageShare('statekv_ros'), 'config', 'statekv.yaml'])
    return LaunchDescription([
        DeclareLaunchArgument('model', default_value='', description='checkpoint folder or hub id of the video VLM; '
                              'empty: as in params_file'),
        DeclareLaunchArgument('cameras', default_value='', description='names and topics, as in front=/front/image_raw,'
                              'rear=/rear/image_raw/compressed; empty: as in params_file'),
        DeclareLaunchArgument('params_file', default_value=default_params, description='YAML file of node parameters'),
        DeclareLaunchArgument('namespace', default_value='', description='namespace of the node'),
        DeclareLaunchArgument('use_sim_time', default_value='', description='true: time comes from /clock; '
                              'empty: as in params_file'),
        DeclareLaunchArgument('log_level', default_value='info', description='debug, info, warn, error or fatal'),
        DeclareLaunchArgument('autostart', default_value='', description='true: configure and activate at once; false: '
                              'wait for lifecycle transitions; empty: as in params_file'),
        DeclareLaunchArgument('respawn', default_value='true', description='true: start the node again when its process '
                              'ends, whatever the exit code (it is ended when it hangs; its memory is then empty)'),
        DeclareLaunchArgument('view', default_value='false', description='true: serve a web page of the node too '
                              '(statekv-view; its address is printed)'),
        DeclareLaunchArgument('view_host', default_value='127.0.0.1', description='address that the page is served at; any other '
                              'than this machine\'s own needs the token that is printed'),
        DeclareLaunchArgument('view_port', default_value='8600', description='port of the page'),
        OpaqueFunction(function=set_transport_profile),
        OpaqueFunction(function=start_node),
        OpaqueFunction(function=start_view),
    ])


def set_transport_profile(context) -> list:
    """Every process that this launch starts gets the profile, unless the user has chosen a transport."""
    return [LogInfo(msg=f'transport: {use_shipped_profile().detail}')]


def start_node(context) -> list:
    """The node, with the arguments turned into parameters that override the parameter file."""
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    overrides = node_parameters(*map(value, ('model', 'cameras', 'autostart', 'use_sim_time')))
    # The level of this node's logger alone: "debug" for all of ROS would bury it.
    logger = '.'.join([*value('namespace').strip('/').split('/'), NODE_NAME]).lstrip('.')
    return [Node(
        package='statekv_ros', executable='statekv_node', name=NODE_NAME, namespace=value('namespace'),
        parameters=[value('params_file'), *([overrides] if overrides else [])],
        ros_arguments=['--log-level', f'{logger}:={value("log_level")}'],
        respawn=parse_switch('respawn', value('respawn')), respawn_delay=RESPAWN_DELAY_S,
        output='screen', emulate_tty=True)]


def start_view(context) -> list:
    """The page, in the node's namespace, if it is wanted. It waits for the node, and ends by itself only when it cannot be served."""
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    if not parse_switch('view', value('view')):
        return []
    return [Node(package='statekv_ros', executable='statekv_view', name='statekv_view', namespace=value('namespace'),
                 arguments=['--memory', NODE_NAME, '--host', value('view_host'), '--port', value('view_port')], output='screen')]
