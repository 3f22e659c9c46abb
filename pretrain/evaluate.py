"""Held-out losses at every exit, beside the loss of guessing by frequency alone."""

import math
import re
from dataclasses import asdict, dataclass

import numpy as np
import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from elastic_model import ElasticBertForPreTraining
from elastic_model.distributed import start_accelerator
from elastic_model.folders import check_file, write_json
from elastic_model.operating_points import checkpoint_hash
from pretrain.config import EvaluateConfig, PretrainConfig
from pretrain.data import Batch, Examples, fitting
from pretrain.masking import IGNORED
from pretrain.prepare import prepare
from pretrain.text import find_files


@dataclass(frozen=True)
class Evaluation:
    """Per exit layer: MLM loss (nats per masked token) and SOP loss, and how often each is right; what they compare
    with. Without segment pairs nothing is said of SOP."""

    mlm_loss: dict[int, float]
    mlm_accuracy: dict[int, float]
    sop_loss: dict[int, float]
    sop_accuracy: dict[int, float]
    unigram_loss: float  # on the same masked tokens, by their frequency in the training documents, else in these
    masked_tokens: int
    pairs: int  # segment pairs, that have an order
    examples: int

    def table(self) -> str:
        """The evaluation as lines of text."""
        lines = ["exit   MLM loss   MLM accuracy   SOP loss   SOP accuracy"]
        for layer, loss in self.mlm_loss.items():
            order = f"{self.sop_loss[layer]:8.4f}   {100 * self.sop_accuracy[layer]:10.1f} %" if self.pairs else "-"
            lines.append(f"{layer:4d}   {loss:8.4f}   {100 * self.mlm_accuracy[layer]:10.1f} %   {order:>8}")
        lines.append(f"unigram {self.unigram_loss:7.4f}   (the same {self.masked_tokens} tokens, by frequency alone)")
        lines.append(f"{self.examples} examples, {self.pairs} of them segment pairs")
        return "\n".join(lines)


def unigram_losses(counts: np.ndarray) -> torch.Tensor:
    """(vocabulary,): -log of every token's share of the training text, add-one smoothed."""
    smoothed = torch.from_numpy(counts).double() + 1.0
    return -(smoothed / smoothed.sum()).log()


def _sums(output, batch: Batch, unigram: torch.Tensor) -> torch.Tensor:
    """(4 exits + 3,): per exit MLM losses, right tokens, SOP losses, right orders; then unigram loss, tokens, pairs"""
    orders = batch["sentence_order_label"]
    targets = batch["labels"][batch["labels"] != IGNORED]
    right = [(logits.argmax(-1) == orders).sum() for logits in output.exit_sop_logits]
    per_exit = (*output.mlm_losses, *output.mlm_right, *output.sop_losses, *right)
    others = (unigram[targets.cpu()].sum(), torch.tensor(len(targets)), (orders != IGNORED).sum())
    return torch.stack([value.cpu().double() for value in (*per_exit, *others)])  # Apple's GPUs have no float64


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    examples: Examples,
    unigram: torch.Tensor,
    limit: int | None,
    rows: int,
    length_config: list[float] | None = None,
) -> Evaluation:
    """Losses on the first `limit` (None: all) of the examples in an order of their own, always masked the same way.

    Each process takes its share, `rows` at a time; the sums are added up over the processes.
    """
    config = accelerator.unwrap_model(model).config
    exit_layers = config.exit_layers
    chosen = np.random.default_rng(0).permutation(len(examples))[:limit]
    by_length = chosen[np.argsort(examples.lengths[chosen], kind="stable")]
    mine = by_length[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros(4 * len(exit_layers) + 3, dtype=torch.float64)
    model.eval()
    for start in range(0, math.ceil(len(chosen) / accelerator.num_processes), rows):
        share = mine[start : start + rows]
        # parameters may be gathered in every pass: a process that has no examples left passes one that is not counted
        batch = examples.collate(0, share if len(share) else chosen[:1])
        batch = {name: values.to(accelerator.device) for name, values in batch.items()}
        output = model(**fitting(batch, config), length_config=length_config, mlm_count=1, sop_count=1)
        if len(share):
            total += _sums(output, batch, unigram)
    model.train()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), "sum")
    return _evaluation(total, exit_layers, len(chosen))


