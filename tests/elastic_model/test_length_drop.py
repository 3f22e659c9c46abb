"""Drop-and-restore: the invariances that a length configuration must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic_model
from elastic_model import ElasticBertConfig
from elastic_model.checks import check_length_config
from elastic_model.cost import exit_flops
from elastic_model.length_drop import most_significant, restore, significance, tokens_to_cover, tokens_to_keep

SHARES = [0.9, 0.6, 0.6, 0.3]
COUNTS = [9, 7, 4, 4]
MASS = {"mass": [0.9, 0.8, 0.8, 0.7]}
HEADS = [
    "ElasticBertModel",
    "ElasticBertForSequenceClassification",
    "ElasticBertForTokenClassification",
    "ElasticBertForQuestionAnswering",
]


def model_of(head, **overrides):
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
    config = ElasticBertConfig(**sizes, max_position_embeddings=40, initializer_range=0.4, num_labels=3, **overrides)
    return getattr(elastic_model, head)(config).eval()


def rows_of(lengths, padded=None, seed=0):
    """Rows of the given numbers of real tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    padded = padded or max(lengths)
    input_ids, mask = (
        torch.zeros(len(lengths), padded, dtype=torch.long),
        torch.zeros(len(lengths), padded, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(1, 60, (length,), generator=generator)
        mask[row, :length] = 1
    return input_ids, mask


def first_output(output):
    return output[0] if "start_logits" not in output else torch.stack([output.start_logits, output.end_logits], dim=-1)


@pytest.mark.parametrize("lengths", [SHARES, COUNTS, MASS], ids=["shares", "counts", "mass"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_padding_and_batch_mates_do_not_change_a_row(head, lengths):
    model = model_of(head)
    sizes = [17, 3, 9, 1, 12, 2]
    input_ids, mask = rows_of(sizes, padded=25)
    together = first_output(model(input_ids, mask, length_config=lengths))
    for row, size in enumerate(sizes):
        alone = first_output(model(input_ids[row : row + 1, :size], length_config=lengths))[0]
        batched = together[row] if alone.dim() == 1 else together[row, :size]
        torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ones", [[1.0] * 4, 1.0, None, [40] * 4, {"mass": [1.0] * 4}], ids=str)
@torch.no_grad()
def test_keeping_everything_is_the_identity(ones):
    model = model_of("ElasticBertModel")
    input_ids, mask = rows_of([17, 3, 9])
    full = model(input_ids, mask).last_hidden_state
    assert torch.equal(model(input_ids, mask, length_config=ones).last_hidden_state[mask.bool()], full[mask.bool()])


@torch.no_grad()
def test_dropped_tokens_keep_exactly_the_state_they_had():
    model = model_of("ElasticBertModel")
    input_ids, mask = rows_of([20, 14])
    full = model(input_ids, mask, output_hidden_states=True)
    lengths = [1.0, 0.5, 0.5, 0.5]
    restored = model(input_ids, mask, length_config=lengths).last_hidden_state
    before = full.hidden_states[1]  # the output of layer 1: tokens drop in layer 2
    for row, real in enumerate((20, 14)):
        same = [torch.equal(restored[row, token], before[row, token]) for token in range(real)]
        assert sum(same) == real - max(2, -(-real // 2))
        assert not same[0]  # [CLS] stays


@torch.no_grad()
def test_fewer_tokens_are_fewer_rows_in_every_product():
    model = model_of("ElasticBertModel")
    shapes = []
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    input_ids, mask = rows_of([20, 10])
    model(input_ids, mask, length_config=SHARES)
    assert shapes == [(2, 18, 32), (2, 12, 32), (2, 12, 32), (2, 6, 32)]


@torch.no_grad()
def test_probabilities_are_written_out_only_where_tokens_drop():
    model = model_of("ElasticBertModel")
    written = []
    for number, layer in enumerate(model.encoder.layer, start=1):
        hook = lambda module, args, output, number=number: written.append(number) if output[2] is not None else None  # noqa: E731
        layer.attention.self.register_forward_hook(hook)
    model(rows_of([20])[0], length_config=[1.0, 0.5, 0.5, 0.2])
    assert model.config._attn_implementation == "sdpa" and written == [2, 4]


@given(st.floats(2**-7, 1.0, width=32), st.integers(1, 512))
@settings(max_examples=300, deadline=None)
def test_a_share_keeps_what_float32_says(share, tokens):
    kept = int(tokens_to_keep(share, torch.tensor([tokens])))
    expected = int(np.ceil(np.float32(share) * np.float32(tokens)))
    assert kept == min(tokens, max(2, expected))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_padding_is_never_kept_before_a_real_token(data):
    tokens = data.draw(st.integers(2, 12))
    real = torch.tensor([data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))])
    if not real.any():
        real[0, 0] = True
    counts = torch.tensor([data.draw(st.integers(1, int(real.sum())))])
    scores = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0))
    kept, mask = most_significant(scores, real, counts, keep_cls=True)
    chosen = kept[0][mask[0]]
    assert len(chosen) == counts[0] and real[0][chosen].all() and (chosen.diff() > 0).all()
    assert chosen[0] == real[0].long().argmax()


def test_restore_touches_exactly_the_survivors():
    memory, states = torch.zeros(1, 5, 2), torch.ones(1, 3, 2)
    out = restore(memory, states, torch.tensor([[0, 3, 4]]), torch.tensor([[True, True, False]]))
    assert out[0, :, 0].tolist() == [1, 0, 0, 1, 0]


def test_gradients_reach_every_token_through_the_restore():
    model = model_of("ElasticBertForTokenClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    embeds = torch.randn(2, 12, 32, requires_grad=True)
    labels = torch.zeros(2, 12, dtype=torch.long)
    model.train()(inputs_embeds=embeds, labels=labels, length_config=SHARES).loss.backward()
    assert (embeds.grad.abs().sum(-1) > 0).all() and embeds.grad.isfinite().all()


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([0.5, 0.6, 0.5, 0.5], "must not rise"),
        ([0.5, 0.5], "one entry per layer, 4"),
        ([1.2, 1.0, 1.0, 1.0], r"in \(0, 1\]"),
        ([0.5, 0.5, 0.5, 0.0], r"in \(0, 1\]"),
        ([0.5, float("nan"), 0.5, 0.5], r"in \(0, 1\]"),
        ([9, 5, 5, 1], "at least 2"),
        ([9, 0.5, 0.5, 0.5], "all floats .* or all ints"),
        ([True, True, True, True], "all floats .* or all ints"),
        ("0.5", "must be a list"),
        (0.5, "must be a list"),
    ],
)
def test_impossible_length_configurations_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        model_of("ElasticBertModel")(rows_of([5])[0], length_config=lengths)
    with pytest.raises(Exception, match=message if isinstance(lengths, (list, float)) else "length_config"):
        model_of("ElasticBertModel", length_config=lengths)


def test_a_length_configuration_survives_saving(tmp_path):
    model_of("ElasticBertModel", length_config=tuple(SHARES)).save_pretrained(tmp_path)
    again = elastic_model.ElasticBertModel.from_pretrained(tmp_path)
    assert again.config.length_config == SHARES


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    mass=st.floats(0.01, 1.0),
    keep_cls=st.booleans(),
    seed=st.integers(0, 999),
)
def test_rows_keep_the_fewest_tokens_that_cover_the_mass(sizes, mass, keep_cls, seed):
    scores = torch.rand(len(sizes), max(sizes) + 3, generator=torch.Generator().manual_seed(seed)) ** 4
    real = torch.arange(scores.shape[1]) < torch.tensor(sizes)[:, None]
    counts = tokens_to_cover(mass, scores, real, keep_cls)
    kept, filled = most_significant(scores, real, counts, keep_cls)
    for row, size in enumerate(sizes):
        own, chosen = scores[row, :size], kept[row][filled[row]]
        assert len(chosen) == counts[row] <= size and (len(chosen) >= 2 or size == 1) and chosen.max() < size
        assert own[chosen].sum() >= mass * own.sum() - 1e-5 and (0 in chosen or not keep_cls)
        if len(chosen) > 2:  # without the least of them that may fall, less than the mass is covered
            least = own[chosen[1:] if keep_cls else chosen].min()
            assert own[chosen].sum() - least < mass * own.sum() + 1e-5
        alone = tokens_to_cover(mass, own[None], real[row : row + 1, :size], keep_cls)
        assert alone == counts[row]  # whatever the padding and the batch
        assert tokens_to_cover(min(1.0, mass + 0.1), own[None], real[row : row + 1, :size], keep_cls) >= alone


