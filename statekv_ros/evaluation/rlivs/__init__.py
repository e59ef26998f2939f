"""rLiVS (arXiv 2510.17364, NeurIPS 2025) behind the face of a stream: clips are told in words, the words are the memory.

Written from the paper's description alone. Its authors state that a patent on the method is pending.
"""
from statekv_ros.evaluation.rlivs.caption_memory import CaptionMemory
from statekv_ros.evaluation.rlivs.options import parse_rlivs

__all__ = ['CaptionMemory', 'parse_rlivs']
