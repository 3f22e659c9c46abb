"""What a caller may ask for: length configurations, layer configurations and exit policies, checked in plain
Python."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

# name -> the settings it needs and the ones it may have; every threshold is a number or one number per exit
POLICY_SETTINGS: dict[str, tuple[set[str], set[str]]] = {
    "never": (set(), set()),
    "constant": ({"layer"}, set()),
    "entropy": ({"threshold"}, set()),
    "confidence": ({"threshold"}, set()),
    "margin": ({"threshold"}, set()),
    "learned": ({"threshold"}, set()),
    "patience": ({"patience"}, {"threshold"}),
    "voting": ({"votes"}, set()),
}
REGRESSION_POLICIES = ("never", "constant", "patience", "learned")


# a share per layer, or {"mass": [...]} where rows choose themselves
LengthConfig = list[float] | dict[str, list[float]]


@dataclass(frozen=True)
class Mass:
    """What a layer keeps where rows choose themselves: the fewest tokens that received this share of the attention."""

    share: float


def warn_of_other_texts(trained_on_pairs: bool | None, given_pairs: bool) -> None:
    """A warning where a model trained on pairs of texts is given single ones, or the other way round; None: unknown.
    It answers them all the same, but what it learned to compare, or to read, is not there."""
    if trained_on_pairs is None or trained_on_pairs == given_pairs:
        return
    warnings.warn(
        "the model was trained on pairs of texts, these are single ones: its answers mean little; give both texts, in "
        "a table with --pair, the column of the second, in Python as (first, second)"
        if trained_on_pairs
        else "the model was trained on single texts, these are pairs: its answers mean little; give one text a row",
        stacklevel=3,
    )


def check_length_config(length_config, layers: int) -> list[float] | list[int] | list[Mass | float] | None:
    """The length configuration as a list, one entry per layer, or None where nothing is dropped.

    An entry says what remains after that layer's attention (Kim and Cho 2021): a float in (0, 1] is a
    share of the row's own real tokens, an int is that many tokens, at least 2. {"mass": [...]}: each row keeps as many
    as its own significance scores ask for, see `length_drop.tokens_to_cover`. Raises ValueError for anything else,
    and where shares or tokens rise.
    """
    if length_config is None or (isinstance(length_config, float) and length_config == 1.0):
        return None
    if isinstance(length_config, Mapping):
        return _check_mass(length_config, layers)
    if not isinstance(length_config, Sequence) or isinstance(length_config, str):
        raise ValueError(
            f"length_config must be a list with one entry per layer, a mass, 1.0 or None, got {length_config!r}."
        )
    lengths = list(length_config)
    if len(lengths) != layers:
        raise ValueError(
            f"length_config must have one entry per layer, {layers} in all, got {len(lengths)}: {lengths}."
        )
    if all(_is_integer(length) for length in lengths):
        if min(lengths) < 2:
            raise ValueError(
                f"length_config in tokens must be at least 2 everywhere (1.0 is the share), got {lengths}."
            )
        lengths = [int(length) for length in lengths]
    elif all(isinstance(length, Real) and not isinstance(length, Integral) for length in lengths):
        if not all(0.0 < length <= 1.0 for length in lengths):
            raise ValueError(f"length_config in shares must lie in (0, 1], got {lengths}.")
        lengths = [float(length) for length in lengths]
    else:
        raise ValueError(f"length_config must be all floats (shares) or all ints (tokens), got {lengths}.")
    if any(after > before for before, after in zip(lengths, lengths[1:], strict=False)):
        raise ValueError(f"length_config must not rise from layer to layer, got {lengths}.")
    return None if all(length == 1.0 for length in lengths) else lengths


def _check_mass(length_config: Mapping, layers: int) -> list[Mass | float] | None:
    given = length_config.get("mass") if set(length_config) == {"mass"} else None
    given = given if isinstance(given, Sequence) else []
    shares = [float(share) for share in given if isinstance(share, Real)]
    if len(shares) != layers or len(given) != layers or not all(0.0 < share <= 1.0 for share in shares):
        raise ValueError(
            f'length_config of rows that choose themselves must be {{"mass": [...]}}, {layers} shares in (0, 1], '
            f"got {length_config!r}."
        )
    return None if all(share == 1.0 for share in shares) else [1.0 if one == 1.0 else Mass(one) for one in shares]


def shares_and_mass(length_config, layers: int) -> tuple[list[float], list[float]]:
    """What an exported graph takes: a share of its tokens and a share of its significance per layer, 1 = all. Raises
    ValueError as `check_length_config` does, and for lengths in tokens, which are another share of every text."""
    lengths = check_length_config(length_config, layers) or [1.0] * layers
    if any(isinstance(length, int) for length in lengths):
        raise ValueError(f"a graph takes shares of each text or a mass, not tokens, got length_config {length_config}")
    shares = [1.0 if isinstance(length, Mass) else float(length) for length in lengths]
    return shares, [length.share if isinstance(length, Mass) else 1.0 for length in lengths]


def check_layer_config(layer_config, layers: int) -> list[int]:
    """The layers to execute, 1-based and rising; None means all. Raises ValueError for anything else."""
    if layer_config is None:
        return list(range(1, layers + 1))
    return _rising_layers("layer_config", layer_config, layers)


def check_exit_layers(exit_layers, layers: int) -> list[int]:
    """Exit layers: 1-based, rising, ending at the last layer. Raises ValueError for anything else."""
    exit_layers = _rising_layers("exit_layers", exit_layers, layers)
    if exit_layers[-1] != layers:
        raise ValueError(
            f"exit_layers must rise within 1..{layers} and end at {layers} (the full model), got {exit_layers}."
        )
    return exit_layers


def check_exit_policy(policy, exits: int, problem_type: str | None = None) -> dict | None:
    """The exit policy as a dict, or None where every row goes to the top.

    Raises ValueError for an unknown name or setting, a threshold out of range, a list that does not have one entry
    per exit, and (where `problem_type` is given) a policy or a threshold that makes no sense for the task.
    """
    if policy is None:
        return None
    name = policy.get("name") if isinstance(policy, dict) else None
    if name not in POLICY_SETTINGS:
        raise ValueError(
            f"exit_policy must be a dict whose name is one of {', '.join(POLICY_SETTINGS)}, got {policy!r}."
        )
    needed, allowed = POLICY_SETTINGS[name]
    given = set(policy) - {"name"}
    if not needed <= given <= needed | allowed:
        raise ValueError(
            f"exit_policy {name!r} needs {sorted(needed) or 'no settings'}"
            f"{f' and may have {sorted(allowed)}' if allowed else ''}, got {sorted(given)}."
        )
    for setting in given & {"patience", "votes", "layer"}:
        if not _is_integer(policy[setting]) or policy[setting] < 1:
            raise ValueError(f"exit_policy {name!r}: {setting} must be an int of at least 1, got {policy[setting]!r}.")
    if "threshold" in given:
        _check_thresholds(policy, exits)
    if problem_type is not None:
        _check_policy_fits(policy, problem_type)
    return None if name == "never" else policy


def policy_kind(policy: Mapping) -> tuple:
    """What of a policy is built into an exported file, and shared by the points of a table: its name, and the steps
    that a regression's patience counts beside its thresholds."""
    return policy.get("name"), policy.get("patience") if "threshold" in policy else None


