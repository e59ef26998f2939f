"""A robot's visual memory as a ROS 2 node: constant cost per frame, questions at any time (StateKV, arXiv 2605.31598)."""
import pkgutil

# The generated interfaces (statekv_ros.msg, statekv_ros.srv) may live in another folder of the same name.
__path__ = pkgutil.extend_path(__path__, __name__)

__version__ = '0.1.0'
