"""What the modules of a submission cost: from a table, from a model's configuration, or from somebody's model.py."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification, cost
from elastic_model.pretrained import elastic_config
from finetune.elue.submission import MODULES_FILE, Step
from finetune.elue.tasks import Answers, spelled

COLUMNS = ("module", "input", "flops", "flops_per_token", "flops_per_token_squared", "parameters")
SHAPE = re.compile(r"\((?:n|\d+)(?:,(?:n|\d+))*\)")


@dataclass(frozen=True)
class ModuleCost:
    """FLOPs of a module on n tokens: flops + flops_per_token n + flops_per_token_squared n^2.

    input: its shape with n in it, as (n,768); None: any, and n is its first number.
    """

    flops: int = 0
    flops_per_token: int = 0
    flops_per_token_squared: int = 0
    input: str | None = None
    parameters: int | None = None

    def tokens(self, step: Step) -> int:
        """n; ValueError where the shape is not that of the module's input."""
        if self.input is None:
            return step.shape[0]
        sizes = self.input.strip("()").split(",")
        if len(sizes) != len(step.shape) or any(
            given not in ("n", str(size)) for given, size in zip(sizes, step.shape, strict=True)
        ):
            raise ValueError(f"module {step}: its input has the shape {self.input}")
        return next((size for given, size in zip(sizes, step.shape, strict=True) if given == "n"), 1)

    def on(self, step: Step) -> int:
        """FLOPs of the module on the step's input."""
        n = self.tokens(step)
        return self.flops + self.flops_per_token * n + self.flops_per_token_squared * n * n


@dataclass(frozen=True)
class CostTable:
    """Costs by the module's name, or for one shape alone by shape and name, as `(10,768),layer_1`."""

    modules: Mapping[str, ModuleCost]

    def _cost(self, step: Step) -> ModuleCost:
        found = self.modules.get(str(step)) or self.modules.get(step.name)
        if found is None:
            raise ValueError(f"module {step.name!r} is unknown; the model file has: {', '.join(self.modules)}")
        return found

    def flops(self, step: Step) -> int:
        """FLOPs of a module on its input, a multiply-add counted as two; ValueError for one that is not known."""
        return self._cost(step).on(step)

    def parameters(self, names: Iterable[str]) -> int | None:
        """Parameters of the modules together, None where that is not known; a layer that is used whole and in parts is
        counted once."""
        wanted = dict.fromkeys(names)
        sizes = {name: self._parameters(name) for name in wanted}
        if None in sizes.values():
            return None
        whole = {name.partition("_")[2] for name in wanted if name.startswith("layer_")}
        parts = [name for name in wanted if name.startswith(("attention_", "ffn_")) and name.split("_", 1)[1] in whole]
        return sum(size or 0 for name, size in sizes.items() if name not in parts)

    def _parameters(self, name: str) -> int | None:
        """Of a module, also where it is there for single shapes alone."""
        rows = [row for key, row in self.modules.items() if key.rpartition("),")[2] == name]
        return next((row.parameters for row in rows if row.parameters is not None), None)


def table_of(config: ElasticBertConfig, outputs: int) -> CostTable:
    """The modules of an elastic model whose exits have that many outputs, as `cost.modules` counts them.

    Every count is a polynomial of degree 2 in the tokens: three values give it exactly.
    """
    config = ElasticBertConfig.from_dict({**config.to_dict(), "num_labels": outputs, "length_config": None})
    with torch.device("meta"):
        sizes = _parameters(ElasticBertForSequenceClassification(config), config.num_hidden_layers)
    counts = [{module.name: module.flops for module in cost.modules(config, tokens)} for tokens in (1, 2, 3)]
    width = config.hidden_size
    shapes = {"emb": "(n)", "exit": f"({width})"}
    modules = {
        name: ModuleCost(
            *_polynomial(*(count[name] for count in counts)),
            shapes.get(name.partition("_")[0], f"(n,{width})"),
            sizes.get(name, 0),
        )
        for name in counts[0]
    }
    for layer in range(1, config.num_hidden_layers + 1):
        modules[f"layer_{layer}"] = _both(modules[f"attention_{layer}"], modules[f"ffn_{layer}"])
    return CostTable(modules)


def _polynomial(one: int, two: int, three: int) -> tuple[int, int, int]:
    squared = (three - 2 * two + one) // 2
    linear = two - one - 3 * squared
    return one - linear - squared, linear, squared


def _both(first: ModuleCost, second: ModuleCost) -> ModuleCost:
    return ModuleCost(
        first.flops + second.flops,
        first.flops_per_token + second.flops_per_token,
        first.flops_per_token_squared + second.flops_per_token_squared,
        first.input,
        (first.parameters or 0) + (second.parameters or 0),
    )


