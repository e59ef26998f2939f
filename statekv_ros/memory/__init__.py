"""The streaming memory: streams, compressed state, detailed cache, policies and answers. No ROS and no files in here."""
from statekv_ros.memory.answering.decoding import Answering
from statekv_ros.memory.policies import AnswerPolicy, PrefillPolicy, parse_answer_policy, parse_prefill_policy
from statekv_ros.memory.records import AnswerResult, Evidence, StepRecord, StepReport
from statekv_ros.memory.stream import VideoStream

__all__ = ['AnswerPolicy', 'AnswerResult', 'Answering', 'Evidence', 'PrefillPolicy', 'StepRecord', 'StepReport',
           'VideoStream', 'parse_answer_policy', 'parse_prefill_policy']
