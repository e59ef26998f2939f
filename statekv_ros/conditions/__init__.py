"""Conditions on answers, for whoever asks again and again: the node's watches, and behaviour trees."""
from statekv_ros.conditions.kinds import KINDS, Condition, parse_condition, plain

__all__ = ['KINDS', 'Condition', 'parse_condition', 'plain']
