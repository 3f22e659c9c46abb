"""python -m pretrain --config RECIPE.yaml [--resume] [--flag value ...]"""

import os
import sys

from elastic_model.arguments import parse, run
from pretrain.config import PretrainConfig


def command() -> int:
    config = parse(PretrainConfig, prog="python -m pretrain")
    from pretrain.train import train  # after parsing: torch and transformers take seconds to load

    code = train(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        os._exit(code)  # torch's gloo threads now and then abort an interpreter that ends in the usual way
    return code


def main() -> int:
    return run(command)


if __name__ == "__main__":
    sys.exit(main())
