"""One BERT checkpoint for every budget: exits after its layers, tokens that fall away, heads that can be pruned.

Names load when they are first touched, so that a bare import is instant and `ElasticSession` needs no torch.
"""

import importlib

_MODULES = {
    "configuration_elasticbert": ["ElasticBertConfig"],
    "modeling_elasticbert": [
        "ElasticBertModel",
        "ElasticBertForPreTraining",
        "ElasticBertForMaskedLM",
        "ElasticBertForSequenceClassification",
        "ElasticBertForTokenClassification",
        "ElasticBertForQuestionAnswering",
        "ElasticBertForMultipleChoice",
    ],
    "operating_points": ["OperatingPoint", "OperatingPoints"],
    "session": ["ElasticSession"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_REGISTERED = {"configuration_elasticbert", "modeling_elasticbert"}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] in _REGISTERED:
        importlib.import_module(".auto", __name__)  # the Auto classes know ours from the first touch on
    try:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        hint = "No module named 'onnxruntime': a session needs it, pip install \"elastic-model[serve]\""
        raise ModuleNotFoundError(hint, name=error.name) from None
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