@torch.no_grad()
def test_rows_that_choose_themselves_keep_different_shares_and_never_more_than_before(tmp_path):
    model = model_of("ElasticBertForSequenceClassification", exit_policy=None)
    input_ids, mask = rows_of([20] * 6)
    flow, kept = None, []
    for exit in model.walk((input_ids, mask, None, None, None, MASS, None), None, {}):
        flow = exit.flow
        kept.append(flow.real_mask().sum(1))
        assert (flow.positions[:, 0] == 0).all() if flow.positions is not None else True
    kept = torch.stack(kept)
    assert (kept.diff(dim=0) <= 0).all() and len(set(kept[0].tolist())) > 1
    costs = exit_flops(model.config, mask.sum(1), kept=kept)
    assert (costs[-1] < exit_flops(model.config, mask.sum(1))[-1]).all()
    with pytest.raises(ValueError, match="depends on each row's scores"):
        exit_flops(model.config, mask.sum(1), MASS)
    expected = model(input_ids, mask, length_config=MASS).logits
    model.config.length_config = MASS
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(saved(input_ids, mask).logits, expected)
    assert ElasticBertConfig.from_pretrained(tmp_path, num_hidden_layers=2).length_config == {"mass": [0.9, 0.8]}


@pytest.mark.parametrize(
    "given",
    [{}, {"mass": 0.5}, {"mass": [0.5] * 3}, {"mass": [0.5, 0.5, 0.5, 0.0]}, {"mass": "0.50"}, {"share": [0.5] * 4}],
    ids=str,
)
def test_a_mass_that_cannot_be_is_named(given):
    with pytest.raises(ValueError, match="4 shares in \\(0, 1\\]"):
        check_length_config(given, 4)


