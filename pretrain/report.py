"""What a finished run leaves to look at: the plot of its losses and the card of its model."""

import json
from dataclasses import asdict
from pathlib import Path

from elastic_model.card import write_card
from elastic_model.folders import new_file
from elastic_model.provenance import Metric, append_stage, describe_data
from pretrain.config import FREE_ON_RESUME, PretrainConfig
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


def describe(folder: Path, config: PretrainConfig, corpus: Corpus, result: Evaluation) -> None:
    """The record of provenance and the model card of a finished model; nothing in them is guessed."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
    parts = [part for source in corpus.sources for part in source.parts]
    sources = [describe_data(part.path, part.name, "train", part.key) for part in parts]
    append_stage(
        folder,
        "pretrain",
        parent=config.init_from,
        data=sources,
        metrics=_metrics(result),
        settings=settings,
        seed=config.seed,
        license=config.license,
    )
    notes = f"Held-out documents, nats per masked token:\n\n```\n{result.table()}\n```\n"
    write_card(folder, name=config.output.resolve().name, notes=notes)


def _metrics(result: Evaluation) -> list[Metric]:
    return [
        Metric(name, value, data="held-out documents", split="validation", exit_layer=layer)
        for name in ("mlm_loss", "mlm_accuracy", "sop_accuracy")
        for layer, value in getattr(result, name).items()
    ]
