"""python -m pretrain [prepare | evaluate | release] --config RECIPE.yaml [--resume] [--flag value ...]"""

import os
import sys

from elastic_model.arguments import parse, run
from pretrain.config import EvaluateConfig, PretrainConfig, ReleaseConfig


def command(argv: list[str]) -> int:
    """Train, prepare the text of a run (before many processes wait for it), evaluate a checkpoint or release it.

    Frameworks take seconds to load, so options are parsed before.
    """
    if argv[:1] == ["evaluate"]:
        to_evaluate = parse(EvaluateConfig, argv[1:], prog="python -m pretrain evaluate")
        from pretrain.evaluate import evaluate_checkpoint

        return evaluate_checkpoint(to_evaluate)
    if argv[:1] == ["prepare"]:
        to_prepare = parse(PretrainConfig, argv[1:], prog="python -m pretrain prepare")
        from pretrain.statistics import prepare_text

        return prepare_text(to_prepare)
    if argv[:1] == ["release"]:
        to_release = parse(ReleaseConfig, argv[1:], prog="python -m pretrain release")
        from pretrain.release import release

        return release(to_release)
    config = parse(PretrainConfig, argv, prog="python -m pretrain")
    from pretrain.train import train

    return train(config)


def main() -> int:
    code = run(lambda: command(sys.argv[1:]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        os._exit(code)  # torch's gloo threads now and then abort an interpreter that ends in the usual way
    return code


if __name__ == "__main__":
    sys.exit(main())
