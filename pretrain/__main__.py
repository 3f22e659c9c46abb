"""python -m pretrain --config RECIPE.yaml [--resume] [--flag value ...]"""

import sys

from elastic_model.arguments import parse, run
from pretrain.config import PretrainConfig


def command() -> int:
    config = parse(PretrainConfig, prog="python -m pretrain")
    from pretrain.train import train  # after parsing: torch and transformers take seconds to load

    return train(config)


def main() -> int:
    return run(command)


if __name__ == "__main__":
    sys.exit(main())
