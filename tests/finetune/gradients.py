"""What every process of a launch runs: the first moments that AdamW has after some updates of every phase of a recipe.

    accelerate launch ... gradients.py RUNS.json FOLDER

At a learning rate of 0 the weights stay, and the moments are a mean of the updates' gradients.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from finetune.config import TrainOptions
from finetune.run import Run, prepare, start_accelerator
from finetune.train import backward, engine_of

UPDATES = 2  # alternating and grouped recipes have two kinds


def moments(run: Run) -> dict:
    """{PHASE.NAME: AdamW's first moment after the updates}, in the main process; in the others nothing."""
    found = {}
    for number, phase in enumerate(run.phases):
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(phase.trains(name, run.model.config))
        engine = engine_of(run)
        engine.model.train()
        for update in range(UPDATES):
            backward(run, phase, engine, update)
            engine.step(0.0)
        state = engine.optimizer_tensors()
        found |= {f"{number}.{key.removesuffix('.exp_avg')}": state[key] for key in state if key.endswith(".exp_avg")}
        engine.close()
    return found


if __name__ == "__main__":
    runs = [TrainOptions(**settings) for settings in json.loads(Path(sys.argv[1]).read_text())]
    accelerator = start_accelerator(runs[0])
    for options in runs:
        found = moments(prepare(options, accelerator))
        if accelerator.is_main_process:
            save_file(found, Path(sys.argv[2]) / f"{options.recipe}.safetensors")
    accelerator.wait_for_everyone()
