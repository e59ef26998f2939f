"""The fault campaign: bad inputs, killed peers and broken files in numbers, against the real node. See docs/reliability.md.

One file per class, each with `WANTED` (trials of a full run) and `run(record)`. What they share: `record` (trials, outcomes,
failures), `subject` (the node under trial), `resources`, `workers` (trials in a process of their own) and `mutation`.
"""
