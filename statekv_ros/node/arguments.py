"""What may stand on the node's command line. Imports nothing of ROS, so that `--help` answers at once."""
import argparse

_USAGE = 'statekv-node [--help] [--ros-args ...]'
_EPILOG = '''\
examples:
  statekv-node --ros-args --params-file statekv.yaml
  statekv-node --ros-args -p model:=/models/Qwen3-VL-2B-Instruct -p cameras:="[front]" -p front.topic:=/front/image_raw
  ros2 launch statekv_ros statekv.launch.py cameras:=front=/front/image_raw

All settings are ROS parameters: config/statekv.yaml tells what they mean, with their defaults, as does
docs/reference/parameters.md, and "ros2 param describe /statekv <name>" asks a node that runs. Remappings (-r), log level
(--log-level) and the rest of what may follow --ros-args are those of every ROS 2 node.'''


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message}: parameters and remappings of the node follow --ros-args '
                     f'(usage: {_USAGE}; "{self.prog} --help" tells more)\n')


def own_arguments(arguments: list[str]) -> list[str]:
    """The arguments outside of `--ros-args ... [--]`, which are for ROS; there may be several such parts."""
    own, for_ros = [], False
    for argument in arguments:
        if argument == '--ros-args':
            for_ros = True
        elif for_ros:
            for_ros = argument != '--'
        else:
            own.append(argument)
    return own


def check_arguments(arguments: list[str]) -> None:
    """Print the help and exit (code 0), or refuse what is not known (code 2); return when all is for ROS.

    arguments: as in `sys.argv[1:]`.
    """
    parser = _Parser('statekv-node', usage=_USAGE, epilog=_EPILOG, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     description="A robot's visual memory: watches camera topics, answers questions about what it saw.")
    parser.add_argument('--ros-args', action='store_true', help='what follows, up to "--", is for ROS: parameters, '
                        'parameter files, remappings')
    parser.parse_args(own_arguments(arguments))
