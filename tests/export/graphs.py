"""Tiny classifiers whose exits disagree, and their graphs."""

import numpy as np
import onnxruntime
import torch

from elastic_model import ElasticBertForSequenceClassification
from export.arithmetic import ARITHMETICS
from export.graph import build_graph
from export.task import task_of


def lively(config, seed=0, kind=ElasticBertForSequenceClassification):
    """A random model whose logits are spread as a trained one's are."""
    generator = torch.Generator().manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            elif "embeddings" in name and "LayerNorm" not in name:
                parameter.normal_(0, 1, generator=generator)
            elif "LayerNorm" not in name:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
    return model


def session_of(model, file="model", level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    """A plain onnxruntime session of a model's graph."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if type(model).__name__ == "ElasticBertModel":
        tensors = {f"elasticbert.{name}": tensor for name, tensor in tensors.items()}
    task = task_of(model.config, architecture=type(model).__name__)
    graph = build_graph(model.config, tensors, task, ARITHMETICS[file])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])


def batch_of(config, lengths, seed=0):
    """Right-padded rows of random tokens: the graph's three inputs."""
    rng = np.random.default_rng(seed)
    longest = max(lengths)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    ids = rng.integers(1, config.vocab_size, mask.shape) * mask
    types = rng.integers(0, max(1, config.type_vocab_size), mask.shape) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: value for name, value in batch.items() if name != "token_type_ids" or config.type_vocab_size > 1}


def torch_output(model, batch, **arguments):
    """PyTorch's output for a batch of arrays."""
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(value) for name, value in batch.items()}, **arguments)
