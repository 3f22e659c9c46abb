"""The pre-training loop: data -> group of exits -> loss -> step -> log -> save."""

import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from elastic_model import ElasticBertConfig, ElasticBertForPreTraining
from elastic_model.arguments import to_yaml
from elastic_model.configuration_elasticbert import pooling_with_new_exits
from elastic_model.distributed import (
    Tensors,
    adamw,
    on_main_process,
    start_accelerator,
    start_engine,
    working_together_in,
)
from elastic_model.folders import check_no_checkpoint, check_output, new_folder, write_json
from elastic_model.jobs import INTERRUPTED, cut_log, flat, sigterm
from elastic_model.losses import exit_group, trained_exits
from elastic_model.subnetworks import sandwich
from pretrain.checkpoint import (
    Checkpoint,
    check_same_model,
    check_same_run,
    checkpoint_to_resume,
    load_optimizer_tensors,
    load_weights,
    run_state,
    save_checkpoint,
    save_model,
)
from pretrain.config import PretrainConfig
from pretrain.data import Batch, Examples, GlobalBatches, Share, check_batch_size, fitting
from pretrain.evaluate import Evaluation, evaluate, unigram_losses
from pretrain.masking import IGNORED
from pretrain.metrics import METRICS, Update, Window, peak_flops, peak_memory, update_flops
from pretrain.prepare import Corpus, prepare
from pretrain.report import describe, plot_losses
from pretrain.statistics import statistics, table

EVALUATION = "evaluation.json"
DATA = "data.json"


