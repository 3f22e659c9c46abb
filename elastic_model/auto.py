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
