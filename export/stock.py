"""A stock BERT folder of the layers up to an exit: the same weights under BERT's names, for tools that know nothing of
ours."""

from pathlib import Path

import torch
import transformers
from transformers import BertConfig, PreTrainedModel

from elastic_model import ElasticBertConfig
from export.check import random_rows
from export.checkpoint import Checkpoint
from export.task import HEADS

TOLERANCE = 1e-5
# class of ours -> BERT's, and the name of its head; the bare model has none
STOCK = {
    "ElasticBertForSequenceClassification": ("BertForSequenceClassification", "classifier"),
    "ElasticBertForTokenClassification": ("BertForTokenClassification", "classifier"),
    "ElasticBertForQuestionAnswering": ("BertForQuestionAnswering", "qa_outputs"),
    "ElasticBertModel": ("BertModel", None),
}
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
CARRIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "num_attention_heads",
    "id2label",
    "label2id",
    "problem_type",
)


def write_stock(checkpoint: Checkpoint, layer: int, folder: Path) -> float:
    """Write config.json and model.safetensors of the stock model into a folder and return the largest difference of
    its logits from those of the exit after `layer`; ValueError where BERT has no such model."""
    config = stock_config(checkpoint.config, layer, checkpoint.architecture)
    name, head = STOCK[checkpoint.architecture]
    if head == "qa_outputs":
        config.num_labels = 2  # start and end
    model = getattr(transformers, name)(config).eval()
    tensors = stock_tensors(checkpoint, layer, head, set(model.state_dict()))
    model.load_state_dict(tensors)
    difference = largest_difference(checkpoint, layer, model)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"check failed: the stock model differs from the exit after layer {layer} by {difference:.2g}, allowed is "
            f"{TOLERANCE:g}"
        )
    model.save_pretrained(folder)
    return difference


def stock_config(config: ElasticBertConfig, layer: int, architecture: str) -> BertConfig:
    """BERT's configuration of the layers up to `layer`; ValueError where BERT cannot be so."""
    inner = (config.intermediate_size_per_layer or [])[:layer]
    heads = (config.num_attention_heads_per_layer or [])[:layer]
    whole = config.hidden_size == config.num_attention_heads * (config.attention_head_size or 0)
    if set(heads) != {config.num_attention_heads} or len(set(inner)) != 1 or not whole:
        raise ValueError(
            f"--to bert: a stock BERT has the same heads and FFN width in every layer, here are {heads} heads of "
            f"{config.attention_head_size} and widths {inner}; write a plain ONNX file with --exit {layer} instead"
        )
    pools = architecture == "ElasticBertModel" or HEADS[architecture].pools  # heads on every token read no pooler
    if pools and config.exit_pooling[layer - 1] != "cls":
        raise ValueError(
            f"--to bert: BERT's pooler reads [CLS], that of exit {layer} the mean of the tokens; write a plain ONNX "
            f"file with --exit {layer} instead, or train the exits with --exit_pooling cls"
        )
    if pools and config.pooler_act != "tanh":
        raise ValueError(f"--to bert: BERT's pooler has a tanh, this model's has {config.pooler_act!r}")
    return BertConfig(
        **{name: getattr(config, name) for name in CARRIED_FIELDS},
        num_hidden_layers=layer,
        intermediate_size=inner[0],
        max_position_embeddings=config.max_position_embeddings - config.position_offset,
        type_vocab_size=max(config.type_vocab_size, 1),
    )


def stock_tensors(checkpoint: Checkpoint, layer: int, head: str | None, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The weights under BERT's names; a model without token types gets one of zeros."""
    config, prefix = checkpoint.config, "bert." if head else ""
    ours = {name: torch.from_numpy(tensor) for name, tensor in checkpoint.tensors.items()}
    positions, types = (f"elasticbert.embeddings.{name}_embeddings.weight" for name in ("position", "token_type"))
    ours[positions] = ours[positions][config.position_offset :]
    ours.setdefault(types, torch.zeros(1, config.hidden_size))
    pooler = f"elasticbert.encoder.pooler.{layer - 1}."
    renamed = {name.replace(pooler, "elasticbert.pooler."): tensor for name, tensor in ours.items()}
    found = {name.replace("elasticbert.", prefix, 1): tensor for name, tensor in renamed.items()}
    if head:
        module = "qa_outputs" if head == "qa_outputs" else "classifiers"
        own = head if config.num_output_layers == 1 else f"{module}.{layer - 1}"
        found |= {f"{head}.{part}": ours[f"{own}.{part}"] for part in ("weight", "bias")}
    missing = [name for name in wanted if name not in found and not name.endswith(("position_ids", "token_type_ids"))]
    if missing:
        raise ValueError(f"--to bert: the checkpoint has no weights for {', '.join(sorted(missing)[:3])}")
    return {name: found[name] for name in wanted if name in found}


@torch.inference_mode()
def largest_difference(checkpoint: Checkpoint, layer: int, model: PreTrainedModel) -> float:
    """Between the stock model's outputs and those of the exit after `layer`, on rows of random tokens."""
    worst = 0.0
    for row in [row for rows in random_rows(checkpoint) for row in rows[:2]]:
        ids, types = torch.tensor([row.ids]), torch.tensor([row.type_ids])
        ours = checkpoint.model(
            input_ids=ids,
            **({"token_type_ids": types} if checkpoint.config.type_vocab_size > 1 else {}),
            exit_policy={"name": "constant", "layer": layer},
            length_config=1.0,
        )
        theirs = model(input_ids=ids, token_type_ids=types)
        for name in set(OUTPUTS) & theirs.keys():
            worst = max(worst, float((ours[name] - theirs[name]).abs().max()))
    return worst