def _evaluation(total: torch.Tensor, exit_layers: list[int], examples: int) -> Evaluation:
    unigram_loss, tokens, pairs = total[-3:].tolist()
    mlm, right, sop, ordered = total[:-3].reshape(4, -1).tolist()

    def per_exit(sums: list[float], count: float) -> dict[int, float]:
        return {layer: value / count for layer, value in zip(exit_layers, sums, strict=True)} if count else {}

    return Evaluation(
        mlm_loss=per_exit(mlm, tokens),
        mlm_accuracy=per_exit(right, tokens),
        sop_loss=per_exit(sop, pairs),
        sop_accuracy=per_exit(ordered, pairs),
        unigram_loss=unigram_loss / max(tokens, 1),
        masked_tokens=int(tokens),
        pairs=int(pairs),
        examples=examples,
    )


def load_for_evaluation(config: EvaluateConfig) -> tuple[ElasticBertForPreTraining, list[str]]:
    """The model, and names of the weights that its checkpoint does not hold: drawn at random, by the seed."""
    if not (config.model / "config.json").is_file():
        raise ValueError(f"model: {config.model} is no checkpoint folder (it holds no config.json)")
    set_verbosity_error()
    disable_progress_bar()
    torch.manual_seed(config.seed)
    model, report = ElasticBertForPreTraining.from_pretrained(
        config.model, output_loading_info=True, dtype=torch.float32
    )
    return model, sorted({re.sub(r"\.\d+\..*", ".*", name) for name in report["missing_keys"]})


def evaluate_checkpoint(config: EvaluateConfig) -> int:
    """Print, and write to `config.output`, the losses of `config.model` at every exit on `config.text`."""
    if config.output:
        check_file(config.output, *find_files(config.text))
    accelerator = start_accelerator(config.precision, None, config.model)
    model, missing = load_for_evaluation(config)
    longest = model.config.max_position_embeddings - model.config.position_offset
    max_length = min(128, longest) if config.max_length is None else config.max_length
    if max_length > longest:
        raise ValueError(f"max_length must be at most {longest}, the longest input of the model, got {max_length}")
    data = PretrainConfig(
        text=config.text,
        output=config.model,
        tokenizer=config.model,
        cache=config.cache,
        max_length=max_length,
        max_position_embeddings=longest,
        validation_fraction=config.held_out or 0.05,
        seed=config.seed,
    )
    with accelerator.local_main_process_first():
        corpus = prepare(data, quiet=not accelerator.is_local_main_process)
    examples = Examples(corpus, data, held_out=True if config.held_out else None)
    if not len(examples):
        raise ValueError(f"text: {' '.join(config.text)} is too short to give one example")
    counted = Examples(corpus, data, held_out=False) if config.held_out else examples
    unigram = unigram_losses(counted.token_counts())
    result = evaluate(
        accelerator,
        accelerator.prepare(model),
        examples,
        unigram,
        config.examples,
        config.batch_size,
        config.length_config,
    )
    if missing:
        accelerator.print(f"not in the checkpoint, so random: {', '.join(missing)}")
    accelerator.print(result.table())
    if config.output and accelerator.is_main_process:
        written = {
            "model": str(config.model),
            "sha256": checkpoint_hash(config.model),
            "not_in_the_checkpoint": missing,
            "text": [{"name": part.name, "sha256": part.key} for source in corpus.sources for part in source.parts],
            **{name: getattr(config, name) for name in ("held_out", "length_config", "seed")},
            "max_length": max_length,
            **asdict(result),
        }
        write_json(config.output, written, indent=2)
    return 0
