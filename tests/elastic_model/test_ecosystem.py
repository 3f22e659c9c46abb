"""The models under the tools that people use them with: pipelines, compiling, precision, devices, attention."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from elastic_model import (
    ElasticBertForMaskedLM,
    ElasticBertForMultipleChoice,
    ElasticBertForPreTraining,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
    ElasticBertModel,
)

MODELS = [
    ElasticBertModel,
    ElasticBertForPreTraining,
    ElasticBertForMaskedLM,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
    ElasticBertForQuestionAnswering,
    ElasticBertForMultipleChoice,
]
POLICIES = [
    {"name": "entropy", "threshold": 0.9},
    {"name": "confidence", "threshold": 0.4},
    {"name": "margin", "threshold": 0.1},
    {"name": "patience", "patience": 1},
    {"name": "voting", "votes": 2},
]
TEXTS = [
    "The revenue has met the expenses of the Government.",
    "Tonight the state of our Union is strong.",
    "A treaty of commerce was signed in the spring, and it is laid before the Senate.",
    "The army has been kept at the strength that the law allows.",
]


def batch_of(rows=3, tokens=9, model_class=None):
    """Random ids, rows of different lengths; (rows, choices, tokens) for multiple choice."""
    generator = torch.Generator().manual_seed(rows + tokens)
    ids = torch.randint(5, 200, (rows, tokens), generator=generator)
    lengths = torch.randint(3, tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    batch = {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()}
    if model_class is ElasticBertForMultipleChoice:
        batch = {name: values[:, None].expand(-1, 2, -1).contiguous() for name, values in batch.items()}
    return batch


def fit(model, batch, steps=60, learning_rate=3e-3):
    """Train on one batch; the last loss."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def test_pipeline_text_classification(tiny_config, tiny_tokenizer, tmp_path):
    """Trained on four texts, saved with a policy: one batch, every answer right, rows leave at different layers."""
    model = ElasticBertForSequenceClassification(tiny_config)
    labels = torch.tensor([0, 1, 2, 0])
    fit(model, tiny_tokenizer(TEXTS, padding=True, return_tensors="pt") | {"labels": labels})
    model.config.exit_policy = {"name": "confidence", "threshold": 0.9}
    folder = saved(model, tiny_tokenizer, tmp_path)
    classify = pipeline("text-classification", folder, device="cpu")
    assert classify.model.config.exit_policy == model.config.exit_policy
    for batch_size in (1, 4):
        answers = classify(TEXTS, batch_size=batch_size)
        assert [answer["label"] for answer in answers] == ["early", "middle", "late", "early"]
        assert min(answer["score"] for answer in answers) > 0.9


def test_pipeline_token_classification(tiny_config, tiny_tokenizer, tmp_path):
    """Trained to find capital letters' words; grouped back to words with the tokenizer's offsets."""
    tiny_config.id2label, tiny_config.label2id = {0: "O", 1: "NAME"}, {"O": 0, "NAME": 1}
    model = ElasticBertForTokenClassification(tiny_config)
    batch = tiny_tokenizer(TEXTS, padding=True, return_tensors="pt", return_offsets_mapping=True)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (text, offsets) in enumerate(zip(TEXTS, batch.pop("offset_mapping").tolist(), strict=True)):
        names = [text.find(name) for name in ("Government", "Union", "Senate") if name in text]
        for token, (left, right) in enumerate(offsets):
            if right > left:
                labels[row, token] = any(start <= left < start + 10 and text[left].isalpha() for start in names)
    assert fit(model, batch | {"labels": labels}, steps=120) < 0.2
    tag = pipeline("token-classification", saved(model, tiny_tokenizer, tmp_path), aggregation_strategy="simple")
    found = [TEXTS[0][entity["start"] : entity["end"]] for entity in tag(TEXTS[0]) if entity["entity_group"] == "NAME"]
    assert found == ["Government"]


def test_pipeline_fill_mask(tiny_config, tiny_tokenizer, tmp_path):
    """Trained on four texts with every word masked in turn, it fills in what stood there."""
    model = ElasticBertForMaskedLM(tiny_config)
    ids = tiny_tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    words = torch.arange(1, ids.shape[1] - 1)
    labels = torch.full((len(words), ids.shape[1]), -100)
    labels[torch.arange(len(words)), words] = ids[0, words]
    masked = ids.repeat(len(words), 1)
    masked[torch.arange(len(words)), words] = tiny_tokenizer.mask_token_id
    fit(model, {"input_ids": masked, "labels": labels}, steps=80)
    fill = pipeline("fill-mask", saved(model, tiny_tokenizer, tmp_path))
    answers = [fill(tiny_tokenizer.decode(row[1:-1]))[0]["token"] for row in masked]
    assert answers == ids[0, words].tolist()


