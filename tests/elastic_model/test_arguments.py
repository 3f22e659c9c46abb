import errno
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from elastic_model.arguments import option, parse, run, to_yaml
from elastic_model.folders import new_folder


@dataclass
class Options:
    """Options of a test command."""

    text: list[str] = option(["a.txt"], help="files, 100 % text")
    output: Path = option(Path("out"), help="folder")
    batch_size: int = option(8, help="rows")
    learning_rate: float = option(1e-3, help="peak")
    schedule: Literal["linear", "cosine"] = option("linear", help="decay")
    limit: int | None = option(None, help="at most")
    resume: bool = option(False, help="continue")
    budget: dict | None = option(None, help="budget")


@dataclass
class Positional:
    checkpoint: Path = option(help="what to read", positional=True)
    output: Path = option(help="what to write", positional=True)
    depth: int = option(help="required flag")


@dataclass
class Precision:
    precision: Literal["no", "bf16"] = option("bf16", help="of matrix products")


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "r.yaml").write_text(text)
        return str(tmp_path / "r.yaml")

    return write


def test_defaults_then_recipe_then_flags(recipe):
    file = recipe("batch_size: 16\nlearning_rate: 5e-4\ntext: [b.txt, c.txt]\nresume: true\nbudget: {speedup: 4}\n")
    options = parse(Options, ["--config", file, "--batch-size", "32", "--output", "x"])
    assert options == Options(["b.txt", "c.txt"], Path("x"), 32, 5e-4, "linear", None, True, {"speedup": 4})


def test_both_spellings_of_a_flag_and_every_kind_of_value():
    argv = "--batch_size 4 --limit 3 --resume --schedule cosine --text x y --budget".split() + ['{"flops": 1e9}']
    options = parse(Options, argv)
    assert (options.batch_size, options.limit, options.resume, options.schedule) == (4, 3, True, "cosine")
    assert (options.text, options.budget) == (["x", "y"], {"flops": 1e9})
    assert parse(Options, ["--limit", "none", "--resume", "false"]) == Options()


def test_what_yaml_reads_as_a_boolean_is_the_choice_of_that_name(recipe):
    assert parse(Precision, ["--config", recipe("precision: no\n")]).precision == "no"
    with pytest.raises(ValueError, match="expected one of no, bf16, got True"):
        parse(Precision, ["--config", recipe("precision: yes\n")])


def test_mutable_defaults_are_not_shared():
    Options().text.append("b.txt")
    assert Options().text == ["a.txt"]


def test_positional_and_required_options():
    assert parse(Positional, ["a", "b", "--depth", "3"]) == Positional(Path("a"), Path("b"), 3)
    assert parse(Positional, ["--depth", "3", "a", "b"]) == Positional(Path("a"), Path("b"), 3)
    assert parse(Positional, ["--checkpoint", "a", "--output", "b", "--depth", "3"]).output == Path("b")
    with pytest.raises(ValueError, match="--output is required"):
        parse(Positional, ["a", "--depth", "3"])
    with pytest.raises(ValueError, match="unrecognized arguments: c"):
        parse(Positional, ["a", "b", "c", "--depth", "3"])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("batch_sise: 3", "unknown key 'batch_sise' (value 3); did you mean batch_size? allowed: text, output"),
        ("batch_size: many", "batch_size: expected a whole number, got 'many'"),
        ("batch_size: 2.5", "batch_size: expected a whole number, got 2.5"),
        ("batch_size: true", "batch_size: expected a whole number, got True"),
        ("batch_size: null", "batch_size: expected a whole number, got None"),
        ("batch_size: [1, 2]", "batch_size: expected a whole number, got [1, 2]"),
        ("limit: x", "limit: expected a whole number or none, got 'x'"),
        ("resume: maybe", "resume: expected true or false, got 'maybe'"),
        ("schedule: quadratic", "schedule: expected one of linear, cosine, got 'quadratic'"),
        ("budget: 4", "budget: expected a mapping (JSON) or none, got 4"),
        ("- batch_size", "a recipe is a mapping of flags"),
        ("a: b: c", "not a YAML file"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(recipe, line, named):
    with pytest.raises(ValueError) as raised:
        parse(Options, ["--config", recipe(line)])
    assert named in str(raised.value) and "r.yaml" in str(raised.value)


def test_a_mistake_in_a_flag_is_named():
    with pytest.raises(ValueError, match="--batch-size: expected a whole number, got 'x'"):
        parse(Options, ["--batch-size", "x"])
    with pytest.raises(ValueError, match="unrecognized arguments: --batch 3"):
        parse(Options, ["--batch", "3"])


def test_a_run_can_be_repeated_from_its_yaml(recipe):
    options = Options(text=["x"], limit=3, budget={"speedup": 2})
    assert parse(Options, ["--config", recipe(to_yaml(options))]) == options


def test_run_turns_bad_input_into_one_line_and_code_2(capsys, tmp_path):
    def bad():
        raise ValueError("first\n  second")

    assert run(bad) == 2
    assert capsys.readouterr().err == "error: first second\n"
    assert run(lambda: (tmp_path / "missing").read_text() and None) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'missing'}: No such file or directory\n"
    assert run(lambda: None) == 0 and run(lambda: 143) == 143


