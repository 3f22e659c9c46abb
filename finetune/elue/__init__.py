"""ELUE, the benchmark of efficient encoders (Liu et al. 2022, arXiv 2110.07038): its files, its score, its methods."""
