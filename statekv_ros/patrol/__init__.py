"""The patrol world: made-up robot videos whose every fact is known, questions about them, and a small video VLM trained on them.

`world` makes a patrol, `render` its pictures, `questions` what may be asked and when an answer holds, `captions` what happened
in words; `tokenizer` and `architecture` make the model, `packing`, `forward` and `train` teach it.
"""
import statekv_ros.quiet  # noqa: F401, before Transformers is imported
