"""Options of a command: a dataclass, filled from a YAML recipe (a list of flags) and from the command line."""

import argparse
import dataclasses
import difflib
import importlib
import json
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from elastic_model.folders import PACKAGES, shipped
from elastic_model.jobs import INTERRUPTED

Options = TypeVar("Options")

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping (JSON)"}


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake as a ValueError: one line, the same as for a mistake in a recipe."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def option(
    default: Any = dataclasses.MISSING, *, help: str, positional: bool = False, aliases: tuple[str, ...] = ()
) -> Any:
    """A dataclass field with its help text; without a default it is required, a mutable default is copied.

    aliases: other names of its flag, such as one that is a word of Python.
    """
    metadata = {"help": help, "positional": positional, "aliases": aliases}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(options: type[Options], argv: list[str] | None = None, *, prog: str | None = None) -> Options:
    """An instance of the dataclass `options`: its defaults <- the YAML file of `--config` <- the flags in `argv`.

    Field types: str, int, float, bool, Path, dict, Literal, `list[...]` of these and `... | None` (written none).
    An unknown key, a missing one or a value of the wrong type is a ValueError of one line.
    """
    hints = typing.get_type_hints(options)
    given = vars(_parser(options, hints, prog).parse_intermixed_args(sys.argv[1:] if argv is None else argv))
    recipe = given.pop("config", None)
    raw = _read_recipe(Path(recipe), hints) if recipe else {}
    values = {name: _convert(hints[name], value, f"{recipe}: {name}") for name, value in raw.items()}
    values |= {name: _convert(hints[name], value, _flag(name)) for name, value in given.items()}
    missing = [field.name for field in dataclasses.fields(options) if _required(field) and field.name not in values]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{_flag(missing[0])} is required; see --help")
    return options(**values)


