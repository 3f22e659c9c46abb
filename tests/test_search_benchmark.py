"""The search benchmark, from a checkpoint to its report."""

import json
from argparse import Namespace

import torch

from benchmarks.search import benchmark, plot
from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification
from finetune.examples import read_examples
from finetune.tasks import TASKS


def test_the_benchmark_from_end_to_end(tiny_config, tiny_tokenizer, tmp_path):
    eras = sorted(set(read_examples(TASKS["era"], "dev").labels))
    names = {"id2label": dict(enumerate(eras)), "label2id": {era: number for number, era in enumerate(eras)}}
    torch.manual_seed(0)
    config = ElasticBertConfig.from_dict({**tiny_config.to_dict(), **names, "initializer_range": 0.3})
    folder = tmp_path / "checkpoint"
    ElasticBertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    own = {"checkpoint": str(folder), "task": "era", "output": str(tmp_path / "report.json"), "exported": None}
    result = benchmark(Namespace(**own, max_length=32, rows=64, test_rows=70, iterations=1, workers=1))
    axes = {"joint", "lengths", "exits", "constant ratio"}
    assert set(result["area_dev"]) == set(result["area_test"]) == axes and result["test_rows"] == 70
    assert all(0 < area <= 1 for name in ("area_dev", "area_test") for area in result[name].values())
    assert result["area_dev"]["joint"] >= result["area_dev"]["exits"]
    assert result["configurations_on_all_rows"] < result["configurations"] < result["candidates"]
    assert 0 < result["share_of_naive_per_candidate"] < result["share_of_naive_per_configuration"]
    choosing = result["rows_choose_their_lengths"]
    assert choosing["searched_and_by_row"] and set(choosing["area"]) == {"searched", "by row"}
    assert all(0 < pair["mass"] < 1 for pair in choosing["searched_and_by_row"])
    assert set(result["calibration"]) == {"0.05", "0.1"} and json.dumps(result)  # 70 rows are too few for 0.01
    result["latency_against_flops"] = {"1": {"mflops_and_ms": [(1.0, 2.0)], "correlation": None}}
    plot(json.loads(json.dumps(result)), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size and not (folder / "operating_points.json").exists()
    assert all(isinstance(kept, bool) for kept in result["bars"].values())
