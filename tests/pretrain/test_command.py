import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_model.arguments import parse, to_yaml
from elastic_model.folders import shipped
from pretrain.__main__ import main
from pretrain.config import FREE_ON_RESUME, PretrainConfig
from pretrain.data import check_batch_size
from pretrain.text import documents

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "pretrain" / "recipes").glob("*.yaml"))


@pytest.fixture
def command(options, tmp_path, monkeypatch, capsys):
    """-> exit code and stderr of `python -m pretrain` with the tiny options and other flags."""

    def call(*argv, **flags):
        (tmp_path / "options.yaml").write_text(to_yaml(options(**flags)))
        monkeypatch.setattr(sys, "argv", ["pretrain", "--config", str(tmp_path / "options.yaml"), *map(str, argv)])
        return main(), capsys.readouterr().err

    return call


def fails_in_one_line(result, *named):
    code, error = result
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(str(name) in error for name in named), error


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_its_text_is_there(recipe):
    config = parse(PretrainConfig, ["--config", str(recipe)])
    assert all(shipped(Path(name)).is_file() for name in config.text)


def test_the_tiny_recipe_reads_longer_inputs_than_the_era_task_needs():
    config = parse(PretrainConfig, ["--config", "pretrain/recipes/tiny.yaml"])
    assert config.max_position_embeddings >= 192 and config.num_hidden_layers == 4 and config.exit_layers is None
    assert sum(1 for _ in documents(shipped(Path(config.text[0])))) > 100


@pytest.mark.parametrize(("name", "layers", "width", "groups"), [("base", 12, 768, 2), ("large", 24, 1024, 3)])
def test_base_and_large_are_the_papers(name, layers, width, groups):
    """Liu et al. 2022."""
    config = parse(PretrainConfig, ["--config", f"pretrain/recipes/{name}.yaml"])
    assert (config.num_hidden_layers, config.hidden_size, config.exit_groups) == (layers, width, groups)
    assert (config.batch_size, config.steps, config.max_length) == (4096, 125_000, 512)
    assert config.gradient_equilibrium and config.exit_layers is None and config.exit_loss == "sum"
    assert config.hidden_size == 64 * config.num_attention_heads
    for processes in (1, 8, 32):
        assert check_batch_size(config.batch_size, config.micro_batch_size, processes) == config.micro_batch_size


def test_shipped_recipes_and_text_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(PretrainConfig, ["--config", "pretrain/recipes/tiny.yaml"])
    assert shipped(Path(config.text[0])).samefile(ROOT / config.text[0])


def test_help_answers_without_loading_a_framework():
    code = (
        "import sys; sys.argv = ['pretrain', '--help']\n"
        "from pretrain.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as ended: print(ended.code, {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    started = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout
    assert shown.endswith("0 set()\n") and "--learning-rate" in shown
    assert time.monotonic() - started < 20  # under two seconds on a quiet machine


def test_every_option_explains_itself_and_free_ones_exist():
    fields = PretrainConfig.__dataclass_fields__
    assert all(field.metadata["help"] for field in fields.values())
    assert FREE_ON_RESUME < fields.keys()


def test_missing_empty_and_binary_text(command, tmp_path):
    fails_in_one_line(command(text=tmp_path / "nowhere.txt"), "no file", "nowhere.txt")
    fails_in_one_line(command(text=tmp_path / "*.nothing"), "no file", "*.nothing")
    (tmp_path / "empty.txt").write_text("")
    fails_in_one_line(command(text=tmp_path / "empty.txt", vocab_size=40), "empty.txt", "no text")
    (tmp_path / "one.txt").write_text("One document. It has two sentences.")
    fails_in_one_line(command(text=tmp_path / "one.txt", vocab_size=60), "one.txt", "1 document(s), at least 2")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    fails_in_one_line(command(text=tmp_path / "image.txt"), "image.txt", "line 1 is not UTF-8 text")
    assert not (tmp_path / "run").exists()


def test_two_documents_of_one_line_are_enough(command, tmp_path):
    (tmp_path / "two.txt").write_text("The one document has a line.\n\nThe other document has a line too.\n")
    code, error = command(text=tmp_path / "two.txt", vocab_size=60, batch_size=1, steps=2, warmup_steps=0)
    assert code == 0, error


def test_a_corpus_smaller_than_a_batch(command):
    fails_in_one_line(command(batch_size=4096), "fewer than one batch", "4096")


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--hiden_size", "3", "unrecognized arguments: --hiden_size 3"),
        ("--hidden-size", "wide", "--hidden-size: expected a whole number, got 'wide'"),
        ("--batch-size", "0", "batch_size must be at least 1, got 0"),
        ("--mask-probability", "1.5", "mask_probability must lie within 0.01..0.9, got 1.5"),
        ("--learning-rate", "-1", "learning_rate must be positive, got -1.0"),
        ("--max-length", "64", "max_length must lie within 8..max_position_embeddings (32), got 64"),
        ("--precision", "fp8", "--precision: expected one of no, bf16, got 'fp8'"),
        ("--num-attention-heads", "3", "hidden_size must be a multiple of num_attention_heads"),
        ("--exit-layers", "1", "exit_layers must rise within 1..2 and end at 2"),
        ("--exit-loss", "best", "exit_loss must be one of"),
        ("--vocab-size", "30", "vocab_size must be above"),
        ("--dataset", "/nowhere", "text or dataset: one of the two is needed"),
        ("--streaming", "true", "streaming belongs to a dataset"),
        ("--mixture", '{"a": {"text": "b"}}', "leave text and dataset out"),
        ("--tokenizer", "/nowhere", "tokenizer folder /nowhere does not exist"),
        ("--init-from", "/nowhere", "/nowhere"),
        ("--tracker", "clipboard", "clipboard"),
    ],
)
def test_a_wrong_option_is_named(command, tmp_path, flag, value, named):
    fails_in_one_line(command(flag, value), named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("mixture: {2019: {text: a.txt}, 2020: {text: b.txt}}", "mixture: 2019 is no text"),
        ("mixture: {en: {text: a.txt}, no: {text: b.txt}}", "mixture: False is no text"),
        ("mixture: {en: {text: [a.txt], 1: 2}}", "mixture: en: unknown key '1'"),
        ("text: [a.txt]\nexit-layers: []", "exit_layers names no layer"),
        ("dataset: ''", "text or dataset: one of the two is needed"),
    ],
)
def test_a_recipe_that_means_something_else_is_named(tmp_path, monkeypatch, capsys, recipe, named):
    (tmp_path / "recipe.yaml").write_text(f"{recipe}\noutput: {tmp_path / 'run'}\n")
    monkeypatch.setattr(sys, "argv", ["pretrain", "--config", str(tmp_path / "recipe.yaml")])
    fails_in_one_line((main(), capsys.readouterr().err), named)