def test_pipeline_feature_extraction(tiny_config, tiny_tokenizer, tmp_path):
    model = ElasticBertModel(tiny_config).eval()
    extract = pipeline("feature-extraction", saved(model, tiny_tokenizer, tmp_path), return_tensors=True)
    with torch.no_grad():
        expected = model(**tiny_tokenizer(TEXTS[2], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(extract(TEXTS[2]), expected)


OLD_COMPILER = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7),
    reason="torch.compile of torch 2.6 runs loops over generators wrongly, and the models walk their exits in one",
)
QUICK = ElasticBertForSequenceClassification  # compiling takes seconds: the other classes are for the slow tests


@OLD_COMPILER
@pytest.mark.parametrize(
    "model_class", [QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != QUICK)]
)
def test_compile_finds_one_graph(model_class, tiny_config):
    """No graph break without a policy, for the padded batch and for another shape; eager's numbers."""
    tiny_config.num_hidden_layers = 2
    model = model_class(tiny_config).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((3, 9), (5, 14)):
            batch = batch_of(*shape, model_class)
            torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0])


@OLD_COMPILER
@pytest.mark.slow
def test_compile_trains_with_the_default_backend(tiny_config):
    model = ElasticBertForSequenceClassification(tiny_config).train()
    compiled = torch.compile(model, fullgraph=True)
    batch = batch_of() | {"labels": torch.tensor([0, 1, 2])}
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_class", [ElasticBertForMaskedLM, ElasticBertForPreTraining])
def test_resized_embeddings_keep_old_words_and_learn_new_ones(model_class, tiny_config, tmp_path):
    model = model_class(tiny_config).eval()
    batch = batch_of()
    name = "logits" if model_class is ElasticBertForMaskedLM else "prediction_logits"
    with torch.no_grad():
        before = model(**batch)[name]
        model.resize_token_embeddings(208)
        torch.testing.assert_close(model(**batch)[name][..., :200], before)
    embeddings = model.get_input_embeddings().weight
    assert embeddings is model.get_output_embeddings().weight and embeddings.shape == (208, 32)
    new = {"input_ids": torch.tensor([[7, 205, 8, 4]]), "labels": torch.tensor([[-100, -100, -100, 206]])}
    assert fit(model, new, steps=90) < 0.5  # new words are read and predicted
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    with torch.no_grad():
        assert loaded.config.vocab_size == 208
        assert torch.equal(loaded(input_ids=new["input_ids"])[name], model(input_ids=new["input_ids"])[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_answer_like_float32(dtype, tiny_config, tmp_path):
    """After training to clear answers: the same labels, close probabilities, finite policies that mostly agree."""
    model = ElasticBertForSequenceClassification(tiny_config)
    batch = batch_of(24)
    labels = torch.arange(24) % 3
    fit(model, batch | {"labels": labels}, steps=80)
    model.save_pretrained(tmp_path)
    half = ElasticBertForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    with torch.no_grad():
        full, halved = model(**batch), half(**batch)
        assert halved.logits.dtype == dtype
        torch.testing.assert_close(halved.logits.float().softmax(-1), full.logits.softmax(-1), atol=0.05, rtol=0)
        for policy in POLICIES:
            wanted, answered = model(**batch, exit_policy=policy), half(**batch, exit_policy=policy)
            assert answered.logits.isfinite().all()
            assert (answered.logits.argmax(-1) == wanted.logits.argmax(-1)).float().mean() >= 0.9
            assert (answered.exit_layers == wanted.exit_layers).float().mean() >= 0.75
        short = half(**batch, length_config=[0.9, 0.8, 0.6, 0.5])
        assert short.logits.isfinite().all() and short.logits.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["name"])
def test_policies_are_finite_for_the_largest_half_precision_logits(dtype, policy, tiny_config):
    model = ElasticBertForSequenceClassification(tiny_config).eval().to(dtype)
    with torch.no_grad():
        for layer in tiny_config.exit_layers:
            model.classifiers.at(layer).weight.zero_()
            model.classifiers.at(layer).bias.copy_(torch.tensor([-6e4, 6e4, 0.0]))
        output = model(**batch_of(), exit_policy=policy)
    assert output.logits.isfinite().all() and set(output.logits.argmax(-1).tolist()) == {1}
    assert set(output.exit_layers.tolist()) == {2 if policy["name"] in ("patience", "voting") else 1}


@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_device_map(device_map, tiny_model, tiny_config, tmp_path):
    """Weights placed by accelerate, also partly on disk; exits and dropped tokens cross the seams."""
    tiny_model.save_pretrained(tmp_path / "model")
    if device_map == "disk":
        layers = {f"elasticbert.encoder.layer.{index}": "cpu" if index < 2 else "disk" for index in range(4)}
        device_map = layers | {
            "elasticbert.embeddings": "cpu",
            "elasticbert.encoder.pooler": "disk",
            "classifiers": "cpu",
        }
        device_map |= {"dropout": "cpu"}
    placed = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    batch = batch_of()
    arguments = {"exit_policy": {"name": "confidence", "threshold": 0.36}, "length_config": [1.0, 0.8, 0.6, 0.6]}
    with torch.no_grad():
        for options in ({}, arguments):
            answers, expected = placed(**batch, **options), tiny_model(**batch, **options)
            torch.testing.assert_close(answers.logits.cpu(), expected.logits)
            assert answers.exit_layers.tolist() == expected.exit_layers.tolist()


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("lengths", [None, [0.9, 0.8, 0.5, 0.5]])
def test_eager_and_sdpa_attention_agree(model_class, lengths, tiny_config):
    eager = model_class._from_config(copy.deepcopy(tiny_config), attn_implementation="eager").eval()
    sdpa = model_class._from_config(copy.deepcopy(tiny_config), attn_implementation="sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    batch = batch_of(4, 12, model_class)
    with torch.no_grad():
        one, other = (model(**batch, length_config=lengths)[0] for model in (eager, sdpa))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attention_goes_through_the_interface(tiny_config):
    """An implementation registered by a user is asked in every layer that needs no significance scores, with this
    library's arguments; that is how flash attention gets in, which needs a GPU."""
    calls = []

    def recorded(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        calls.append((query.shape, scaling, dropout, module.is_causal))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    AttentionInterface.register("recorded", recorded)
    AttentionMaskInterface.register("recorded", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = ElasticBertForSequenceClassification._from_config(tiny_config, attn_implementation="recorded").eval()
    batch = batch_of()
    with torch.no_grad():
        answers = model(**batch).logits
        assert calls == [((3, 4, 9, 8), 8**-0.5, 0.0, False)] * 4
        calls.clear()
        model(**batch, length_config=[1.0, 0.5, 0.5, 0.2])
        assert [shape for shape, *_ in calls] == [
            (3, 4, 9, 8),
            (3, 4, 5, 8),
        ]  # layers 2 and 4 drop: scores written out
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(**batch).logits, answers)
    assert model._supports_flash_attn and model._supports_attention_backend


def test_mismatched_heads_are_made_anew_on_request(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ElasticBertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    seven, report = ElasticBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in report["mismatched_keys"]} == {
        f"classifiers.{index}.{kind}" for index in range(4) for kind in ("weight", "bias")
    }
    with torch.no_grad():
        assert seven(**batch_of()).logits.shape == (3, 7)
    assert all(0 < seven.classifiers.at(layer).weight.std() < 0.05 for layer in (1, 2, 3, 4))  # as new heads start
    assert torch.equal(
        seven.elasticbert.encoder.layer[3].output.dense.weight,
        tiny_model.elasticbert.encoder.layer[3].output.dense.weight,
    )


def test_weights_are_saved_as_safetensors_and_nothing_is_unpickled(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".py", ".md"}
    assert (tmp_path / "model.safetensors").is_file()

    class Payload:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (tmp_path / "model.safetensors").unlink()
    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        pickle.dump({"classifiers.0.weight": Payload()}, file)
    for settings in ({}, {"num_output_layers": 1}):  # transformers' reader, and ours
        with pytest.raises((pickle.UnpicklingError, RuntimeError, OSError, ValueError)):
            ElasticBertForSequenceClassification.from_pretrained(tmp_path, **settings)
    assert not (tmp_path / "ran").exists()
