"""What a finished run leaves to look at: the plot of its losses and the card of its model."""

import json
from pathlib import Path

from elastic_model.folders import new_file
from pretrain.config import PretrainConfig
from pretrain.evaluate import Evaluation
from pretrain.prepare import Corpus


def plot_losses(metrics: Path, image: Path) -> None:
    """MLM loss of every exit: training as lines, held-out documents as dots, guessing by frequency dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(text) for text in metrics.read_text().splitlines()]
    training = [line for line in lines if "mlm_loss" in line]
    held_out = [line for line in lines if "held_out" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, layer in enumerate(held_out[-1]["held_out"]["mlm_loss"]):
        points = [(line["step"], line["mlm_loss"][layer]) for line in training if layer in line["mlm_loss"]]
        axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", label=f"exit after layer {layer}")
        points = [(line["step"], line["held_out"]["mlm_loss"][layer]) for line in held_out]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{number % 10}")
    axes.axhline(held_out[-1]["held_out"]["unigram_loss"], color="grey", linestyle="--", label="unigram, held out")
    axes.set(xlabel="updates", ylabel="MLM loss (nats); dots: held-out documents")
    axes.legend(fontsize="small")
    with new_file(image) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


CARD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [elasticbert, multi-exit, masked-language-modelling]
---
# {name}

A BERT encoder with an exit after layers {exits} ({layers} x {width}, vocabulary {vocabulary}), pre-trained with masked
language modelling and sentence-order prediction at every exit.

Trained for {steps} updates of {batch} examples of at most {length} tokens on {documents} documents ({tokens} tokens)
from {files}. The text's licence is not recorded here: it is that of those files.

Losses on held-out documents (nats per masked token):

```
{table}
```

`config.yaml` in this folder repeats the run: `python -m pretrain --config config.yaml --output ANOTHER_FOLDER`.
"""


def write_card(file: Path, config: PretrainConfig, corpus: Corpus, result: Evaluation) -> None:
    """README.md of the finished model: what it is, what it was trained on, how well it predicts; nothing guessed."""
    text = CARD.format(
        name=config.output.resolve().name,
        exits=", ".join(map(str, result.mlm_loss)),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=len(corpus.tokenizer),
        steps=config.steps,
        batch=config.batch_size,
        length=config.max_length,
        documents=corpus.total("documents"),
        tokens=corpus.total("tokens"),
        files=", ".join(f"`{Path(name).name}`" for name in config.text),
        table=result.table(),
    )
    with new_file(file) as temporary:
        temporary.write_text(text)
