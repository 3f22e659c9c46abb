"""Jobs on task checkpoints, and pipelines of them.

Rows: tasks, sources, tables, examples, labels, data, tokens, questions, kinds. Training: recipe, train, run, prepare,
state, checkpoint; distill, prune (with widths), elastify, teacher. Operating points: policies, candidates, explore,
by_row, evolution, search, latency, calibrate. Quality: metrics, evaluate, figures. Folders of their own: `pipelines`
(Xin et al. 2022) and `elue` (Liu et al. 2022). `config` has the options of all commands.
"""
