"""ELUE's files: what parses, what a row costs, and that everything else is refused with its line."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification, cost
from finetune.elue.costs import CostTable, ModuleCost, load_costs, table_of, write_table
from finetune.elue.submission import (
    Step,
    files_of,
    flops_of,
    modules_text,
    parse_modules,
    read_predictions,
    steps_of,
    write_predictions,
)
from finetune.elue.tasks import answers_to

# the example of the paper's slides
SLIDES = """\
index\tpred\tmodules
0\t1\t(10),emb; (10,768),layer_1; (768),exit_1
1\t0\t(15),emb; (15,768),layer_1; (768),exit_1; (15,768),layer_2; (768),exit_2
2\t1\t(12),emb; (12,768),layer_1; (768),exit_1
"""
SIZES = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 4, "max_position_embeddings": 32}


def config_of(**changes):
    widths = {"num_attention_heads_per_layer": [4, 3, 2], "intermediate_size_per_layer": [40, 30, 20]}
    return ElasticBertConfig(**{**SIZES, "num_hidden_layers": 3, **widths, "num_labels": 2, **changes})


def written(tmp_path, text):
    file = tmp_path / "point.tsv"
    file.write_text(text)
    return file


def test_the_slides_example(tmp_path):
    predictions = read_predictions(written(tmp_path, SLIDES), 3, answers_to("sst2"))
    assert predictions.answers.tolist() == [1, 0, 1]
    base = table_of(ElasticBertConfig(), outputs=2)
    flops, names = flops_of(predictions, base.flops)
    assert names == ["emb", "layer_1", "exit_1", "layer_2", "exit_2"]
    layer = {n: 2 * (4 * n * 768**2 + 2 * n * n * 768 + 2 * n * 768 * 3072) for n in (10, 12, 15)}
    exit = 2 * (768**2 + 768 * 2)
    assert flops.tolist() == [layer[10] + exit, 2 * layer[15] + 2 * exit, layer[12] + exit]


def test_columns_may_be_spaced_and_the_header_left_out(tmp_path):
    spaced = "\ufeff" + SLIDES.split("\n", 1)[1].replace("\t", "  ").replace("\n", "\r\n")
    assert read_predictions(written(tmp_path, spaced), 3, answers_to("sst2")).answers.tolist() == [1, 0, 1]


def test_a_path_survives_being_written(tmp_path):
    steps = [Step("emb", (7,)), Step("attention_1", (7, 24)), Step("ffn_1", (4, 24)), Step("exit_1", (24,))]
    assert parse_modules(modules_text(steps)) == steps
    write_predictions(tmp_path / "point.tsv", [0, 2.5], [modules_text(steps)] * 2)
    read = read_predictions(tmp_path / "point.tsv", 2, answers_to("stsb"))
    assert read.answers.tolist() == [0.0, 2.5] and parse_modules(read.paths[1]) == steps


ROW = "(10),emb; (10,768),layer_1; (768),exit_1"


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("sst2", [f"0\t1\t{ROW}", f"2\t1\t{ROW}"], "line 2: index 1 is missing before it; the test split has 3 rows"),
        ("sst2", [f"1\t1\t{ROW}", f"0\t1\t{ROW}"], "line 3: index 2 is missing before it"),
        ("sst2", [], r"line 1: index 0 is missing before it \(3 are\)"),
        ("sst2", [f"0\t1\t{ROW}", f"0\t0\t{ROW}"], "line 2: index 0 is a duplicate, it was given in line 1"),
        ("sst2", [f"3\t1\t{ROW}"], "line 1: index 3 is beyond the test split, whose 3 rows are 0 to 2"),
        ("sst2", [f"-1\t1\t{ROW}"], "line 1: index '-1' is not a whole number from 0"),
        ("sst2", [f"0\t2\t{ROW}"], "line 1: pred '2' is not a class of sst2: 0 to 1 or negative, positive"),
        ("sst2", [f"0\t0.7\t{ROW}"], "line 1: pred '0.7' is not a class of sst2"),
        ("sst2", [f"0\tnan\t{ROW}"], "line 1: pred 'nan' is not a class of sst2"),
        ("stsb", [f"0\tnan\t{ROW}"], "line 1: pred 'nan' is not a finite number, as stsb needs"),
        ("stsb", [f"0\tinf\t{ROW}"], "line 1: pred 'inf' is not a finite number, as stsb needs"),
        ("stsb", [f"0\tgood\t{ROW}"], "line 1: pred 'good' is not a finite number, as stsb needs"),
        ("sst2", ["0\t1"], "line 1: 2 cells, expected 3: index, pred, modules"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, task, lines, message):
    with pytest.raises(ValueError, match=f"point.tsv, {message}"):
        read_predictions(written(tmp_path, "\n".join(lines)), 3, answers_to(task))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("(10),emb; (10,768),layer_13", "line 2: module 'layer_13' is unknown; the model file has: emb, attention_1"),
        ("(10),emb; (10,512),layer_1", r"line 2: module \(10,512\),layer_1: its input has the shape \(n,768\)"),
        ("(10),emb; (768),layer_1", r"line 2: module \(768\),layer_1: its input has the shape \(n,768\)"),
        ("(10),emb; 10,768,layer_1", r"line 2: module '10,768,layer_1' is not of the form \(10,768\),layer_1"),
        ("(10),emb;; (768),exit_1", r"line 2: module '' is not of the form \(10,768\),layer_1"),
        ("(0),emb", "line 2: module .* sizes of a shape must be at least 1"),
        ("nan", "line 2: module 'nan' is not of the form"),
    ],
)
def test_bad_modules_are_refused_with_their_line(tmp_path, modules, message):
    file = written(tmp_path, f"0\t1\t{ROW}\n1\t1\t{modules}\n")
    predictions = read_predictions(file, 2, answers_to("sst2"))
    with pytest.raises(ValueError, match=f"point.tsv, {message}"):
        flops_of(predictions, table_of(ElasticBertConfig(), outputs=2).flops)


SUB_NETWORKS = [
    {},
    {"exit_layer": 2},
    {"exit_layer": 2, "asked": [2]},
    {"length_config": [0.8, 0.5, 0.3]},
    {"length_config": [0.8, 0.5, 0.3], "exit_layer": 2},
    {"layer_config": [1, 3]},
    {"layer_config": [1, 3], "length_config": [1.0, 0.7, 0.4]},
]


@pytest.mark.parametrize("sub_network", SUB_NETWORKS, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_a_rows_modules_cost_what_the_model_costs(sub_network, learned):
    config = config_of(learned_exit_head=learned)
    table = table_of(config, outputs=2)
    for tokens in (2, 13, 31):
        steps = parse_modules(modules_text(steps_of(config, tokens, **sub_network)))
        assert sum(map(table.flops, steps)) == cost.flops(config, tokens, **sub_network)


@pytest.mark.parametrize("length_config", [None, [0.8, 0.5, 0.3]], ids=str)
@pytest.mark.parametrize("layer", [1, 3])
def test_a_rows_modules_cost_what_pytorch_counts(length_config, layer):
    """Over the modules that ran, with eager attention: the counter does not see the fused one of CPUs."""
    config = config_of(attn_implementation="eager")
    model = ElasticBertForSequenceClassification(config).eval()
    policy = {"name": "constant", "layer": layer}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(13)[None], exit_policy=policy, length_config=length_config)
    steps = steps_of(config, 13, exit_layer=layer, length_config=length_config)
    assert sum(map(table_of(config, outputs=2).flops, steps)) == counter.get_total_flops()


def test_layers_are_whole_unless_tokens_are_dropped():
    config = config_of(exit_layers=[2, 3])
    assert modules_text(steps_of(config, 5, exit_layer=2)) == "(5),emb; (5,24),layer_1; (5,24),layer_2; (24),exit_2"
    dropped = modules_text(steps_of(config, 5, exit_layer=2, length_config=[0.6, 0.4, 0.4]))
    assert dropped == ("(5),emb; (5,24),attention_1; (3,24),ffn_1; (3,24),attention_2; (2,24),ffn_2; (24),exit_2")


def test_parameters_of_the_modules_are_the_models():
    for changes in ({}, {"num_output_layers": 1}, {"learned_exit_head": True}, {"num_labels": 3}):
        config = config_of(**changes)
        table = table_of(config, outputs=config.num_labels)
        model = ElasticBertForSequenceClassification(config)
        layers = [name for name in table.modules if not name.startswith(("attention", "ffn"))]
        expected = sum(parameter.numel() for parameter in model.parameters())
        assert table.parameters(layers) == table.parameters(table.modules) == expected


def test_a_table_survives_its_file(tmp_path):
    table = table_of(config_of(), outputs=2)
    write_table(table, tmp_path / "modules.tsv")
    assert load_costs(tmp_path / "modules.tsv", answers_to("sst2")) == table
    assert load_costs(tmp_path, answers_to("sst2")) == table


def test_a_table_as_json(tmp_path):
    modules = {"emb": 0, "layer_1": {"flops_per_token": 5, "flops_per_token_squared": 1}, "(3,8),layer_2": 77}
    (tmp_path / "table.json").write_text(json.dumps({"modules": modules}))
    costs = load_costs(tmp_path / "table.json", answers_to("sst2"))
    assert isinstance(costs, CostTable) and costs.modules["layer_1"] == ModuleCost(0, 5, 1)
    assert [costs.flops(step) for step in parse_modules("(3),emb; (3,8),layer_1; (3,8),layer_2")] == [0, 24, 77]
    assert costs.parameters(["emb"]) is None


@pytest.mark.parametrize("outputs", [1, 2])
def test_costs_from_a_stock_configuration(tmp_path, outputs):
    stock = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**stock, "intermediate_size": 40}))
    kind = answers_to("stsb" if outputs == 1 else "sst2")
    same = ElasticBertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
    assert load_costs(tmp_path, kind) == table_of(same, outputs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.json", '{"modules": {"layer_1": null}}', "module 'layer_1' has no cost; give one of flops"),
        ("model.py", "module_list = {}", "is Python code; to have it run, give --trust-model-code"),
        ("table.tsv", "name\tcost\nemb\t0\n", r"line 1: its columns must be module and some of .*, got name, cost"),
        (
            "table.tsv",
            "module\tflops\nemb\t-3\n",
            "line 2: flops of module 'emb' must be a whole number from 0, got '-3'",
        ),
        (
            "table.tsv",
            "module\tflops\nemb\tnan\n",
            "line 2: flops of module 'emb' must be a whole number from 0, got 'nan'",
        ),
        ("table.tsv", "module\tflops\nemb\t1\nemb\t2\n", "line 3: module 'emb' is there twice"),
        ("table.tsv", "module\tflops\n\n\nemb\t1\nlayer_1\tx\n", "line 5: flops of module 'layer_1' must be a whole"),
        ("table.json", '{"emb": 5, "emb": 7}', "'emb' is there twice"),
        ("table.json", '{"(3,8),emb": 5, "(3, 8),emb": 7}', r"table.json: '\(3,8\),emb' is there twice"),
        ("table.tsv", "module\tflops\tflops\nemb\t1\t2\n", "line 1: its columns must be module and .*, each once"),
        ("config.json", '{"model_type": "bert", "id2label": [1]}', "config.json is no configuration"),
        ("table.json", "[1]", "expected an object of modules, got a list"),
        ("table.json", "{", "is not JSON"),
        ("table.json", '{"emb": {"cost": 3}}', "module 'emb' has 'cost'; allowed: input, flops"),
        ("table.json", '{"emb": true}', "flops of module 'emb' must be a whole number from 0, got True"),
        ("table.json", '{"emb": {"input": "n x 768"}}', "module 'emb' has the input 'n x 768'; write it as"),
        (
            "table.json",
            '{"model_type": "t5"}',
            "costs are derived for elasticbert, bert, roberta, distilbert, not for 't5'",
        ),
    ],
)
def test_a_bad_model_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_costs(tmp_path / name, answers_to("sst2"))


def test_a_table_in_another_encoding_is_named(tmp_path):
    (tmp_path / "table.tsv").write_text("module\tflops\nemb\t1\n", encoding="utf-16")
    with pytest.raises(ValueError, match="model file .*table.tsv: not UTF-8 text"):
        load_costs(tmp_path / "table.tsv", answers_to("sst2"))
    (tmp_path / "table.json").write_text('{"emb": 7}', encoding="utf-8-sig")
    assert load_costs(tmp_path / "table.json", answers_to("sst2")).flops(Step("emb", (3,))) == 7


CODE = """
import torch
layer = torch.nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
module_list = [("emb", torch.nn.Embedding(50, 24)), ("layer_1", layer), ("exit_1", torch.nn.Linear(24, 2))]
"""

MOVED = """    def __init__(self):
        super().__init__()
        self.positions, self.dense = torch.nn.Embedding(64, 24), torch.nn.Linear(24, 24)

    def forward(self, states):
        return self.dense(states + self.positions(torch.arange(states.shape[1])))
