"""Other people's clients: Node with the packages of its registry.

`npm install --ignore-scripts onnxruntime-node @huggingface/transformers` in some folder; ELASTIC_MODEL_NODE names it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from elastic_model import ElasticSession
from export.config import ExportOptions
from export.write import export_checkpoint

TEXTS = ["A treaty of commerce was signed in the spring.", "Our people are strong.", "The debt has been reduced."]
NODE = Path(os.environ.get("ELASTIC_MODEL_NODE", "nowhere"))


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("node") or not (NODE / "node_modules/onnxruntime-node").is_dir(),
    reason="needs node, and ELASTIC_MODEL_NODE: a folder with onnxruntime-node and @huggingface/transformers",
)
@pytest.mark.parametrize("options", [{}, {"exit": 2}], ids=["all exits", "plain"])
def test_node_gives_the_same_logits(lively_checkpoint, tmp_path, options):
    out = tmp_path / "out"
    export_checkpoint(ExportOptions(lively_checkpoint, out, files=["model"], **options))
    script = shutil.copy(Path(__file__).parent / "clients/predict.mjs", NODE)
    command = ["node", script, str(out), "model", json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    expected = session.run(session.encode(TEXTS))
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4)
    assert found["exit_layer"] in (None, expected["exit_layer"].tolist())