def thresholds_of(policy: dict, exits: int) -> list[float]:
    """One threshold per exit (the last is never asked), from a scalar or a list."""
    threshold = policy["threshold"]
    return [float(value) for value in threshold] if isinstance(threshold, Sequence) else [float(threshold)] * exits


def _check_thresholds(policy: dict, exits: int) -> None:
    threshold = policy["threshold"]
    values = list(threshold) if isinstance(threshold, Sequence) and not isinstance(threshold, str) else [threshold]
    if isinstance(threshold, Sequence) and len(values) != exits:
        raise ValueError(
            f"exit_policy threshold must be a number or have one entry per exit, {exits}, got {threshold!r}."
        )
    highest = math.inf if policy["name"] == "patience" else 1.0
    for value in values:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        if not 0.0 <= number <= highest or math.isinf(number):
            limits = "of at least 0" if policy["name"] == "patience" else "from 0 to 1"
            raise ValueError(
                f"exit_policy {policy['name']!r}: threshold must be a number {limits} or a list of them, one per "
                f"exit, got {threshold!r}."
            )


def _check_policy_fits(policy: dict, problem_type: str) -> None:
    name = policy["name"]
    if problem_type == "regression":
        if name not in REGRESSION_POLICIES:
            raise ValueError(
                f"exit_policy for regression must be one of {', '.join(REGRESSION_POLICIES)}, got {name!r}."
            )
        if name == "patience" and "threshold" not in policy:
            raise ValueError(
                f"exit_policy 'patience' for regression needs a threshold (|y_i - y_(i-1)| < threshold), got {policy}."
            )
    elif name == "patience" and "threshold" in policy:
        raise ValueError(
            f"exit_policy 'patience' has a threshold for regression only, not for {problem_type}, got {policy}."
        )


def _rising_layers(what: str, value, layers: int) -> list[int]:
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if (
        not numbers
        or not all(_is_integer(number) and 1 <= number <= layers for number in numbers)
        or any(after <= before for before, after in zip(numbers, numbers[1:], strict=False))
    ):
        raise ValueError(f"{what} must be a rising list of layers within 1..{layers}, got {value!r}.")
    return [int(number) for number in numbers]


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