"""
IMPORTS = """from __future__ import annotations
from dataclasses import dataclass
import torch
from parts import Moved

@dataclass
class Sizes:
    width: int = 24

module_list = [("emb", torch.nn.Embedding(50, Sizes().width)), ("layer_1", Moved())]
"""


def test_rows_of_a_single_shape(tmp_path):
    """Written with spaces they never fitted, and their parameters were not found."""
    (tmp_path / "table.tsv").write_text("module\tflops\tparameters\nemb\t0\t5\n(10, 24), layer_1\t7\t9\n")
    costs = load_costs(tmp_path / "table.tsv", answers_to("sst2"))
    assert costs.flops(Step("layer_1", (10, 24))) == 7 and costs.parameters(["emb", "layer_1"]) == 14


def test_trusted_code_is_counted(tmp_path):
    (tmp_path / "model.py").write_text(CODE)
    costs = load_costs(tmp_path / "model.py", answers_to("sst2"), trust_model_code=True)
    config = config_of(num_attention_heads_per_layer=[4] * 3, intermediate_size_per_layer=[40] * 3)
    same = table_of(config, outputs=2)
    steps = parse_modules("(7),emb; (7,24),layer_1; (24),exit_1")
    assert [costs.flops(step) for step in steps[:2]] == [same.flops(step) for step in steps[:2]]
    assert costs.flops(steps[2]) == 2 * 24 * 2
    assert costs.parameters(["emb", "exit_1"]) == 50 * 24 + 24 * 2 + 2
    with pytest.raises(ValueError, match=r"module \(7,9\),layer_1: it does not run on that shape"):
        costs.flops(Step("layer_1", (7, 9)))
    with pytest.raises(ValueError, match="module 'layer_2' is unknown; module_list has: emb, layer_1, exit_1"):
        costs.flops(Step("layer_2", (7, 24)))


def test_modules_may_be_a_module_dict(tmp_path):
    code = "import torch\nmodule_list = torch.nn.ModuleDict({'emb': torch.nn.Linear(3, 3)})"
    (tmp_path / "model.py").write_text(code)
    costs = load_costs(tmp_path / "model.py", answers_to("sst2"), trust_model_code=True)
    assert costs.parameters(["emb"]) == 12


def test_code_that_fails_is_named(tmp_path):
    (tmp_path / "parts.py").write_text("import torch\nclass Moved(torch.nn.Module):\n" + MOVED)
    (tmp_path / "model.py").write_text(IMPORTS)
    costs = load_costs(tmp_path / "model.py", answers_to("sst2"), trust_model_code=True)
    assert costs.flops(Step("layer_1", (10, 24))) == 2 * 10 * 24 * 24  # a layer may have an embedding of its own
    other = tmp_path / "other"  # whose module of the same name is another, imported where it runs
    other.mkdir()
    (other / "parts.py").write_text("import torch\nwide = torch.nn.Linear(24, 48)")
    late = "import torch\nclass Late(torch.nn.Module):\n    def forward(self, x):\n        from parts import wide\n"
    (other / "model.py").write_text(f"{late}        return wide(x)\nmodule_list = [('layer_1', Late())]")
    more = load_costs(other / "model.py", answers_to("sst2"), trust_model_code=True)
    assert more.flops(Step("layer_1", (10, 24))) == 2 * 10 * 24 * 48
    (tmp_path / "model.py").write_text("module_list = [('emb', None), ('emb', None)]")
    with pytest.raises(ValueError, match="running it gave ValueError: 'emb' is there twice"):
        load_costs(tmp_path / "model.py", answers_to("sst2"), trust_model_code=True)
    (tmp_path / "model.py").write_text("modules = 1 / 0")
    with pytest.raises(ValueError, match="it must define module_list.*ZeroDivisionError"):
        load_costs(tmp_path / "model.py", answers_to("sst2"), trust_model_code=True)


def test_files_of_a_submission(tmp_path):
    for name in ("SST-2/a.tsv", "SST-2/b.tsv", "SST-2/modules.tsv", "mrpc.tsv", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = files_of(tmp_path)
    assert {task: sorted(points) for task, points in found.items()} == {"sst2": ["a", "b"], "mrpc": ["mrpc"]}
    for stray in ("SST-2/more/c.tsv", "STSB.TSV"):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).touch()
        with pytest.raises(ValueError, match=f"{stray}: would not be read; test files are TASK.tsv or TASK/POINT.tsv"):
            files_of(tmp_path)
        (tmp_path / stray).unlink()
    (tmp_path / "cola.tsv").touch()
    with pytest.raises(ValueError, match="'cola' is not a task of ELUE; its tasks: sst2, imdb"):
        files_of(tmp_path)
    with pytest.raises(ValueError, match="has no test files; expected TASK.tsv or TASK/POINT.tsv"):
        files_of(_empty(tmp_path))


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_row_of_a_single_shape_is_for_that_shape_alone():
    table = CostTable({"layer_1": ModuleCost(5), "(10,24),layer_1": ModuleCost(7)})
    assert [table.flops(Step("layer_1", (size, 24))) for size in (9, 10)] == [5, 7]


def test_a_tied_module_has_its_parameters_once(tmp_path):
    code = "import torch\none = torch.nn.Linear(3, 3)\nmodule_list = [('emb', one), ('exit_1', one)]"
    (tmp_path / "model.py").write_text(code)
    costs = load_costs(tmp_path / "model.py", answers_to("sst2"), trust_model_code=True)
    assert costs.parameters(["emb", "exit_1", "emb"]) == 12


def test_a_module_of_a_fixed_shape_counts_as_one_token():
    assert ModuleCost(1, 5, 2, "(24)").on(Step("exit_1", (24,))) == 8


def test_lengths_of_the_configuration_itself():
    """A table is of all tokens whatever they are; a row without lengths of its own runs at the configuration's."""
    config = config_of(length_config=[0.8, 0.5, 0.3])
    table = table_of(config, outputs=2)
    assert table == table_of(config_of(), outputs=2)
    assert sum(map(table.flops, steps_of(config, 13))) == cost.flops(config, 13) < cost.flops(config_of(), 13)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.tsv", "module\tflops\nemb\t1\t2\n", "line 2: expected 2 cells and a module's name"),
        ("table.json", '{"emb": 2.5}', "flops of module 'emb' must be a whole number from 0, got 2.5"),
    ],
)
def test_cells_and_counts_of_a_table(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_costs(tmp_path / name, answers_to("sst2"))


def test_large_counts_keep_their_last_digit(tmp_path):
    (tmp_path / "table.tsv").write_text("module\tflops\nemb\t9007199254740993\n")
    assert load_costs(tmp_path / "table.tsv", answers_to("sst2")).flops(Step("emb", (3,))) == 2**53 + 1


def test_the_nearest_table_of_a_folder_counts(tmp_path):
    """The task's own, then the one in the task's folder, then the folder's, then the configuration's."""
    names = ("config.json", "modules.tsv", "sst2/modules.tsv", "sst2.json", "sst2.tsv")
    (tmp_path / "sst2").mkdir()
    for flops, name in enumerate(names[1:], start=1):
        table = f"module\tflops\nemb\t{flops}\n"
        (tmp_path / name).write_text(json.dumps({"emb": flops}) if "json" in name else table)
    (tmp_path / names[0]).write_text(json.dumps(config_of().to_dict()))
    for flops, name in reversed(list(enumerate(names))):
        assert load_costs(tmp_path, answers_to("sst2")).flops(Step("emb", (3,))) == flops
        (tmp_path / name).unlink()


def test_numbers_keep_six_digits(tmp_path):
    write_predictions(tmp_path / "point.tsv", [4.18754], ["(1),emb"])
    assert read_predictions(tmp_path / "point.tsv", 1, answers_to("stsb")).answers.tolist() == [4.18754]
