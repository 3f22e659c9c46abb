"""The models under the tools that people train them with: Trainer, PEFT, gradient checkpointing."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from elastic_model import (
    ElasticBertForMaskedLM,
    ElasticBertForMultipleChoice,
    ElasticBertForPreTraining,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
)

TOKENS = 12
MARKS = torch.tensor([11, 12, 13])  # the class of a row is which of these stands in it


def marked_rows(rows, generator):
    """Rows of random tokens of different lengths, each with one of MARKS: inputs and classes."""
    ids = torch.randint(20, 200, (rows, TOKENS), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    ids[torch.arange(rows), torch.randint(1, 5, (rows,), generator=generator)] = MARKS[labels]
    lengths = torch.randint(6, TOKENS + 1, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < lengths).long(), "labels": labels}


def as_dataset(batch):
    """A list of single examples, as Trainer takes them."""
    rows = len(next(iter(batch.values())))
    return [{name: values[row] for name, values in batch.items()} for row in range(rows)]


def arguments(folder, **settings):
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | settings))


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


def test_trainer_learns_saves_and_resumes(tiny_config, generator, tmp_path):
    model = ElasticBertForSequenceClassification(tiny_config)
    train, dev = (as_dataset(marked_rows(rows, generator)) for rows in (256, 64))

    def accuracy(prediction):
        assert prediction.predictions.shape == (
            64,
            3,
        )  # the answers alone: outputs per exit are left out of evaluation
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    settings = {"per_device_train_batch_size": 32, "max_steps": 60, "learning_rate": 3e-3, "seed": 1}
    saving = {"logging_strategy": "steps", "logging_steps": 10, "save_strategy": "steps", "save_steps": 30}
    common = {"train_dataset": train, "eval_dataset": dev, "compute_metrics": accuracy}
    trainer = Trainer(model=model, args=arguments(tmp_path, **settings, **saving), **common)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.9

    reloaded = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-60")
    again = Trainer(model=reloaded, args=arguments(tmp_path / "again"), **common).evaluate()
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)

    resumed = Trainer(
        model=ElasticBertForSequenceClassification(tiny_config),
        args=arguments(tmp_path, **settings, **saving),
        **common,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), msg=name)


def sequence_batch(generator):
    return marked_rows(8, generator)


def regression_batch(generator):
    batch = marked_rows(8, generator)
    return batch | {"labels": batch["labels"].float() / 2}


def multi_label_batch(generator):
    batch = marked_rows(8, generator)
    return batch | {"labels": torch.nn.functional.one_hot(batch["labels"], 3).float()}


def token_batch(generator):
    batch = marked_rows(8, generator)
    return batch | {"labels": (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)}


def masked_batch(generator):
    batch = marked_rows(8, generator)
    hidden = torch.rand(8, TOKENS, generator=generator) < torch.linspace(0.1, 0.9, 8)[:, None]  # uneven over the rows
    return batch | {"labels": batch["input_ids"].masked_fill(~hidden, -100)}


def even_pretraining_batch(generator):
    batch = masked_batch(generator)
    labels = batch["input_ids"].masked_fill(torch.arange(TOKENS) % 4 != 1, -100)  # as many in every micro-batch
    return batch | {"labels": labels, "sentence_order_label": torch.arange(8) % 2}


def choice_batch(generator):
    batch = marked_rows(16, generator)
    folded = {name: batch[name].view(8, 2, TOKENS) for name in ("input_ids", "attention_mask")}
    return folded | {"labels": batch["labels"][:8] % 2}


def span_batch(generator):
    batch = marked_rows(8, generator)
    starts = torch.arange(8) % 4
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {
        "start_positions": starts,
        "end_positions": starts + 2,
    }


HEADS = {
    "sequence": (ElasticBertForSequenceClassification, sequence_batch, {}),
    "regression": (ElasticBertForSequenceClassification, regression_batch, {"num_labels": 1}),
    "multi-label": (ElasticBertForSequenceClassification, multi_label_batch, {}),
    "learned": (ElasticBertForSequenceClassification, sequence_batch, {"learned_exit_head": True}),
    "token": (ElasticBertForTokenClassification, token_batch, {}),
    "masked": (ElasticBertForMaskedLM, masked_batch, {}),
    "pretraining": (ElasticBertForPreTraining, even_pretraining_batch, {}),
    "choice": (ElasticBertForMultipleChoice, choice_batch, {}),
    "span": (ElasticBertForQuestionAnswering, span_batch, {}),
}


@pytest.mark.parametrize("head", HEADS)
def test_accumulated_gradients_are_those_of_the_whole_batch(head, tiny_config, generator, tmp_path):
    """Trainer, one batch of 8 against 4 of 2: the micro-batches' counts of labels differ, the gradient must not."""
    model_class, make_batch, settings = HEADS[head]
    for name, value in settings.items():
        setattr(tiny_config, name, value)
    model = model_class(tiny_config)
    dataset = as_dataset(make_batch(generator))

    def gradients(size, steps):
        copied = copy.deepcopy(model)
        settings = {
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
        }
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = Trainer(copied, arguments(tmp_path, **settings, **batches), train_dataset=dataset)
        trainer.train()
        return {name: before - copied.get_parameter(name) for name, before in model.named_parameters()}

    whole, accumulated = gradients(8, 1), gradients(2, 4)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(
            accumulated[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("lengths", [None, [1.0, 0.7, 0.7, 0.4]])
def test_gradient_checkpointing_gives_the_same_gradients(lengths, tiny_config, generator):
    tiny_config.hidden_dropout_prob = 0.1  # recomputed with the same dropout
    model = ElasticBertForSequenceClassification(tiny_config).train()
    batch = marked_rows(8, generator)

    def gradients():
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch, length_config=lengths).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    passes = []
    handle = model.elasticbert.encoder.layer[0].attention.register_forward_hook(lambda *_: passes.append(1))
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    handle.remove()
    assert len(passes) == 2  # forward, and again on the way back
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def train(model, batches, learning_rate):
    """The loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_replica_of_data_parallel_has_a_loss(tiny_config):
    """Trainer's way with several GPUs in one process: replicas have no parameters, as `parameters()` counts them."""

    def replica(module):
        copy = module._replicate_for_data_parallel()
        for name, inner in module._modules.items():
            copy._modules[name] = replica(inner)
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter.view_as(parameter))
        return copy

    model = ElasticBertForSequenceClassification(tiny_config).train()
    ids, labels = torch.randint(1, 200, (3, 7)), torch.tensor([0, 1, 2])
    assert not list(replica(model).parameters())
    torch.testing.assert_close(replica(model)(ids, labels=labels).loss, model(ids, labels=labels).loss)


