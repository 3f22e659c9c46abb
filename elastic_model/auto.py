"""Importing this module registers the classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import modeling_elasticbert as modeling
from .configuration_elasticbert import ElasticBertConfig
from .hub import push_model

AUTO_CLASSES = {
    AutoModel: modeling.ElasticBertModel,
    AutoModelForPreTraining: modeling.ElasticBertForPreTraining,
    AutoModelForMaskedLM: modeling.ElasticBertForMaskedLM,
    AutoModelForSequenceClassification: modeling.ElasticBertForSequenceClassification,
    AutoModelForTokenClassification: modeling.ElasticBertForTokenClassification,
    AutoModelForQuestionAnswering: modeling.ElasticBertForQuestionAnswering,
    AutoModelForMultipleChoice: modeling.ElasticBertForMultipleChoice,
}

AutoConfig.register(ElasticBertConfig.model_type, ElasticBertConfig)
for auto_class, model_class in AUTO_CLASSES.items():
    auto_class.register(ElasticBertConfig, model_class)
# the card and what it is made from do not travel with checkpoints: code from the hub pushes as transformers does
modeling.ElasticBertPreTrainedModel.push_to_hub = push_model  # type: ignore[method-assign, assignment]
