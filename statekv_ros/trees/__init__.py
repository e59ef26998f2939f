"""Behaviours for py_trees: ask the memory, wait for something, go on if it is so. See docs/trees.md.

A tick never waits: the client's callbacks run while its node is spun, by an executor or, between ticks, by
`StateKVClient.spin_for`.
"""
from statekv_ros.trees.asking import Ask, IsTrue
from statekv_ros.trees.waiting import WaitFor

__all__ = ['Ask', 'IsTrue', 'WaitFor']
