"""A pipeline as a string of operators, each letter once, in an order that means something."""

OPERATORS = {
    "D": "distillation into fewer layers",
    "P": "pruning of heads and FFN neurons, then distillation from the unpruned model",
    "E": "an exit after every layer",
    "S": "LengthDrop, at a searched length configuration",
    "L": "batches padded to their longest row only",
    "Q": "int8",
}
TRAINED = "DPE"  # operators that make another model; the others change how the finished one runs
NOTHING = "O"  # the pipeline of no operators


def parse(text: str) -> str:
    """The operators of a pipeline in the order they are carried out; O is the empty string.

    S, L and Q are put in this order: L changes no weights, and Q is the file of what S leaves. ValueError that says
    why for a string that is no pipeline (Xin et al. 2022, section 5.1).
    """
    letters = text.strip().upper()
    allowed = f"{', '.join(OPERATORS)}, or {NOTHING} alone"
    if not letters:
        raise ValueError(f"the pipeline is empty; its letters are {allowed}")
    if letters == NOTHING:
        return ""
    for place, letter in enumerate(letters):
        before = letters[:place]
        if letter == NOTHING:
            raise ValueError(f"pipeline {text}: {NOTHING} is the pipeline of no operators and stands alone")
        if letter not in OPERATORS:
            raise ValueError(f"pipeline {text}: {letter!r} is no operator; the letters are {allowed}")
        if letter in before:
            raise ValueError(f"pipeline {text}: {letter} stands twice; each operator is applied once")
        late = [one for one in before if one not in TRAINED]
        if letter in TRAINED and late:
            raise ValueError(
                f"pipeline {text}: {letter} after {late[0]}: S, L and Q say how the finished model runs, so D, P and "
                "E come before them"
            )
        if letter == "D" and "P" in before:
            raise ValueError(
                f"pipeline {text}: D after P: the student is a model of its own, and what P removed from its teacher "
                "would be without effect; put D before P"
            )
        if letter == "S" and "Q" in before:
            raise ValueError(f"pipeline {text}: S after Q: S trains the model, and an int8 file cannot be trained")
    return "".join(one for one in letters if one in TRAINED) + "".join(one for one in "SLQ" if one in letters)


def name_of(letters: str) -> str:
    """What a pipeline is called: its letters, or O."""
    return letters or NOTHING


def prefixes(letters: str) -> list[str]:
    """The pipelines that are met on the way, from the empty one to all of it."""
    return [letters[:count] for count in range(len(letters) + 1)]


def checkpoint_of(letters: str) -> str:
    """The stage whose weights PyTorch runs in a pipeline: L has none of its own, Q is a file of another's."""
    return letters.replace("L", "").replace("Q", "")


def stage_of(letters: str) -> str:
    """The stage that a pipeline runs: L has none of its own."""
    return letters.replace("L", "")


def letters_of(name: str) -> str:
    """The letters of a pipeline by its name."""
    return "" if name == NOTHING else name
