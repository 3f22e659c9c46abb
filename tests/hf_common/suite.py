"""transformers' own common test-suite on all our model classes; `test_hf_common.py` runs it and knows what may skip.

Not named test_*: it needs a download (`upstream.py`), and it enters our classes in transformers' tables of class
names, which is how those tests tell a classifier from a tagger, so it has a process of its own.
"""

import sys
import unittest
from pathlib import Path

import torch
from transformers.models.auto import modeling_auto

from elastic_model import (
    ElasticBertConfig,
    ElasticBertForMaskedLM,
    ElasticBertForMultipleChoice,
    ElasticBertForPreTraining,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
    ElasticBertModel,
)

sys.path.insert(0, str(Path(__file__).parent))
import upstream  # noqa: E402

upstream.install()
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import (  # noqa: E402
    ModelTesterMixin,
    ids_tensor,
    random_attention_mask,
)

MAPPINGS = {
    "MODEL_MAPPING_NAMES": ElasticBertModel,
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": ElasticBertForPreTraining,
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ElasticBertForMaskedLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": ElasticBertForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": ElasticBertForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": ElasticBertForQuestionAnswering,
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": ElasticBertForMultipleChoice,
}
for mapping, model_class in MAPPINGS.items():
    getattr(modeling_auto, mapping)["elasticbert"] = model_class.__name__


class ElasticBertModelTester:
    """Makes the tiny configuration and inputs that transformers' tests ask for."""

    batch_size = 3
    seq_length = 7
    num_choices = 4
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    intermediate_size = 37
    type_vocab_size = 2
    type_sequence_label_size = 2
    num_labels = 3
    num_output_layers = None

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return ElasticBertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=64,
            type_vocab_size=self.type_vocab_size,
            num_output_layers=self.num_output_layers,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
            "token_type_ids": ids_tensor(shape, self.type_vocab_size),
        }
        return self.get_config(), inputs


class ElasticBertTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(MAPPINGS.values())
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ElasticBertModelTester(self)
        self.config_tester = ConfigTester(self, config_class=ElasticBertConfig, hidden_size=32, num_attention_heads=4)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is ElasticBertForPreTraining:
            shape = (self.model_tester.batch_size, self.model_tester.seq_length)
            inputs["labels"] = torch.zeros(shape, dtype=torch.long)
            inputs["sentence_order_label"] = torch.zeros(shape[0], dtype=torch.long)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_load_ignoring_mismatched_shapes(self):
        """Upstream looks for one layer named `classifier`: so is the head in static use. For heads at every exit see
        tests/elastic_model/test_ecosystem.py."""
        self.model_tester.num_output_layers = 1
        super().test_can_load_ignoring_mismatched_shapes()

    def test_torch_export(self):
        """Every model as one graph for any number of rows and tokens, with the model's own numbers."""
        rows, tokens = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("tokens", min=2, max=64)
        config, small = self.model_tester.prepare_config_and_inputs_for_common()
        large = {"input_ids": ids_tensor((5, 11), config.vocab_size), "attention_mask": random_attention_mask((5, 11))}
        small = {name: small[name] for name in large}
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class(config).eval()
                shape = (
                    {0: rows, 1: tokens} if model_class is not ElasticBertForMultipleChoice else {0: rows, 2: tokens}
                )
                inputs = self._prepare_for_class(small, model_class)
                program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape))
                for batch in (small, large):
                    batch = self._prepare_for_class(batch, model_class)
                    with torch.no_grad():
                        expected, answered = model(**batch)[0], program.module()(**batch)[0]
                    torch.testing.assert_close(answered, expected)
