"""lmms-eval's model `statekv`: its tasks, prompts and scores, with videos watched as a stream and asked from memory.

`manifest` is what the harness finds; `model` loads and answers, in its two interfaces; `arguments` takes `--model_args`,
`requests` says what is asked of which video, `generation` how to answer; `sampling` and `video` give the frames, `asking` the
answers, `journal` keeps them for a run that was stopped. Nothing here imports ROS.
"""
