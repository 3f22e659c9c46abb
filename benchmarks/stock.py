"""`python -m benchmarks.stock ...`: a stock `BertForSequenceClassification`, fine-tuned by transformers' `Trainer`.

Takes the flags of `python -m finetune train` and reads the same rows in the same way: what our recipes are compared
with. As there, the checkpoint kept is the best on dev of those after each epoch.
"""

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from elastic_model.arguments import parse, run
from elastic_model.folders import check_replaceable, new_folder
from finetune.config import TrainOptions
from finetune.data import Encoded
from finetune.evaluate import quality
from finetune.examples import read_examples
from finetune.kinds import answers_of
from finetune.labels import Labels
from finetune.prepare import chosen_task, encode_split, labels_of_training, load_tokenizer, some_rows


@dataclass(kw_only=True)
class StockOptions(TrainOptions):
    """A stock BertForSequenceClassification, fine-tuned by transformers' Trainer. The flags are those of `python -m
    finetune train`, so that both are called alike; those of exits, recipes and sub-networks mean nothing here."""


def rows_for_trainer(encoded: Encoded) -> list[dict[str, Any]]:
    """A split as `Trainer` reads it."""
    targets = encoded.targets["labels"].tolist()
    return [{**row, "labels": label} for row, label in zip(encoded.rows, targets, strict=True)]


def training_arguments(options: TrainOptions, updates: int, folder: Path) -> TrainingArguments:
    """The options as `Trainer` calls them."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=round(options.warmup * updates),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        train_sampling_strategy="group_by_length",  # as ours: batches of rows of like length
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def load(options: TrainOptions, labels: Labels) -> Any:
    """The stock model with a new head."""
    set_seed(options.seed)
    return AutoModelForSequenceClassification.from_pretrained(
        options.model,
        local_files_only=True,
        num_labels=len(labels.names),
        id2label=dict(enumerate(labels.names)),
        label2id={name: number for number, name in enumerate(labels.names)},
        problem_type=labels.problem_type,
    )


def train(options: TrainOptions) -> None:
    """Fine-tune and write the best checkpoint as the output."""
    logging.set_verbosity_error()
    check_replaceable(Path(options.output), options.model)
    task, tokenizer = chosen_task(options), load_tokenizer(Path(options.model))
    examples = {
        "train": some_rows(read_examples(task, "train"), options.train_rows, options.seed),
        "dev": read_examples(task, "dev"),
    }
    labels = labels_of_training(options, task, examples["train"])
    splits = {
        split: encode_split(rows, split, task, labels, tokenizer, options.max_length)
        for split, rows in examples.items()
    }

    def measure(found: EvalPrediction) -> dict[str, float]:
        shuffled = replace(splits["dev"], labels=np.asarray(found.label_ids))  # rows come grouped by length here too
        answers = answers_of(np.asarray(found.predictions), shuffled, labels)
        return {"quality": quality(answers, shuffled, labels)[labels.metrics[0]]}

    folder = Path(options.output).with_name(f"{Path(options.output).name}.trainer")
    updates = options.epochs * -(-len(splits["train"]) // options.batch_size)
    model = load(options, labels)
    trainer = Trainer(
        model,
        training_arguments(options, updates, folder),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=rows_for_trainer(splits["train"]),
        eval_dataset=rows_for_trainer(splits["dev"]),
        compute_metrics=measure,
    )
    trainer.train()
    print(f"dev: {trainer.state.best_metric}, {asdict(options)}")
    with new_folder(Path(options.output)) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(run(lambda: train(parse(StockOptions))))
