"""What our recipes are compared with: transformers' Trainer on the same rows."""

import re

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.stock import train


def test_the_quality_that_chooses_the_checkpoint_is_the_checkpoints(options, small_task, capsys):
    """Trainer groups the rows of dev by length too: answers must meet their own labels."""
    run = options(epochs=4)
    train(run)
    said = float(re.search(r"dev: ([0-9.]+)", capsys.readouterr().out).group(1))
    model = AutoModelForSequenceClassification.from_pretrained(run.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.output)
    rows = [line.split("\t") for line in (small_task / "dev.tsv").read_text().splitlines()[1:]]
    batch = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True, truncation=True, max_length=32)
    with torch.no_grad():
        answers = model(**batch).logits.argmax(-1).tolist()
    right = [model.config.id2label[answer] == label for answer, (_, label) in zip(answers, rows, strict=True)]
    assert said == sum(right) / len(right) > 1 / 3
