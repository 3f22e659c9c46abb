"""The leaderboard as one HTML file: tables that sort and plots of quality over FLOPs; no network, no library."""

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).parent / "page.html"
WIDTH, HEIGHT = 460, 300  # of a plot, in pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40  # around its axes
# Okabe and Ito's colours, which colour-blind readers tell apart, then the same dashed
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")

Series = Sequence[tuple[str, float, float, bool]]  # points: name, FLOPs, quality in percent, on the front
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, head, rows


def page(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    tables: Sequence[Table],
    curves: Mapping[str, Mapping[str, Series]],
    notes: Sequence[str],
) -> str:
    """The page: the table of scores, a plot a task, the published tables."""
    names = list(dict.fromkeys(name for series in curves.values() for name in series))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        scores=_table("scores", head, rows),
        legend=_legend(names),
        plots="\n".join(_figure(task, series, names) for task, series in curves.items()),
        published="\n".join(
            f"<h3>{escape(title)}</h3>\n{_table(f'published-{number}', head, rows)}"
            for number, (title, head, rows) in enumerate(tables, start=1)
        ),
    )


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Heads are buttons: the script of the page sorts by them, and a link with #sort=TABLE,COLUMN,desc does. Columns
    without a number are set as text."""
    text = [not any(cell[:1].isdigit() or cell[:1] == "-" for cell in column) for column in zip(*rows, strict=True)]
    classes = [' class="text"' if one else "" for one in text or [True] * len(head)]
    heads = "".join(
        f'<th scope="col"{one}><button type="button">{escape(cell)}</button></th>'
        for one, cell in zip(classes, head, strict=True)
    )
    lines = ["".join(f"<td{one}>{escape(cell)}</td>" for one, cell in zip(classes, row, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table id="{name}">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _colour(name: str, names: list[str]) -> str:
    return f'stroke="{COLOURS[names.index(name) % len(COLOURS)]}"'


def _style(name: str, names: list[str]) -> str:
    dashes = ' stroke-dasharray="5 3"' if names.index(name) >= len(COLOURS) else ""
    return _colour(name, names) + dashes


def _legend(names: list[str]) -> str:
    lines = [
        f'<li><svg width="26" height="10"><line x1="0" y1="5" x2="26" y2="5" stroke-width="2" {_style(name, names)}/>'
        f"</svg> {escape(name)}</li>"
        for name in names
    ]
    return "\n".join(lines)


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between the ends."""
    raw = (high - low) / 5
    size = 10 ** floor(log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw)
    first = int(low / step) + (low > int(low / step) * step)
    return [number * step for number in range(first, int(high / step) + 1)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _figure(task: str, curves: Mapping[str, Series], names: list[str]) -> str:
    points = [point for series in curves.values() for point in series]
    mega = [(name, flops / 1e6, quality) for name, flops, quality, _ in points]
    (left, right), (low, high) = _ends([x for _, x, _ in mega]), _ends([y for _, _, y in mega])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for tick in _ticks(left, right):
        x, _ = at(tick, low)
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(low, high):
        _, y = at(left, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for name, series in curves.items():
        front = [at(flops / 1e6, quality) for _, flops, quality, on_front in series if on_front]
        line = " ".join(f"{x},{y}" for x, y in front)
        style = _style(name, names)
        parts.append(f'<polyline class="front" points="{line}" {style}/>')
        for point, flops, quality, on_front in series:
            x, y = at(flops / 1e6, quality)
            title = f"{name}, {point}: {flops / 1e6:.4g} MFLOPs, {quality:.2f}"
            kind = "on-front" if on_front else "point"
            circle = f'<circle class="{kind}" cx="{x}" cy="{y}" r="3" {_colour(name, names)}>'
            parts.append(f"{circle}<title>{escape(title)}</title></circle>")
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">MFLOPs a row</text>')
    caption = f"<figcaption>{escape(task)}: quality in percent over cost; lines are Pareto fronts</figcaption>"
    drawing = "\n".join(parts)
    return f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n{drawing}\n</svg>{caption}</figure>'
