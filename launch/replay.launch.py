"""Starts the memory node on a bag: the node, and `statekv-bag play` with /clock once the node listens.

    ros2 launch statekv_ros replay.launch.py bag:=patrol model:=/models/Qwen3-VL-2B-Instruct

Further arguments are those of statekv.launch.py; `view:=true` shows a web page of it.
"""
from pathlib import Path

from launch import LaunchDescription
from launch.actions import (DeclareLaunchArgument, EmitEvent, ExecuteProcess, IncludeLaunchDescription, LogInfo,
                            OpaqueFunction, RegisterEventHandler, SetLaunchConfiguration)
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.substitutions import ExecutableInPackage

from statekv_ros.launch_arguments import (absolute_topic, cameras_of_topics, format_cameras, parse_cameras,
                                          parse_switch)

# Loading a large model takes minutes, and the player waits for the node's subscriptions.
WAIT_FOR_NODE_S = '900'


def generate_launch_description() -> LaunchDescription:
    node = str(Path(__file__).resolve().with_name('statekv.launch.py'))
    return LaunchDescription([
        DeclareLaunchArgument('bag', description='rosbag2 folder, or one .mcap or .db3 file'),
        DeclareLaunchArgument('rate', default_value='1.0', description='bag seconds per second, or max'),
        DeclareLaunchArgument('loop', default_value='false', description='true: begin again at the end'),
        DeclareLaunchArgument('exit_when_done', default_value='false', description='true: stop the node too when the '
                              'bag has been played'),
        DeclareLaunchArgument('cameras', default_value='', description='names and topics, as in front=/front/image_raw;'
                              ' empty: every image topic of the bag'),
        DeclareLaunchArgument('respawn', default_value='false', description='true: start the node again when its process '
                              'ends; it then sees only the rest of the bag'),
        OpaqueFunction(function=choose_cameras),
        IncludeLaunchDescription(PythonLaunchDescriptionSource(node),
                                 launch_arguments={'use_sim_time': 'true'}.items()),
        OpaqueFunction(function=start_player),
    ])


def choose_cameras(context) -> list:
    """Without an argument `cameras`, a camera for every topic of the bag that can be watched. BagError when there is none."""
    if LaunchConfiguration('cameras').perform(context):
        return []
    from statekv_ros.replay.bag_reader import bag_info, watchable_topics
    watchable, refused = watchable_topics(bag_info(LaunchConfiguration('bag').perform(context)))
    cameras = format_cameras(cameras_of_topics(watchable))
    return [*(LogInfo(msg=f'{topic} is left out: {reason}') for topic, reason in refused.items()),
            LogInfo(msg=f'cameras:={cameras}'), SetLaunchConfiguration('cameras', cameras)]


def start_player(context) -> list:
    """`statekv-bag play` with the cameras' topics only: it waits until each topic that it plays is listened to."""
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    cameras = parse_cameras(value('cameras'))
    # A camera without a topic is left to the parameter file, which only the node reads.
    topics = [absolute_topic(topic, value('namespace')) for topic in cameras.values()] if all(cameras.values()) else []
    loop, exit_when_done = (parse_switch(name, value(name)) for name in ('loop', 'exit_when_done'))
    player = ExecuteProcess(
        cmd=[ExecutableInPackage(package='statekv_ros', executable='statekv_bag'), 'play', value('bag'),
             '--rate', value('rate'), '--wait-timeout', WAIT_FOR_NODE_S, *(['--loop'] if loop else []),
             *(['--topics', *topics] if topics else [])],
        name='statekv_bag', output='screen')

    def when_player_ends(event, context) -> list:
        if context.is_shutdown:
            return []
        if event.returncode != 0:
            return [EmitEvent(event=Shutdown(reason=f'the bag could not be played (exit code {event.returncode})'))]
        if exit_when_done:
            return [EmitEvent(event=Shutdown(reason='the bag has been played'))]
        return [LogInfo(msg='the bag has been played; the node goes on (exit_when_done:=true stops it too)')]

    return [RegisterEventHandler(OnProcessExit(target_action=player, on_exit=when_player_ends)), player]
