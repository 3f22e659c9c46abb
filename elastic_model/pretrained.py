"""Where weights come from and what goes out with them: stock BERT-family checkpoints in, the code files out to the
hub."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

# what a fresh process without the package needs to know to load a checkpoint folder
AUTO_MAP = {
    "AutoConfig": "configuration_elasticbert.ElasticBertConfig",
    "AutoModel": "modeling_elasticbert.ElasticBertModel",
    "AutoModelForPreTraining": "modeling_elasticbert.ElasticBertForPreTraining",
    "AutoModelForMaskedLM": "modeling_elasticbert.ElasticBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_elasticbert.ElasticBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_elasticbert.ElasticBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_elasticbert.ElasticBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_elasticbert.ElasticBertForMultipleChoice",
}


def save_code(config: PreTrainedConfig, modeling_file: Path, folder: str | Path) -> None:
    """Put the code files beside a checkpoint and name all classes in its config's `auto_map`."""
    config.auto_map = dict(AUTO_MAP)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in [modeling_file, *get_relative_import_files(modeling_file)]:
        source, target = Path(str(file)), Path(folder) / Path(str(file)).name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


# Stock key -> ours, for the first pattern that matches; POOLER and TRANSFORM go to every exit, HEAD to the last one.
_ENCODER_KEYS = [
    (r"^(?:bert\.|roberta\.|distilbert\.)?(embeddings|encoder)\.(.+)", r"elasticbert.\1.\2"),
    (r"^(?:bert\.|roberta\.)?pooler\.dense\.", "POOLER.dense."),
    (r"^qa_outputs\.", "HEAD."),
]
DISTILBERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_KEYS = {
    "bert": [
        (r"^cls\.predictions\.transform\.", "TRANSFORM."),
        (r"^cls\.predictions\.(?:decoder\.)?bias$", "predictions.decoder.bias"),
        (r"^cls\.predictions\.decoder\.weight$", "predictions.decoder.weight"),
        (r"^classifier\.", "HEAD."),
    ],
    "roberta": [
        (r"^lm_head\.dense\.", "TRANSFORM.dense."),
        (r"^lm_head\.layer_norm\.", "TRANSFORM.LayerNorm."),
        (r"^lm_head\.(?:decoder\.)?bias$", "predictions.decoder.bias"),
        (r"^lm_head\.decoder\.weight$", "predictions.decoder.weight"),
        (r"^classifier\.dense\.", "POOLER.dense."),  # RoBERTa's classifier brings its own pooler
        (r"^classifier\.(?:out_proj\.)?", "HEAD."),
    ],
    "distilbert": [
        *(
            (rf"^(?:distilbert\.)?transformer\.layer\.(\d+)\.{stock}\.", rf"elasticbert.encoder.layer.\1.{ours}.")
            for stock, ours in DISTILBERT_LAYER.items()
        ),
        (r"^pre_classifier\.", "POOLER.dense."),
        (r"^vocab_transform\.", "TRANSFORM.dense."),
        (r"^vocab_layer_norm\.", "TRANSFORM.LayerNorm."),
        (r"^vocab_projector\.", "predictions.decoder."),
        (r"^classifier\.", "HEAD."),
    ],
    "elasticbert": [],  # read here where static use begins or ends: the last exit's head is `classifier` there
}
# DistilBERT's own names of BERT's fields
_DISTILBERT_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
    "seq_classif_dropout": "classifier_dropout",
}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def elastic_config(stock: dict) -> dict:
    """The fields of an ElasticBertConfig that makes the same model as a stock BERT, RoBERTa or DistilBERT config."""
    fields = {key: value for key, value in stock.items() if key not in ("model_type", "architectures", "auto_map")}
    if stock["model_type"] == "roberta":
        fields["position_offset"] = stock.get("pad_token_id", 1) + 1  # positions count on from the padding index
    if stock["model_type"] == "distilbert":
        fields = {_DISTILBERT_FIELDS.get(key, key): value for key, value in fields.items()}
        fields.update(type_vocab_size=0, layer_norm_eps=1e-12)
    return fields