def _parameters(model: torch.nn.Module, last: int) -> dict[str, int]:
    """Parameters by module; what belongs to no layer and no exit is `emb`'s."""
    sizes: dict[str, int] = {}
    patterns = {
        r"encoder\.layer\.(\d+)\.attention\.": "attention",
        r"encoder\.layer\.(\d+)\.": "ffn",
        r"(?:encoder\.pooler|classifiers)\.(\d+)\.": "exit",
    }
    for name, parameter in model.named_parameters():
        found = next(((kind, hit) for pattern, kind in patterns.items() if (hit := re.search(pattern, name))), None)
        module = f"{found[0]}_{int(found[1][1]) + 1}" if found else "emb"
        module = f"exit_{last}" if name.startswith("classifier.") else module  # the lone exit of static use
        sizes[module] = sizes.get(module, 0) + parameter.numel()
    return sizes


def write_table(table: CostTable, file: Path) -> None:
    """The table as TSV."""
    lines = ["\t".join(COLUMNS)]
    for name, one in table.modules.items():
        numbers = (one.flops, one.flops_per_token, one.flops_per_token_squared, one.parameters)
        lines.append("\t".join([name, one.input or "", *("" if value is None else str(value) for value in numbers)]))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_costs(path: Path, kind: Answers, trust_model_code: bool = False) -> "Costs":
    """The costs of a task's modules, from a model file of any kind.

    path: a table (.tsv or .json), the config.json of a model (BERT, RoBERTa, DistilBERT or ours), a folder with a
    config.json or with TASK.tsv, TASK.json a task, or, where its code is trusted, a model.py. ValueError says what is
    wrong with it.
    """
    if path.is_dir():
        own = [spelled(path, kind.task, suffix) for suffix in (".tsv", ".json", "")]
        files = (*own[:2], own[2] / MODULES_FILE, path / MODULES_FILE, path / "config.json")
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            names = ", ".join(str(file.relative_to(path)) for file in files)
            raise ValueError(f"model folder {path} has none of {names}")
        path = found
    if not path.is_file():
        raise ValueError(f"model file {path} does not exist; give a table of module costs or a config.json")
    if path.suffix == ".py":
        if not trust_model_code:
            raise ValueError(f"model file {path} is Python code; to have it run, give --trust-model-code")
        return CodeCosts(path)
    if path.suffix == ".tsv":
        return _read_tsv(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except ValueError as error:  # of JSON, of its encoding, or a name that is there twice
        raise ValueError(f"model file {path} is not JSON ({error}); tables are .tsv or .json") from error
    if not isinstance(content, dict):
        raise ValueError(f"model file {path}: expected an object of modules, got a {type(content).__name__}")
    if "model_type" in content:
        return table_of(_config_of(content, path), kind.outputs)
    modules = content.get("modules", content)
    if not isinstance(modules, dict) or not modules:
        raise ValueError(f"model file {path}: expected modules with their costs, got {str(modules)[:60]!r}")
    rows = [(_plain(name), _module(name, value, str(path))) for name, value in modules.items()]
    try:
        return CostTable(_once(rows))
    except ValueError as error:
        raise ValueError(f"model file {path}: {error}") from None


def _config_of(content: dict[str, Any], path: Path) -> ElasticBertConfig:
    known = ("elasticbert", "bert", "roberta", "distilbert")
    if content["model_type"] not in known:
        raise ValueError(
            f"model file {path}: costs are derived for {', '.join(known)}, not for {content['model_type']!r}; "
            "write a table of module costs"
        )
    try:
        fields = content if content["model_type"] == "elasticbert" else elastic_config(content)
        return ElasticBertConfig.from_dict(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model file {path} is no configuration ({type(error).__name__}: {error})") from error


def _read_tsv(path: Path) -> CostTable:
    try:
        text = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"model file {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = [(number, line.split("\t")) for number, line in enumerate(text, start=1) if line.strip()]
    header = [cell.strip() for cell in lines[0][1]] if lines else []
    unknown = [name for name in header if name not in COLUMNS]
    if "module" not in header or unknown or len(set(header)) < len(header):
        raise ValueError(
            f"model file {path}, line 1: its columns must be module and some of {', '.join(COLUMNS[1:])}, each once, "
            f"got {', '.join(header) or 'nothing'}"
        )
    modules: dict[str, ModuleCost] = {}
    for number, cells in lines[1:]:
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()}
        name = _plain(row.pop("module", ""))
        if not name or len(cells) > len(header):
            raise ValueError(f"model file {path}, line {number}: expected {len(header)} cells and a module's name")
        if name in modules:
            raise ValueError(f"model file {path}, line {number}: module {name!r} is there twice")
        modules[name] = _module(name, row, f"{path}, line {number}")
    return CostTable(modules)


def _plain(name: str) -> str:
    """The name of a row, without the spaces that one of a single shape may be written with."""
    return re.sub(r"\s+", "", name) if name.startswith("(") else name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a name is there twice, of which one would be left out."""
    found = dict(pairs)
    twice = next((name for name, _ in pairs if [one for one, _ in pairs].count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is there twice")
    return found


def _module(name: str, value: Any, where: str) -> ModuleCost:
    """A row of a table; a bare number is FLOPs whatever the shape."""
    fields = value if isinstance(value, dict) else {"flops": value}
    allowed = COLUMNS[1:]
    unknown = [key for key in fields if key not in allowed]
    if unknown:
        raise ValueError(f"model file {where}: module {name!r} has {unknown[0]!r}; allowed: {', '.join(allowed)}")
    shape = fields.get("input")
    if shape is not None and not SHAPE.fullmatch(str(shape)):
        raise ValueError(f"model file {where}: module {name!r} has the input {shape!r}; write it as (n,768)")
    numbers = {key: _count(fields[key], name, key, where) for key in allowed[1:] if fields.get(key) is not None}
    if not any(key.startswith("flops") for key in numbers):
        raise ValueError(f"model file {where}: module {name!r} has no cost; give one of {', '.join(allowed[1:4])}")
    return ModuleCost(input=shape, **numbers)


def _count(value: Any, name: str, key: str, where: str) -> int:
    try:
        number = float(value) if not isinstance(value, bool) else -1.0
        if number >= 0 and number.is_integer():
            return int(value) if isinstance(value, str) and value.isdecimal() else int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"model file {where}: {key} of module {name!r} must be a whole number from 0, got {value!r}")


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """As where Python runs a file of the folder; what is imported from there is forgotten, since other folders have
    modules of the same names."""
    before, paths = set(sys.modules), sys.path[:]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in set(sys.modules) - before:
            file = Path(getattr(sys.modules[name], "__file__", None) or "/")
            installed = {"site-packages", "dist-packages"} & set(file.parts)  # an environment below the folder
            if file.resolve().is_relative_to(folder) and not installed:
                del sys.modules[name]


class CodeCosts:
    """The costs of somebody's `module_list` in a model.py, {name: module} or (name, module) pairs, which is run.

    FLOPs are what `torch.utils.flop_counter` counts on an input of the shape that the row states.
    """

    def __init__(self, path: Path):
        spec = importlib.util.spec_from_file_location("elue_model", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"model file {path} cannot be read as Python")
        code = importlib.util.module_from_spec(spec)
        self.folder = path.resolve().parent
        try:
            with _importing_from(self.folder):
                sys.modules[spec.name] = code
                spec.loader.exec_module(code)
            listed = code.module_list
            pairs = listed.items() if hasattr(listed, "items") else listed  # a dict or a ModuleDict
            self.modules: dict[str, torch.nn.Module] = _once(list(pairs))
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"model file {path}: it must define module_list, pairs of a name and a torch module; running it gave "
                f"{type(error).__name__}: {error}"
            ) from error
        self.counted: dict[Step, int] = {}

    def flops(self, step: Step) -> int:
        """As `CostTable.flops`."""
        if step.name not in self.modules:
            raise ValueError(f"module {step.name!r} is unknown; module_list has: {', '.join(self.modules)}")
        if step not in self.counted:
            try:
                with _importing_from(self.folder):  # a module may import where it runs
                    self.counted[step] = _counted(self.modules[step.name], step.shape)
            except Exception as error:
                raise ValueError(f"module {step}: it does not run on that shape ({error})") from error
        return self.counted[step]

    def parameters(self, names: Iterable[str]) -> int | None:
        """As `CostTable.parameters`; tied parameters once."""
        modules = torch.nn.ModuleList(self.modules[name] for name in dict.fromkeys(names))
        return sum(parameter.numel() for parameter in modules.parameters())


Costs = CostTable | CodeCosts


def _counted(module: torch.nn.Module, shape: tuple[int, ...]) -> int:
    # a row's ids have one size; a layer may have an embedding of its own, of relative positions say
    reads_ids = len(shape) == 1 and any(isinstance(part, torch.nn.Embedding) for part in module.modules())
    inputs = torch.zeros(1, *shape, dtype=torch.long if reads_ids else torch.float32)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter sees neither fused layers nor fused attention
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module.eval()(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()
