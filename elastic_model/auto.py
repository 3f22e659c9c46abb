"""Importing this module registers the classes with transformers' Auto classes."""

import transformers

from . import modeling_elasticbert as modeling
from .configuration_elasticbert import ElasticBertConfig
from .hub import push_model
from .pretrained import AUTO_MAP

transformers.AutoConfig.register(ElasticBertConfig.model_type, ElasticBertConfig)
for name, where in AUTO_MAP.items():
    if name != "AutoConfig":
        getattr(transformers, name).register(ElasticBertConfig, getattr(modeling, where.split(".")[1]))
# the card and what it is made from do not travel with checkpoints: code from the hub pushes as transformers does
modeling.ElasticBertPreTrainedModel.push_to_hub = push_model  # type: ignore[method-assign, assignment]
