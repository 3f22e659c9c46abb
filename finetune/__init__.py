"""Jobs: a pre-trained checkpoint to a task checkpoint with exits, its evaluation and its operating points."""