def from_mapping(options: type[Options], given: dict[str, Any], where: str) -> Options:
    """An instance of the dataclass `options` from a mapping of its fields, as YAML or JSON has it; errors call it
    `where`."""
    hints = typing.get_type_hints(options)
    given = _names(given, hints, where)
    values = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in given.items()}
    try:
        return options(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_at_least(least: int, options: Any, *names: str) -> None:
    """ValueError for the first of these options that is given and below `least`."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def to_yaml(options: Any) -> str:
    """The dataclass instance as a recipe that `parse` reads back."""
    plain = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return yaml.safe_dump(plain, sort_keys=False)


def dispatch(commands: dict[str, tuple[type[Any], str, str]], argv: list[str], prog: str) -> int:
    """Run the command that `argv` names, "" where it names none: {name: its options, the module and the function that
    runs it}; parsed before that module is imported."""
    name = argv[0] if argv and argv[0] in commands else ""
    options, module, function = commands[name]
    parsed = parse(options, argv[1:] if name else argv, prog=f"{prog} {name}".rstrip())
    return int(getattr(importlib.import_module(module), function)(parsed) or 0)


class _Terminated(BaseException):
    """SIGTERM has come."""


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM becomes an exception, as Ctrl-C is one: files half written are removed, and locks released."""

    def end(*_: Any) -> None:
        if os.getpid() != owner:  # a process forked from this one ends as it would have
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise _Terminated

    owner = os.getpid()
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(command: Callable[[], int | None]) -> int:
    """The exit code of `command()`; bad input (ValueError, OSError, a configuration that fails its own checks) becomes
    one line on stderr and code 2. SIGTERM ends it where it is (a training run saves first) with code 143.

    ELASTIC_MODEL_TRACEBACK=1 shows the whole traceback instead.
    """
    try:
        with _ending_on_sigterm():
            code = command() or 0
        sys.stdout.flush()
        return code
    except _Terminated:
        print("error: stopped by SIGTERM; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads the output, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        return 141  # 128 + SIGPIPE
    except Exception as error:
        if os.environ.get("ELASTIC_MODEL_TRACEBACK") == "1" or not _is_bad_input(error):
            raise
        missing = isinstance(error, ModuleNotFoundError)
        hint = '; install what the commands need: pip install "elastic-model[train,export]"' if missing else ""
        print(f"error: {_one_line(error)}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _is_bad_input(error: Exception) -> bool:
    from huggingface_hub.errors import StrictDataclassError  # here: --help must not wait for it

    if isinstance(error, ModuleNotFoundError):  # a package of an extra; one of ours would be a fault of ours
        return (error.name or "").split(".")[0] not in PACKAGES
    return isinstance(error, ValueError | OSError | StrictDataclassError)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        target = f" -> {error.filename2}" if error.filename2 else ""  # of a copy: the disk that is full is this one's
        return f"{error.filename}{target}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _parser(options: type[Any], hints: dict[str, Any], prog: str | None) -> Parser:
    summary = (options.__doc__ or "").split("\n\n")[0]
    parser = Parser(prog=prog, description=summary, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML recipe: a list of these flags; flags given here win")
    for field in dataclasses.fields(options):
        _add_flag(parser, field, hints[field.name])
    return parser


def _add_flag(parser: Parser, field: dataclasses.Field[Any], hint: Any) -> None:
    kind = _without_none(hint)
    text = field.metadata.get("help", "").replace("%", "%%") + _default_text(field)
    if field.metadata.get("positional"):  # or by its flag, as any other
        parser.add_argument(field.name, nargs="?", metavar=field.name.upper(), help=text)
    called = [*field.metadata.get("aliases", ()), field.name]
    names = list(dict.fromkeys(form for name in called for form in (_flag(name), "--" + name)))  # --a-b and --a_b
    arguments: dict[str, Any] = {"dest": field.name, "help": text, "metavar": _metavar(kind)}
    if typing.get_origin(kind) is list:
        arguments["nargs"] = "*"
    elif kind is bool:
        arguments |= {"nargs": "?", "const": "true"}
    parser.add_argument(*names, **arguments)


def _default_text(field: dataclasses.Field[Any]) -> str:
    if _required(field):
        return " (required)"
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default is None or default == [] or default == {}:
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f" (default: {shown})".replace("%", "%%")


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return _metavar(typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return {str: "TEXT", int: "N", float: "X", bool: "true|false", dict: "JSON"}.get(kind, "PATH")


def _read_recipe(file: Path, hints: dict[str, Any]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(shipped(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a YAML file: {error}") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{file}: a recipe is a mapping of flags (batch_size: 64), got a {type(content).__name__}")
    return _names(content or {}, hints, str(file))


def _names(mapping: dict[Any, Any], hints: dict[str, Any], where: str) -> dict[str, Any]:
    """The mapping by the names of the fields, which may be written as flags are; ValueError for one that is none."""
    given = {str(name).replace("-", "_"): value for name, value in mapping.items()}
    for name in given:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            guess = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"{where}: unknown key {name!r} (value {given[name]!r}); {guess}allowed: {', '.join(hints)}"
            )
    return given


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _convert(hint: Any, value: Any, name: str) -> Any:
    """The value of one option from a flag's text or a recipe's YAML value; `name` is what an error calls it."""
    kind = _without_none(hint)
    if value is None or isinstance(value, str) and value.lower() in ("none", "null"):
        if kind is not hint:
            return None
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [_convert(typing.get_args(kind)[0], item, name) for item in items]
    if typing.get_origin(kind) is Literal:
        return _choice(typing.get_args(kind), value, name)
    try:
        return _scalar(kind, value)
    except (ValueError, TypeError, KeyError):
        allowed = KINDS.get(kind, "text") + ("" if kind is hint else " or none")
        raise ValueError(f"{name}: expected {allowed}, got {value!r}") from None


def _choice(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    for choice in choices:
        meant = isinstance(value, bool) and BOOLEANS.get(str(choice).lower()) is value  # YAML reads no as false
        if meant or str(value) == str(choice):
            return choice
    raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def _scalar(kind: Any, value: Any) -> Any:
    if kind is dict:
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise TypeError
        return value
    if isinstance(value, list | dict | None) or isinstance(value, bool) and kind is not bool:
        raise TypeError
    if kind is bool:
        return BOOLEANS[str(value).lower()]
    if kind is int and isinstance(value, float):
        raise TypeError
    return kind(str(value))  # PyYAML reads 1e-3 as text and 3 for a float field as int: both go through str