def test_an_adapter_finds_its_base(tiny_config, tmp_path):
    peft = pytest.importorskip("peft")
    ElasticBertForSequenceClassification(tiny_config).save_pretrained(tmp_path / "base")
    base = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    found = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.randint(1, 200, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapted.eval()(ids).logits)

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=200, **small)).save_pretrained(tmp_path / "stock")
    ours = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "stock")
    assert ours.name_or_path == str(tmp_path / "stock")  # which an adapter names as its base
    peft.get_peft_model(ours, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "of stock")
    with pytest.raises(ValueError, match=f"is an adapter of {tmp_path}/stock .bert., no elastic checkpoint"):
        ElasticBertForSequenceClassification.from_pretrained(tmp_path / "of stock")


def test_lora_trains_merges_and_gives_the_same_numbers(tiny_config, generator, tmp_path):
    """A model that has learned its task learns the same task with the classes renamed."""
    peft = pytest.importorskip("peft")
    base = ElasticBertForSequenceClassification(tiny_config)
    train(base, (marked_rows(32, generator) for _ in range(60)), learning_rate=3e-3)
    before = copy.deepcopy(base.state_dict())
    whole = ["classifiers", "encoder.pooler"]  # the heads are trained in full, at every exit
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=whole, task_type="SEQ_CLS")
    model = peft.get_peft_model(base, lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert sum("classifiers" in name for name in trained) == 2 * len(tiny_config.exit_layers)

    def renamed(rows):
        batch = marked_rows(rows, generator)
        return batch | {"labels": (batch["labels"] + 1) % 3}

    losses = train(model, (renamed(32) for _ in range(60)), learning_rate=5e-3)
    assert losses[-1] < 0.3 * losses[0]

    batch = renamed(32)
    labels = batch.pop("labels")
    policy = {"name": "confidence", "threshold": 0.9}
    model.eval()
    with torch.no_grad():
        adapted = model(**batch, exit_policy=policy)
        assert (adapted.logits.argmax(-1) == labels).float().mean() > 0.8
        model.save_pretrained(tmp_path)
        fresh = ElasticBertForSequenceClassification(tiny_config)
        fresh.load_state_dict(before)
        reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        torch.testing.assert_close(reloaded(**batch, exit_policy=policy).logits, adapted.logits)
        merged = model.merge_and_unload()
        answers = merged(**batch, exit_policy=policy)
    assert type(merged) is ElasticBertForSequenceClassification
    torch.testing.assert_close(answers.logits, adapted.logits, atol=1e-5, rtol=1e-5)
    assert answers.exit_layers.tolist() == adapted.exit_layers.tolist()
    assert merged.state_dict().keys() == before.keys()
    for part, changed in (("key", False), ("query", True)):
        name = f"elasticbert.encoder.layer.0.attention.self.{part}.weight"
        assert torch.equal(merged.state_dict()[name], before[name]) is not changed
