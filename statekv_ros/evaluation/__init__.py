"""`statekv-eval`: questions with known answers, asked of a model under several policies, and a report of what came of it.

`cli` takes the arguments, `evaluate` does what they say: `schema` reads the questions, `benchmarks` those of others, `footage`
the videos; `plan` says what
is to be done, `run` (offline) and `online` do one job of it, `pool` all of them, `store` keeps the results; `metrics` and
`report` make the page, `tables` the tables.
"""
LOCAL_RAY = 'local'     # instead of the address of a Ray cluster: start one on this machine
AGES_S = (0, 4, 8, 16, 32, 64, 128, 256, float('inf'))      # edges of age bands, where nobody asks for others
