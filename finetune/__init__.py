"""Jobs on task checkpoints: training with exits, distillation, pruning, search, calibration, evaluation; pipelines of
them; ELUE."""