def test_significance_is_that_of_attention_without_dropout():
    """What is dropped must not depend on dropout's draw; what is passed on does."""
    lengths = [[0.5] * 4, [0.9, 0.8, 0.7, 0.6]]
    model, kept = model_of("ElasticBertModel", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.9), []
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: kept.append(output[1]))
    states = [model.train(mode)(rows_of([20])[0], length_config=lengths[0])[0] for mode in (True, False)]
    assert torch.equal(*kept) and not torch.allclose(*states)


@torch.no_grad()
def test_rows_that_choose_go_on_choosing():
    """In each layer anew, of what is left."""
    model, kept = model_of("ElasticBertForSequenceClassification"), []
    input_ids, mask = rows_of([20] * 6)
    for here in model.walk((input_ids, mask, None, None, None, {"mass": [0.9, 0.8, 0.8, 0.7]}, None), None, {}):
        kept.append(here.flow.real_mask().sum(1))
    assert (kept[2] < kept[1]).any()


def test_the_first_real_token_is_kept_wherever_the_padding_is():
    scores, real = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.ones(1, 4, dtype=torch.bool)
    padded = [torch.nn.functional.pad(one, (2, 0)) for one in (scores, real)]
    assert tokens_to_cover(0.75, *padded, True) == tokens_to_cover(0.75, scores, real, True) == 3


def test_of_equals_the_first_stay():
    kept, _ = most_significant(torch.ones(1, 6), torch.ones(1, 6).bool(), torch.tensor([3]), keep_cls=False)
    assert kept.tolist() == [[0, 1, 2]]


def test_a_mass_that_is_met_exactly_is_met():
    equal, real = torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool)
    assert [tokens_to_cover(mass, equal, real, True).item() for mass in (0.5, 0.625, 1.0)] == [4, 5, 8]


def test_significance_is_summed_in_float32():
    """Summed in bfloat16 over heads, 256 shares of 1/256 and their neighbours were one."""
    probabilities = torch.full((1, 12, 4, 4), 1 / 256 + 1 / 32768, dtype=torch.bfloat16)
    scores = significance(probabilities, torch.ones(1, 4, dtype=torch.bool))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, probabilities.float().sum((1, 2)), atol=1e-7, rtol=0)
