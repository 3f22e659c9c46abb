"""What a finished run leaves to look at: the plot of its losses and the card of its model."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from elastic_model.card import write_card
from elastic_model.folders import new_file
from elastic_model.provenance import Metric, append_stage, describe_data
from pretrain.config import FREE_ON_RESUME, PretrainConfig
from pretrain.evaluate import Evaluation
from pretrain.metrics import METRICS
from pretrain.prepare import Corpus


def plot_losses(metrics: Path, image: Path) -> None:
    """MLM and SOP losses of every exit: training as lines, held-out documents as dots, guessing dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(text) for text in metrics.read_text().splitlines()]
    training = [line for line in lines if "mlm_loss" in line]
    held_out = [{"step": line["step"], **line["held_out"]} for line in lines if "held_out" in line]
    panels = {
        "mlm_loss": ("masked tokens (MLM)", held_out[-1]["unigram_loss"], "by frequency alone"),
        "sop_loss": ("sentence order (SOP)", math.log(2), "by chance"),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for side, (name, (title, guess, guessing)) in zip(axes, panels.items(), strict=True):
        layers = list(held_out[-1]["mlm_loss"])
        for layer, color in zip(layers, pyplot.cm.viridis_r(np.linspace(0.1, 1, len(layers))), strict=True):
            for points, style in ((training, "-"), (held_out, "o")):
                known = [(line["step"], line[name][layer]) for line in points if layer in line[name]]
                label = f"exit after layer {layer}" if style == "o" else None
                side.plot([step for step, _ in known], [loss for _, loss in known], style, color=color, label=label)
        side.axhline(guess, color="grey", linestyle="--", label=guessing)
        side.set(title=title, xlabel="updates", ylabel="loss (nats); dots: held-out documents")
    axes[0].legend(fontsize="small", ncols=1 + len(layers) // 13)
    axes[1].legend([axes[1].lines[-1]], ["by chance"], fontsize="small")
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
    held_out = f"Held-out documents, nats per masked token:\n\n```\n{result.table()}\n```\n"
    notes = f"Pre-training: {_course(config)}.\n\n{held_out}"
    write_card(folder, name=config.output.resolve().name, notes=notes)


def _course(config: PretrainConfig) -> str:
    """How far the run went and how fast, from the last line of its log."""
    lines = [json.loads(text) for text in (config.output / METRICS).read_text().splitlines()]
    last = [line for line in lines if "mlm_loss" in line][-1]
    return (
        f"{last['step']:,} updates of {config.batch_size:,} examples, {last['tokens']:,} tokens, "
        f"{last['skipped']} updates skipped, at last {last['tokens_per_second']:,.0f} tokens a second"
    )


def _metrics(result: Evaluation) -> list[Metric]:
    return [
        Metric(name, value, data="held-out documents", split="validation", exit_layer=layer)
        for name in ("mlm_loss", "mlm_accuracy", "sop_accuracy")
        for layer, value in getattr(result, name).items()
    ]
