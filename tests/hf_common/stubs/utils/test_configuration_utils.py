"""Stands in for a file of transformers' tests that the source distribution leaves out."""

# fields of every configuration, with values that are not the defaults: `ConfigTester` checks that they are taken over
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["ElasticBertModel"],
    "id2label": {0: "early", 1: "late"},
    "label2id": {"early": 0, "late": 1},
    "problem_type": "regression",
}
