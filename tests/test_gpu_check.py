"""The script for machines with a GPU, on a CPU: what it measures there says nothing, that it runs does."""

import json
import sys

import pytest
import torch

from benchmarks.gpu_check import RESULTS, gpu_check
from elastic_model.arguments import run


@pytest.fixture
def check(monkeypatch, tmp_path):
    """-> exit code of the script with these arguments, and its result."""

    def call(*argv):
        output = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(output), *argv])
        return run(gpu_check), json.loads(output.read_text()) if output.exists() else None

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(check, capsys):
    assert check() == (2, None)
    assert "no GPU was found" in capsys.readouterr().err


def test_a_cpu_result_is_not_written_in_the_place_of_a_gpus(check, capsys):
    assert check("--device", "cpu", "--output", str(RESULTS)) == (2, None)
    assert "says nothing of a GPU" in capsys.readouterr().err


def test_sections_are_kept_and_not_measured_again(check, capsys):
    cpu = ("--device", "cpu", "--size", "tiny", "--rounds", "2")
    code, first = check(*cpu, "--only", "1 exit")
    assert code == 0 and list(first["sections"]) == ["1 exit"] and not first["about"]["proves_a_gpu_works"]
    assert first["sections"]["1 exit"]["tokens_per_second"] > 0
    code, second = check(*cpu, "--only", "1 exit", "12 exits, 2 groups")
    assert code == 0 and second["sections"]["1 exit"] == first["sections"]["1 exit"]
    assert second["sections"]["12 exits, 2 groups"]["exits"][0] == [1, 3, 5, 7, 9, 11, 12]
    code, third = check(*cpu, "--minutes", "0")
    assert code == 1 and third == second and "fsdp2: left for the next call" in capsys.readouterr().out
    assert check("--device", "cpu", "--only", "1 exit")[0] == 2  # base: not what the file was measured on


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp2", "zero2"])
def test_the_command_is_launched_saved_and_resumed(check, mode):
    code, result = check("--device", "cpu", "--size", "tiny", "--only", mode)
    assert code == 0 and result["sections"][mode]["resumed_to_the_same_bytes"], result