def _elastic_fields(stock: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """`elastic_config`, and what only the weights tell: DistilBERT's classifiers pool with a ReLU."""
    return {**elastic_config(stock), **({"pooler_act": "relu"} if "pre_classifier.weight" in tensors else {})}


_DTYPES = ("dtype", "torch_dtype")


def load_foreign(model_class, name, kwargs: dict) -> tuple[PreTrainedConfig, dict[str, torch.Tensor], dict] | None:
    """Config, state dict and remaining arguments where the checkpoint is not an elastic one; None where it is.

    Stock BERT, RoBERTa and DistilBERT encoders, classifiers, taggers, span and masked-token models: every exit's
    pooler (and masked-token transform) starts from the pretrained one, the task head becomes the last exit's, so
    that full depth is the stock model. Raises ValueError for other model types.
    """
    if name is None:
        return None
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    try:
        stock, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError:
        if kwargs.get("config") is None:
            raise
        return None  # weights alone, with the config as an argument: ours
    if not stock and kwargs.get("config") is None:
        adapter = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub)
        if adapter is not None:
            _check_base(name, Path(adapter))
            return None  # of PEFT: transformers finds its base
        raise OSError(f"{name} has no config.json: it is not a checkpoint.")
    files = _weight_files(kwargs.get("variant"), kwargs.get("use_safetensors"))
    if stock and "model_type" not in stock:
        stock["model_type"] = _family(_read_weights(name, files, hub), name)
    model_type = _checked_type(stock, name, model_class)
    config = kwargs.get("config")
    if isinstance(config, str | Path):
        given_type = PreTrainedConfig.get_config_dict(config)[0].get("model_type")
        ours = given_type in ("elasticbert", model_class.config_class.model_type)
        reader = model_class.config_class if ours else AutoConfig
        rest = {key: value for key, value in kwargs.items() if key not in ("config", *_DTYPES)}
        config, rest = reader.from_pretrained(config, return_unused_kwargs=True, **rest)
        kwargs = {**rest, **{key: kwargs[key] for key in _DTYPES if key in kwargs}, "config": config}
    was_static = stock.get("num_output_layers") == 1
    given = getattr(config, "num_output_layers", None) if config is not None else stock.get("num_output_layers")
    if model_type == "elasticbert" and (kwargs.get("num_output_layers", given) == 1) == was_static:
        return None
    _check_no_weights(name, kwargs)
    read = (*_HUB_ARGUMENTS, "variant", "use_safetensors")
    kwargs = {key: value for key, value in kwargs.items() if key not in read}
    tensors = _read_weights(name, files, hub)
    config = kwargs.pop("config", None)
    kwargs = {key: value for key, value in kwargs.items() if key not in _DTYPES or value != "auto"}  # as without it
    if isinstance(config, model_class.config_class) and model_type != "elasticbert":
        _check_config(config, _elastic_fields(stock, tensors), name)
    if config is not None and config.model_type in _KEYS and config.model_type != "elasticbert":
        fields = _elastic_fields(config.to_dict(), tensors)
        config, kwargs = model_class.config_class.from_dict(fields, return_unused_kwargs=True, **kwargs)
    if config is None:
        fields = stock if model_type == "elasticbert" else _elastic_fields(stock, tensors)
        config, kwargs = model_class.config_class.from_dict(fields, return_unused_kwargs=True, **kwargs)
    return config, _convert(tensors, model_type, model_class, config, stock.get("num_hidden_layers")), kwargs


@contextmanager
def damage_named(name) -> Iterator[None]:
    """An error of the safetensors reader, which names no file, as an OSError that does."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"the weights of {name} are damaged or cut short ({error}): get them again.") from error


def commit_of(name, kwargs: dict) -> str | None:
    """The commit that a checkpoint of the hub was just read at; None for a folder, or where it is not in the cache."""
    if name is None or Path(name).exists():
        return None
    config = "/".join(filter(None, (kwargs.get("subfolder"), "config.json")))
    file = try_to_load_from_cache(
        str(name), config, cache_dir=kwargs.get("cache_dir"), revision=kwargs.get("revision")
    )
    return extract_commit_hash(file, None) if isinstance(file, str) else None


def _check_config(config: PreTrainedConfig, stock: dict, name) -> None:
    """ValueError where a config differs from the stock model's in what shapes do not tell."""
    for field in ("position_offset", "type_vocab_size", "pooler_act"):
        if field in stock and stock[field] != getattr(config, field):
            raise ValueError(
                f"the config given says {field} {getattr(config, field)}, {name} has {stock[field]}: give the "
                "settings that you change as arguments of from_pretrained, instead of a config."
            )


def _checked_type(stock: dict, name, model_class) -> str:
    """The model type of a checkpoint, `elasticbert` for a subclass's; ValueError where it cannot be elastic."""
    model_type = stock.get("model_type", "elasticbert")
    if model_type in ("elasticbert", model_class.config_class.model_type):
        return "elasticbert"
    if model_type not in _KEYS:
        allowed = ", ".join(_KEYS)
        raise ValueError(
            f"model_type of {name} must be one of {allowed} to become an elastic model, got {model_type!r}."
        )
    if stock.get("is_decoder"):
        raise ValueError(f"{name} is a decoder (is_decoder in its config): elastic models are encoders.")
    return model_type