@dataclass
class Progress:
    """What has been done so far; all of it is saved and resumed."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def build_model(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, unigram: torch.Tensor
) -> ElasticBertForPreTraining:
    """The model to train: new, or the warm start with the exits and the training settings of `config`.

    unigram (vocabulary,): -log of the tokens' shares of the text. A new decoder (a new model's, or a warm start's that
    had no MLM head) starts with them as its bias, so that its first updates are not spent on learning frequencies.
    """
    training = {
        "exit_loss": config.exit_loss,
        "gradient_equilibrium": config.gradient_equilibrium,
        "exit_groups": config.exit_groups,
        "exit_policy": None,  # a warm start's, as its lengths, was chosen for its weights
        "length_config": None,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }
    if config.exit_layers:
        training |= {"exit_layers": config.exit_layers, "num_output_layers": None}
    if config.initializer_range:
        training["initializer_range"] = config.initializer_range
    torch.manual_seed(config.seed)
    if config.init_from:
        training["exit_pooling"] = pooling_with_new_exits(AutoConfig.from_pretrained(config.init_from))
        model, loading = ElasticBertForPreTraining.from_pretrained(
            config.init_from, output_loading_info=True, dtype=torch.float32, **training
        )
        new_decoder = "predictions.decoder.bias" in loading["missing_keys"]
    else:
        model, new_decoder = ElasticBertForPreTraining(_shape(config, tokenizer, training)), True
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"init_from: the tokenizer of {config.init_from} has {len(tokenizer)} tokens, its model "
            f"{model.config.vocab_size}; call model.resize_token_embeddings and save it again"
        )
    if new_decoder:
        model.predictions.decoder.bias.data[: len(unigram)] = -unigram
    longest = model.config.max_position_embeddings - model.config.position_offset
    if config.max_length > longest:
        raise ValueError(
            f"max_length must be at most {longest}, the longest input of the model, got {config.max_length}"
        )
    tokenizer.model_max_length = longest
    return model


def _shape(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, training: dict[str, Any]) -> ElasticBertConfig:
    return ElasticBertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        **training,
    )


def build_optimizer(model: PreTrainedModel, config: PretrainConfig) -> torch.optim.AdamW:
    """BERT's AdamW."""
    return adamw(model, 0.0, config.weight_decay, betas=(0.9, config.adam_beta2), eps=1e-6)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """The rate of update `step` (from 0): linear warm-up, then the schedule's decay to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    decay = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return config.learning_rate * decay[config.schedule]


class Run:
    """A training run: the model and all that changes while it is trained."""

    def __init__(
        self, config: PretrainConfig, accelerator: Accelerator, corpus: Corpus, checkpoint: Checkpoint | None = None
    ):
        self.config = config
        self.accelerator = accelerator
        self.corpus = corpus
        self.train_examples = Examples(corpus, config, held_out=False)
        self.held_out_examples = Examples(corpus, config, held_out=True)
        if not len(self.held_out_examples):
            raise ValueError(
                "text: the held-out documents are too short to give one example; raise validation_fraction"
            )
        self.micro_batch_size = check_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
        share = Share(accelerator.process_index, accelerator.num_processes, self.micro_batch_size)
        self.batches = GlobalBatches(self.train_examples, config.batch_size, share)
        self.unigram = unigram_losses(self.train_examples.token_counts())
        self.plain_model = model = build_model(config, corpus.tokenizer, self.unigram)
        self.exit_layers = model.config.exit_layers
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.progress = Progress()
        if checkpoint:
            check_same_run(checkpoint, run_state(config, corpus))
            check_same_model(checkpoint, model)
            load_weights(checkpoint, model)
            self.progress = Progress(**checkpoint.state["progress"])
        make_optimizer = partial(build_optimizer, config=config)
        self.engine = start_engine(accelerator, model, make_optimizer, config.clip_norm)
        if checkpoint:
            self.engine.load_optimizer(load_optimizer_tensors(checkpoint))
        self.peak_flops = peak_flops(config.peak_tflops, config.precision, accelerator.num_processes)
        self.window = Window()
        self.asked = threading.Event()  # this process, by a signal, to stop
        self.stopping = False  # of all processes, agreed on at the start of an update

    @property
    def model(self) -> torch.nn.Module:
        """What is called: the model, or what spreads it over the processes."""
        return self.engine.model

    def loader(self) -> Iterator[list[Batch]]:
        """This process's micro-batches of every update that is left."""
        steps = range(self.progress.step, self.config.steps)
        return iter(
            DataLoader(
                self.batches,
                sampler=steps,
                batch_size=None,
                num_workers=self.config.workers,
                worker_init_fn=_ignore_signals if self.config.workers else None,
            )
        )

    def update(self, micro_batches: list[Batch]) -> None:
        """One optimizer step on a global batch; skipped, and counted, where the gradient is not finite."""
        progress, config = self.progress, self.config
        masked, pairs, tokens, stop = self._global_counts(micro_batches)
        update = self._backward(micro_batches, masked, pairs)
        self.norm = self.engine.step(learning_rate(progress.step, config))
        if math.isfinite(self.norm):
            progress.skipped_in_a_row = 0
            work = (self.plain_model.config, config.batch_size, tokens, masked, update.exits, update.students)
            self.window.add(update, int(tokens), int(pairs), update_flops(*work))
        else:
            self._skip()
        progress.step += 1
        progress.tokens += int(tokens)
        self.stopping = stop > 0

    def _global_counts(self, micro_batches: list[Batch]) -> list[float]:
        """Masked tokens, ordered pairs and real tokens of the global batch; whether any process was asked to stop."""
        counts: list[float] = [
            sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches),
            sum(int((batch["sentence_order_label"] != IGNORED).sum()) for batch in micro_batches),
            sum(int(batch["attention_mask"].sum()) for batch in micro_batches),
            int(self.asked.is_set()),
        ]
        if self.accelerator.num_processes == 1:
            return counts
        total = torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(total, "sum").tolist()

    def _subnetworks(self) -> tuple[list[int], list[dict[str, Any]]]:
        """The exits that the next update trains and the students it teaches: functions of (seed, step), so that all
        processes draw the same."""
        config, step = self.config, self.progress.step
        exits = trained_exits(config.exit_loss, exit_group(self.exit_layers, config.exit_groups, step))
        if not config.length_drop and not config.layer_drop:
            return exits, []
        draw = random.Random(f"{config.seed} {step}")
        layers = self.plain_model.config.num_hidden_layers
        drawn = sandwich(layers, config.sandwich, draw, length_drop=config.length_drop, layer_drop=config.layer_drop)
        return exits, [vars(one) for one in drawn]

    def _backward(self, micro_batches: list[Batch], masked: float, pairs: float) -> Update:
        """Gradients of the global batch's loss, and this process's part of what it was.

        Sums are divided by the counts of the global batch over the number of processes, whose gradients are averaged:
        the update is the same however the batch is dealt out. Dropout is a function of (seed, step, process).
        """
        accelerator = self.accelerator
        torch.manual_seed(_seed_of(self.config.seed, self.progress.step, accelerator.process_index))
        exits, students = self._subnetworks()
        counts = masked / accelerator.num_processes, max(pairs, 1) / accelerator.num_processes
        zeros = torch.zeros(len(exits), 4, device=accelerator.device)
        update = Update(exits, students, zeros, zeros.sum() if students else None)
        for number, batch in enumerate(micro_batches, start=1):
            batch = {name: values.to(accelerator.device, non_blocking=True) for name, values in batch.items()}
            batch = fitting(batch, self.plain_model.config)
            with self.engine.micro_batch(last=number == len(micro_batches)):
                output = self.model(**batch, exits=exits, students=students, mlm_count=counts[0], sop_count=counts[1])
                self.engine.backward(output.loss)
            update.per_exit = update.per_exit + _per_exit(output, batch["sentence_order_label"], *counts)
            if update.distillation is not None:
                update.distillation = update.distillation + output.distillation_loss.detach()
        return update

    def _skip(self) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= self.config.max_skipped:
            raise ValueError(
                f"the loss was not finite in {progress.skipped_in_a_row} updates in a row, up to update "
                f"{progress.step + 1}; start in another output with a lower learning_rate or more warmup_steps, anew "
                f"or from a checkpoint (--init_from {self.config.output}/checkpoint-N)"
            )

    def log(self) -> dict[str, Any]:
        """A line of metrics.jsonl about the updates since the line before."""
        progress, means = self.progress, self.window.means(self.accelerator)
        line = {
            "step": progress.step,
            "epoch": self.batches.rows(progress.step - 1)[0],
            **means,
            "learning_rate": learning_rate(progress.step - 1, self.config),
            "gradient_norm": self.norm if math.isfinite(self.norm) else None,
            "skipped": progress.skipped,
            "tokens": progress.tokens,
            **self.window.speed(self.peak_flops),
            "peak_memory_gib": round(peak_memory(), 3),
        }
        self.window = Window()
        self._write(line)
        return line

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.config.output / METRICS, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log(flat(line), step=self.progress.step)

    def evaluate(self) -> Evaluation:
        """Losses on the held-out documents, also written to metrics.jsonl."""
        began = time.perf_counter()
        result = evaluate(
            self.accelerator,
            self.model,
            self.held_out_examples,
            self.unigram,
            self.config.evaluation_examples,
            self.micro_batch_size,
        )
        self._write({"step": self.progress.step, "held_out": asdict(result)})
        self.window.started += time.perf_counter() - began  # the time of an evaluation is not that of updates
        return result

    def save(self) -> None:
        """A checkpoint of this step, from which `--resume` continues bit for bit."""
        weights, optimizer = self.engine.weights(), self.engine.optimizer_tensors()  # all processes take part
        state = {"progress": asdict(self.progress), "run": run_state(self.config, self.corpus)}

        def write() -> None:
            model, tokenizer, keep = self.plain_model, self.corpus.tokenizer, self.config.keep_checkpoints
            save_checkpoint(self.config.output, self.progress.step, model, tokenizer, weights, optimizer, state, keep)

        on_main_process(self.accelerator, write)


