"""Runs transformers' own common test-suite on our model classes, and holds it to the table of what may skip.

`make hf-common` runs it. Downloads the tests of the installed transformers once (see `upstream.py`).
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NEVER = False
GPU = torch.cuda.is_available()
VERSION = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Every skip of the suite: the tests, why they cannot run, and what is true where they may run, or be missing. A test
# that skips without an entry here fails, and so does an entry whose tests run or are gone although nothing allows it.
SKIPS = [
    # what an encoder of text does not have
    ("test_*rope*", "there are no rotary positions: positions are learned, as in BERT", NEVER),
    ("test_sliding_window_mask", "every token attends to every token", NEVER),
    ("test_causal_lm_loss_honors_shift_labels", "not a decoder: nothing is shifted", NEVER),
    ("test_encoder_decoder_loss_no_double_shift", "not an encoder-decoder: nothing is shifted", NEVER),
    ("test_*router_logits*", "no mixture of experts (older transformers have no such tests)", VERSION < (5, 23)),
    ("test_eager_matches_batched_and_grouped_inference_*", "no mixture of experts", NEVER),
    ("test_attn_implementation_composite_models", "one configuration for one network: no sub-models", NEVER),
    ("test_sdpa_can_dispatch_composite_models", "one configuration for one network: no sub-models", NEVER),
    ("test_can_set_attention_dynamically_composite_model", "one configuration: no sub-models", NEVER),
    ("test_internal_model_config_and_subconfig_are_same", "one configuration for one network: no sub-models", NEVER),
    # features of transformers that BERT does not have there either
    ("test_keep_in_fp32_modules*", "no module has to stay in float32: test_ecosystem.py runs bf16 and float16", NEVER),
    ("test_*tp_plan*", "no tensor parallelism: the models fit one device many times over", NEVER),
    ("test_resize_position_vector_embeddings", "BERT has no resize_position_embeddings either", NEVER),
    ("test_can_load_from_already_mapped_keys", "no conversion is registered: saved keys are the model's own", NEVER),
    ("test_reverse_loading_mapping", "no conversion is registered: saved keys are the model's own", NEVER),
    # what this machine or installation lacks
    ("test_flash_attn_*", "needs a GPU and the flash-attn or kernels package", GPU),
    ("test_kernels_can_load_without_crashing", "needs the kernels package", _installed("kernels")),
    ("test_*deepspeed*", "needs deepspeed, and a GPU", _installed("deepspeed")),
    ("test_*offload*", "needs a GPU to offload from", GPU),
    ("test_can_load_with_*device*", "needs a GPU beside the CPU", GPU),
    ("test_flex_attention_with_grads", "needs a GPU", GPU),
    ("test_sdpa_can_*_on_flash", "needs a GPU", GPU),
    ("test_sdpa_can_compile_dynamic", "needs a GPU: test_ecosystem.py compiles on the CPU", GPU),
    ("test_torch_compile_for_training", "needs a GPU: test_ecosystem.py compiles on the CPU", GPU),
    ("test_model_parallelism", "needs two GPUs", GPU and torch.cuda.device_count() > 1),
    # how the oldest supported transformers differs
    (
        "test_can_init_all_missing_weights",
        "before 5.23 only for files with a copyright line of 2023 or later, and no opt-in",
        VERSION >= (5, 23),
    ),
]


def unlisted(skipped: list[str]) -> list[str]:
    """Tests that skip although no entry of the table names them."""
    return [name for name in skipped if not any(fnmatchcase(name, pattern) for pattern, _, _ in SKIPS)]


def stale(skipped: list[str], ran: list[str]) -> list[str]:
    """Entries of the table that name a test which runs, or none that skips, although nothing here allows that."""
    return [
        pattern
        for pattern, _, may_run in SKIPS
        if not may_run
        and (
            any(fnmatchcase(name, pattern) for name in ran) or not any(fnmatchcase(name, pattern) for name in skipped)
        )
    ]


@pytest.mark.slow
def test_transformers_common_suite(tmp_path):
    fetched = subprocess.run([sys.executable, HERE / "upstream.py"], capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(fetched.stderr.strip())
    report = tmp_path / "report.xml"
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-W", "ignore"]
    environment = os.environ | {"RUN_SLOW": "1"}
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", HERE / "suite.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-8000:]

    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = sorted({case.get("name") for case in cases if case.find("skipped") is not None})
    ran = sorted({case.get("name") for case in cases} - set(skipped))
    print(f"\ntransformers {'.'.join(map(str, VERSION))}: {len(ran)} passed, {len(skipped)} skipped, 0 failed")
    assert len(ran) > 90  # the suite was really there
    assert not unlisted(skipped), "these tests skip without an entry in SKIPS"
    assert not stale(skipped, ran), "these entries of SKIPS no longer hold"


def test_the_table_notices_unlisted_skips_and_stale_entries():
    listed = [pattern.replace("*", "x") for pattern, _, _ in SKIPS]
    assert unlisted([*listed, "test_save_load"]) == ["test_save_load"]
    strict = [pattern for pattern, _, may_run in SKIPS if not may_run]
    assert stale(listed, ["test_save_load"]) == []
    assert stale([], []) == strict
    assert "test_sliding_window_mask" in stale(listed, ["test_sliding_window_mask"])