def _check_no_weights(name, kwargs: dict) -> None:
    if kwargs.get("state_dict") is not None:
        raise ValueError(
            f"state_dict: the weights of {name} are read from its files; give either the name or the weights (with "
            "from_pretrained(None, config=..., state_dict=...))."
        )


def _check_base(name, adapter: Path) -> None:
    """ValueError where an adapter's base is a stock checkpoint: transformers would read it without our names."""
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    found = PreTrainedConfig.get_config_dict(base)[0].get("model_type") if base else None
    if found != "elasticbert":
        raise ValueError(
            f"{name} is an adapter of {base or 'a base that it does not name'} ({found or 'unknown'}), no elastic "
            "checkpoint: load that with from_pretrained, then the adapter with peft.PeftModel.from_pretrained."
        )


def _weight_files(variant: str | None, use_safetensors: bool | None) -> list[str]:
    """The files that may hold a checkpoint's weights, in the order in which they are looked for: those of a variant
    have its name before their ending."""
    found = [file for file in _WEIGHT_FILES if use_safetensors in (None, file.startswith("model."))]
    if variant is None:
        return found
    return ["{}.{}.{}".format(file.rpartition(".")[0], variant, file.rpartition(".")[2]) for file in found]


def _family(tensors: dict, name) -> str:
    """The model type of a checkpoint whose config.json names none, as those made before 2020: by its tensors."""
    for family in ("elasticbert", "distilbert", "roberta", "bert"):
        if any(key.startswith(f"{family}.") for key in tensors):
            return family
    raise ValueError(f"config.json of {name} has no model_type, and its tensors do not tell it: add it.")


def _read_weights(name, files: list[str], hub: dict) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, from the first of the files that is there; a `.bin` is read with
    `weights_only=True`."""
    for file in files:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            continue
        shards = [file]
        if file.endswith(".json"):
            shards = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
        tensors: dict[str, torch.Tensor] = {}
        for shard in shards:
            tensors |= load_state_dict(str(cached_file(name, shard, **hub)), map_location="cpu", weights_only=True)
        return tensors
    raise OSError(f"{name} holds no weights: expected one of {', '.join(files)}.")


def _convert(tensors: dict, model_type: str, model_class, config, depth: int | None) -> dict[str, torch.Tensor]:
    """Stock tensors under our names; one that the model has no place for keeps its own name, so that it is reported
    by it. depth: the layers of the checkpoint, which the model may have fewer of."""
    with torch.device("meta"):
        model = model_class(config)
    places = set(model.state_dict())
    rules = _KEYS[model_type] + _ENCODER_KEYS
    if model_type == "elasticbert" and config.num_output_layers == 1:
        rules = [(rf"^(?:classifiers|qa_outputs)\.{config.num_hidden_layers - 1}\.", "HEAD.")]
    elif model_type == "elasticbert":  # exits for a static model start as those for a stock one
        last = (depth or config.num_hidden_layers) - 1
        rules = [
            (r"^(?:classifier|qa_outputs)\.(?=weight|bias)", "HEAD."),
            (rf"^(?:elasticbert\.)?encoder\.pooler\.{last}\.", "POOLER."),
            (rf"^predictions\.transforms\.{last}\.", "TRANSFORM."),
        ]
    converted = {}
    for key, tensor in tensors.items():
        targets = [target for target in _targets(key, rules, model, config) if target in places]
        for target in targets or [key]:
            converted[target] = tensor if len(targets) < 2 else tensor.clone()
    return converted


def _targets(key: str, rules, model, config) -> list[str]:
    """Our names for a stock key: one, or one per exit."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
    for pattern, replacement in rules:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    exits = [layer - 1 for layer in config.exit_layers]
    head = f"{getattr(model, 'head_name', '')}.{exits[-1]}"
    last_head = getattr(model, "static_head_name", "") if config.num_output_layers == 1 else head
    where = {
        "POOLER": [f"elasticbert.encoder.pooler.{index}" for index in exits],
        "TRANSFORM": [f"predictions.transforms.{index}" for index in exits],
        "HEAD": [last_head],
    }
    kind, _, rest = name.partition(".")
    names = [f"{place}.{rest}" for place in where[kind]] if kind in where else [name]
    is_base = not hasattr(model, model.base_model_prefix)
    return [name.removeprefix(f"{model.base_model_prefix}.") for name in names] if is_base else names
