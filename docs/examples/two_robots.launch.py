"""Two robots, each with a memory of its own in its own namespace.

    ros2 launch docs/examples/two_robots.launch.py model:=/models/Qwen3-VL-2B-Instruct
"""
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

ROBOTS = 'robot_1', 'robot_2'


def generate_launch_description() -> LaunchDescription:
    launch_file = str(Path(get_package_share_directory('statekv_ros'), 'launch', 'statekv.launch.py'))
    # The topic is relative: /robot_1/front/image_raw and /robot_2/front/image_raw.
    return LaunchDescription([DeclareLaunchArgument('model', default_value='')] + [
        IncludeLaunchDescription(PythonLaunchDescriptionSource(launch_file), launch_arguments={
            'namespace': robot, 'model': LaunchConfiguration('model'), 'cameras': 'front=front/image_raw'}.items())
        for robot in ROBOTS])
