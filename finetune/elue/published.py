"""What the paper's slides print, to stand beside a run (see data/SOURCE.md), and where a split is not ELUE's own."""

from functools import lru_cache
from pathlib import Path

from finetune.elue.tasks import ELUE_TASKS

DATA = Path(__file__).parent / "data"
SOURCE = "slides of Liu et al. 2022 (arXiv 2110.07038)"
TABLES = {
    "leaderboard": "ELUE leaderboard, scores against ElasticBERT-base",
    "scores": "ELUE scores of static and dynamic models against ElasticBERT-base",
    "glue": "GLUE, 6L and 12L: the first layers alone",
}


@lru_cache
def published(table: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of one of the slides' tables, as they are printed."""
    head, *rows = (DATA / f"{table}.tsv").read_text(encoding="utf-8").splitlines()
    return head.split("\t"), [row.split("\t") for row in rows]


def elue_test_rows(task: str) -> int:
    """Rows of ELUE's own test split of a task."""
    head, rows = published("sizes")
    return next(int(row[head.index("test")]) for row in rows if row[head.index("dataset")] == ELUE_TASKS[task])


def split_warnings(rows: dict[str, int]) -> list[str]:
    """A line for each task whose test split, with so many rows, is not ELUE's own."""
    lines = []
    for task, count in rows.items():
        own = elue_test_rows(task)
        if count != own:
            lines.append(
                f"warning: {ELUE_TASKS[task]} is scored on {count:,} test rows, ELUE's own split has {own:,}: "
                "published scores do not compare"
            )
    return lines