def _per_exit(output, orders: torch.Tensor, masked: float, pairs: float) -> torch.Tensor:
    """(exits, 4): what PER_EXIT names, of one micro-batch, as its part of the global batch"""
    right = torch.stack(output.mlm_right) / masked
    ordered = torch.stack([(logits.argmax(-1) == orders).sum() for logits in output.exit_sop_logits]) / pairs
    losses = (torch.stack(output.mlm_losses), torch.stack(output.sop_losses))
    return torch.stack([*losses, right, ordered], dim=1).detach()


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _ignore_signals(worker: int) -> None:
    """Workers live until the training process ends them, also where a signal goes to the whole group."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _check_run_folder(config: PretrainConfig) -> None:
    """ValueError where the output is not ours, or holds a run that was not asked to go on."""
    check_output(config.output)
    if not (config.output / DATA).exists():  # which a run of ours has from its start, and no other checkpoint
        check_no_checkpoint(config.output)
    elif not (config.resume or config.resume_previous):
        raise ValueError(
            f"output folder {config.output} holds a run: add --resume to continue it, or choose another output"
        )


def _open_run_folder(config: PretrainConfig, step: int, found: dict[str, Any]) -> None:
    (config.output / "config.yaml").write_text(to_yaml(config))
    (config.output / DATA).write_text(json.dumps(found, indent=2) + "\n")
    cut_log(config.output / METRICS, "step", step)


def train(config: PretrainConfig) -> int:
    """Pre-train as `config` says, into `config.output`; -> 0, or 143 where SIGTERM stopped and saved it."""
    _check_run_folder(config)
    disable_progress_bar()  # transformers' bars for saving one file would tear ours
    accelerator = start_accelerator(config.precision, config.tracker, config.output)
    checkpoint = checkpoint_to_resume(config.output, config.resume_previous)
    finished = (config.output / EVALUATION).exists()
    if finished and checkpoint is None:  # whoever removed them has what he wanted
        accelerator.print(f"{config.output} is complete, and its checkpoints are gone: nothing is left to continue")
        return 0
    with accelerator.local_main_process_first():
        corpus = prepare(config, quiet=not accelerator.is_local_main_process)
    run = Run(config, accelerator, corpus, checkpoint)
    if finished:
        accelerator.print(f"{config.output} is complete")
        accelerator.end_training()
        return 0
    accelerator.wait_for_everyone()  # nobody looks into the output folder any more: from here on it changes
    found = statistics(corpus, run.batches, run.held_out_examples)
    with working_together_in(config.output, accelerator):
        on_main_process(accelerator, partial(_open_run_folder, config, run.progress.step, found))
        if config.tracker:
            accelerator.init_trackers("pretrain", config={name: str(value) for name, value in asdict(config).items()})
        accelerator.print(_summary(run, found))
        with sigterm() as run.asked:  # to save after the update it is in
            code = _loop(run)
        if code == 0:
            _finish(run)
    accelerator.end_training()
    return code


def _summary(run: Run, found: dict[str, Any]) -> str:
    lines = [
        table(found),
        f"{run.parameters / 1e6:.2f} M parameters, exits {run.exit_layers}, {run.accelerator.num_processes} "
        f"process(es), updates {run.progress.step + 1} to {run.config.steps} of {run.config.batch_size} examples",
    ]
    if not found["total"]["pairs"]:
        lines.append(
            "note: no example has two segments, so sentence order is not trained; documents need two sentences that "
            "are told apart (a full stop before a capital) or stand on lines of their own"
        )
    if run.config.warmup_steps >= run.config.steps:
        lines.append(
            f"note: warmup_steps ({run.config.warmup_steps}) is no less than steps ({run.config.steps}): the learning "
            "rate never reaches its peak"
        )
    return "\n".join(lines)


def _loop(run: Run) -> int:
    """All updates that are left, with logs, evaluations and checkpoints when they are due."""
    config = run.config
    quiet = True if not run.accelerator.is_main_process else None  # None: only where there is a terminal
    bar = tqdm(total=config.steps, initial=run.progress.step, desc="pretrain", unit=" updates", disable=quiet)
    for micro_batches in run.loader():
        run.update(micro_batches)
        step = run.progress.step
        bar.update()
        if step % config.log_every == 0 or step == config.steps:
            line = run.log()
            bar.set_postfix(_shown(line))
        if run.stopping and step < config.steps:
            run.save()
            run.accelerator.print(f"stopped after update {step}; --resume continues it")
            return INTERRUPTED
        if step % config.evaluate_every == 0 and step < config.steps:
            result = run.evaluate()
            if run.accelerator.is_main_process:
                bar.write(f"update {step}, held-out documents:\n{result.table()}")
        if step % config.save_every == 0 or step == config.steps:
            run.save()
    bar.close()
    return 0


def _shown(line: dict[str, Any]) -> dict[str, str]:
    """What the progress bar tells of a line of the log: the last exit's losses, and the speed."""
    last = {name: list(line[name].values())[-1:] for name in ("mlm_loss", "sop_loss")}
    shown = {name.replace("_", " "): f"{value:.3f}" for name, values in last.items() for value in values}
    if line["skipped"]:
        shown["skipped"] = str(line["skipped"])
    return {**shown, "tokens/s": f"{line['tokens_per_second']:.0f}"}


def _finish(run: Run) -> None:
    """The last evaluation, the model in the output folder itself, the plot and the card."""
    output = run.config.output
    result, weights = run.evaluate(), run.engine.weights()
    run.accelerator.print(result.table())

    def write() -> None:
        _publish_model(run, weights, output, result)
        plot_losses(output / METRICS, output / "losses.png")
        write_json(output / EVALUATION, {"step": run.progress.step, **asdict(result)}, indent=2)

    on_main_process(run.accelerator, write)


def _publish_model(run: Run, weights: Tensors, output: Path, result: Evaluation) -> None:
    """The files of the finished model, each renamed into the output folder, the configuration last."""
    staging = output / "model"
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left half moved
    with new_folder(staging) as temporary:
        save_model(temporary, run.plain_model, run.corpus.tokenizer, weights)
        describe(temporary, run.config, run.corpus, result)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    staging.rmdir()