def test_an_unknown_key_of_a_recipe(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("text: [a.txt]\noutput: out\nlearning_rat: 3\n")
    monkeypatch.setattr(sys, "argv", ["pretrain", "--config", str(tmp_path / "recipe.yaml")])
    fails_in_one_line(
        (main(), capsys.readouterr().err), "unknown key 'learning_rat' (value 3); did you mean learning_rate?"
    )


def test_an_output_that_is_not_ours_is_left_alone(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    fails_in_one_line(command(), tmp_path / "run", "not made by elastic-model")
    fails_in_one_line(command("--resume"), tmp_path / "run", "not made by elastic-model")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_is_not_overwritten_and_not_resumed_with_other_options(command, corpus_text, tmp_path):
    assert command(steps=4)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    fails_in_one_line(command(steps=4), tmp_path / "run", "add --resume")
    fails_in_one_line(command("--resume", steps=8), "steps was 4", "now 8")
    fails_in_one_line(command("--resume", steps=4, hidden_size=32), "hidden_size was 16", "now 32")
    fails_in_one_line(command("--resume", steps=4, max_length=16), "max_length was 24", "now 16")
    (tmp_path / "other.txt").write_text(corpus_text + "\n\nOne more document. It has two sentences.\n")
    fails_in_one_line(command("--resume", steps=4, text=tmp_path / "other.txt"), "the text of source 'text' is not")
    fails_in_one_line(command("--resume", steps=4, vocab_size=150), "the tokenizer is not the one")
    mixture = json.dumps({"a": {"text": str(tmp_path / "other.txt")}})
    fails_in_one_line(command("--resume", "--text", "--mixture", mixture, steps=4), "the sources were text", "now a")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_processes_that_no_launcher_started_are_refused(command, monkeypatch, tmp_path):
    """They would wait for each other for ever."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("os._exit", lambda code: None)  # what ends a process of several
    fails_in_one_line(command(), "WORLD_SIZE is 2", "no launcher started this process")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launcher_that_starts_fewer_processes_than_asked_for_is_refused(options, tmp_path):
    """`accelerate launch --cpu` starts one whatever it was asked for, without a word."""
    (tmp_path / "options.yaml").write_text(to_yaml(options()))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    argv = [*launch, "-m", "pretrain", "--config", str(tmp_path / "options.yaml")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "asked for several processes on a CPU but starts one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_text_is_prepared_without_an_output(corpus_file, cache, monkeypatch, capsys):
    flags = ("--text", corpus_file, "--cache", cache, "--vocab-size", 160, "--batch-size", 8, "--max-length", 24)
    monkeypatch.setattr(sys, "argv", ["pretrain", "prepare", *map(str, flags)])
    assert main() == 0 and "480" in capsys.readouterr().out
