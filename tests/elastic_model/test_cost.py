"""The closed-form counts agree with PyTorch's own counter, to the last multiply-add, and with the parameters that
exist."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import elastic_model
from elastic_model import ElasticBertConfig
from elastic_model.cost import exit_flops, flops, mean_flops, modules, parameters

TOKENS = 13
HEADS = {
    "none": elastic_model.ElasticBertModel,
    "sequence": elastic_model.ElasticBertForSequenceClassification,
    "token": elastic_model.ElasticBertForTokenClassification,
    "question_answering": elastic_model.ElasticBertForQuestionAnswering,
    "masked_lm": elastic_model.ElasticBertForMaskedLM,
    "pretraining": elastic_model.ElasticBertForPreTraining,
}


def config_of(**overrides):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_attention_heads_per_layer": [4, 3, 2, 1],
        "intermediate_size_per_layer": [40, 30, 20, 10],
        "max_position_embeddings": 32,
        "num_labels": 3,
        "attn_implementation": "eager",  # the counter does not see CPU SDPA
    }
    return ElasticBertConfig(**{**sizes, **overrides})


def counted(model, rows=1, **arguments):
    input_ids = torch.arange(rows * TOKENS).view(rows, TOKENS) % 50
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(input_ids=input_ids, **arguments)
    return counter.get_total_flops()


SUB_NETWORKS = [
    {},
    {"length_config": [0.8, 0.8, 0.5, 0.3]},
    {"length_config": [9, 7, 7, 2]},
    {"layer_config": [1, 3, 4]},
    {"layer_config": [2, 3], "length_config": [1.0, 0.7, 0.4, 0.4]},
]


@pytest.mark.parametrize("sub_network", SUB_NETWORKS, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_flops_are_the_counters(head, sub_network):
    config = config_of(learned_exit_head=head in ("sequence", "token"))
    torch.manual_seed(0)
    expected = counted(HEADS[head](config), **sub_network)
    assert flops(config, TOKENS, head=head, **sub_network) == expected


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_a_row_that_leaves_costs_what_it_ran_through(layer):
    config = config_of(exit_layers=[1, 2, 4])
    model = HEADS["sequence"](config)
    policy = {"name": "constant", "layer": layer}
    assert flops(config, TOKENS, exit_layer=layer) == counted(model, exit_policy=policy)


def test_a_measured_distribution_of_exits():
    config = config_of()
    one, four = flops(config, 5, exit_layer=1), flops(config, 9)
    assert mean_flops(config, [5, 9, 9], [1, 4, 4]) == pytest.approx((one + 2 * four) / 3)
    assert mean_flops(config, [9, 9]) == four
    fewer = [flops(config, count, exit_layer=3, layer_config=[1, 3], asked=[3]) for count in (5, 9)]
    assert mean_flops(config, [5, 9], [3, 3], layer_config=[1, 3], asked=[3]) == sum(fewer) / 2
    with pytest.raises(ValueError, match="tokens must be a list of at least one count"):
        mean_flops(config, [], layer_config=[1, 2])


def test_modules_name_the_path():
    names = [module.name for module in modules(config_of(), TOKENS, layer_config=[1, 3], exit_layer=3, asked=[3])]
    assert names == ["emb", "attention_1", "ffn_1", "attention_3", "ffn_3", "exit_3"]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_parameters_are_those_of_the_model(head, learned):
    config = config_of(learned_exit_head=learned and head in ("sequence", "token", "question_answering"))
    assert parameters(config, head) == sum(parameter.numel() for parameter in HEADS[head](config).parameters())


@pytest.mark.parametrize("head", ["masked_lm", "pretraining"])
def test_a_decoder_of_its_own_counts_whole(head):
    config = config_of(tie_word_embeddings=False)
    assert parameters(config, head) == sum(parameter.numel() for parameter in HEADS[head](config).parameters())


def test_parameters_of_a_shallower_model():
    shallow = HEADS["sequence"](config_of(num_hidden_layers=2))
    assert parameters(config_of(), exit_layer=2) == sum(parameter.numel() for parameter in shallow.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"tokens": 5, "head": "speech"}, "head must be one of"),
        ({"tokens": 5, "exit_layer": 9}, "exit_layer must be one of"),
        ({"tokens": 5, "asked": [9]}, r"asked must be some of the exit layers \[1, 2, 3, 4\], got \[9\]"),
        ({"tokens": 5, "exit_layer": 2, "layer_config": [1, 3]}, r"exit_layer 2: layer_config \[1, 3\] leaves that"),
    ],
)
def test_impossible_questions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        flops(config_of(), **arguments)
    if "head" in arguments:
        with pytest.raises(ValueError, match=message):
            exit_flops(config_of(), [5], head=arguments["head"])
    if message.startswith(("head", "exit_layer must")):
        with pytest.raises(ValueError, match=message.removesuffix(" one of")):
            parameters(config_of(), **{name: value for name, value in arguments.items() if name != "tokens"})


@pytest.mark.parametrize("head", ["sequence", "token", "question_answering", "none"])
@pytest.mark.parametrize("lengths", [None, [1.0, 0.7, 0.4, 0.1], [9, 7, 4, 2]])
def test_many_rows_at_once_cost_what_each_costs(lengths, head):
    config, tokens = config_of(exit_layers=[1, 3, 4]), [1, 2, 3, 10, 13, 29, 32]
    table = exit_flops(config, tokens, lengths, head)
    for place, layer in enumerate(config.exit_layers):
        each = [flops(config, count, length_config=lengths, exit_layer=layer, head=head) for count in tokens]
        assert table[place].tolist() == each
    with pytest.raises(ValueError, match="at least 1"):
        exit_flops(config, [3, 0])