def test_sigterm_ends_a_command_as_an_error_does(capsys, tmp_path):
    """But for training it killed: files half written stayed, and the exit code was not the one that is promised."""
    before = signal.getsignal(signal.SIGTERM)

    def stopped():
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            signal.raise_signal(signal.SIGTERM)

    assert run(stopped) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == before


def test_sigterm_of_a_forked_process_is_its_own(capfd):
    """Workers that are told to end do so without a word."""

    def parent():
        pid = os.fork()
        if pid == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:  # never out of here, into the rest of the tests
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert run(parent) == -signal.SIGTERM and capfd.readouterr().err == ""


def test_a_copy_that_fails_names_both_files(capsys):
    """The file that was read alone was named, where the disk of the other was full."""

    def copy():
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors", None, "full/model.safetensors")

    assert run(copy) == 2
    said = "error: model.safetensors -> full/model.safetensors: No space left on device\n"
    assert capsys.readouterr().err == said


def test_run_reports_a_configuration_that_fails_its_checks_and_raises_what_is_a_defect(capsys):
    from elastic_model import ElasticBertConfig

    assert run(lambda: ElasticBertConfig(exit_loss="harmonic")) == 2
    assert "exit_loss must be one of" in capsys.readouterr().err
    with pytest.raises(KeyError):
        run(lambda: {}["a defect"])


def test_a_package_that_is_not_installed_is_named_with_what_to_install(capsys):
    def command():
        raise ModuleNotFoundError("No module named 'onnx.helper'", name="onnx.helper")

    assert run(command) == 2
    assert capsys.readouterr().err == (
        "error: No module named 'onnx.helper'; install what the commands need: pip install "
        '"elastic-model[train,export]"\n'
    )

    def defect():
        raise ModuleNotFoundError("No module named 'finetune.gone'", name="finetune.gone")

    with pytest.raises(ModuleNotFoundError):
        run(defect)


def test_run_shows_the_traceback_on_request(monkeypatch):
    monkeypatch.setenv("ELASTIC_MODEL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="detail"):
        run(lambda: int("detail"))


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Options, ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--batch-size" in shown and "(default: 8)" in shown and "100 % text" in shown and "{linear,cosine}" in shown


def test_parsing_loads_no_framework():
    code = "import sys, elastic_model.arguments; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    """`... | head -1` said "error: [Errno 32] Broken pipe"."""
    code = (
        "import sys; from elastic_model.arguments import run\n"
        "sys.exit(run(lambda: [print('line ' * 1000) for _ in range(1000)] and 0))"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (141, "") and done.stdout.startswith("line ")
