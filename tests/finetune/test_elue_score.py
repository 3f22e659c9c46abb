"""The ELUE score, and `elue score` and `elue leaderboard` as a user runs them."""

import json
import random
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from threading import Thread
from types import SimpleNamespace

import pytest
from filelock import FileLock

from elastic_model.arguments import run
from finetune.__main__ import _command
from finetune.elue.config import SizeOptions
from finetune.elue.costs import ModuleCost
from finetune.elue.leaderboard import leaderboard_of, text, write_board
from finetune.elue.published import TABLES, published, split_warnings
from finetune.elue.results import is_made, make, publish, reference_of
from finetune.elue.scoring import (
    Point,
    Result,
    TaskResult,
    elue_score,
    macro_average,
    outside,
    read_reference,
    read_result,
    reference_quality,
    scores_by_size,
    size_class,
    write_result,
)
from finetune.elue.tasks import answers_to

REFERENCE = [Point("exit_1", 100.0, 60.0), Point("exit_2", 200.0, 80.0), Point("exit_3", 400.0, 82.0)]


SCORES = '{"format": 1, "name": "a", "tasks": {"sst2": {"metric": %s, "rows": %s, "seeds": %s}}}'
POINTS = '[[{"name": "one", "flops": 1, "quality": 2}]]'
ONE = f'{{"metric": "accuracy", "rows": 4, "seeds": {POINTS}}}'
TWICE = f'{{"format": 1, "name": "a", "tasks": {{"sst2": {ONE}, "SST-2": {ONE}}}}}'


def result_of(name, points, task="mrpc", rows=1725, seeds=1):
    return Result(name, {task: TaskResult(answers_to(task).metric, rows, [list(points)] * seeds)})


def test_the_score_is_the_mean_distance_from_the_reference():
    points = [Point("a", 150.0, 75.0), Point("b", 300.0, 80.0)]  # the reference has 70 and 81 there
    assert elue_score(points, REFERENCE) == pytest.approx((5.0 - 1.0) / 2)


def test_any_reference_against_itself_is_exactly_zero():
    draw = random.Random(0)
    for _ in range(50):
        curve = [Point(str(number), draw.uniform(1, 1e12), draw.uniform(-5, 100)) for number in range(12)]
        draw.shuffle(curve)
        assert elue_score(curve, curve) == 0.0


def test_several_seeds_of_a_policy_are_a_reference(tmp_path):
    """Their cheapest points, all rows at the first exit, cost the same: the curve was refused, without its file."""
    seeds = [[Point("a", 100.0, 60.0), Point("b", 200.0, 80.0)], [Point("a", 100.0, 63.0), Point("c", 150.0, 70.0)],
             [Point("a", 100.0, 61.0)]]  # fmt: skip
    result = Result("ours", {"mrpc": TaskResult("accuracy+f1", 1725, seeds)})
    write_result(result, tmp_path / "scores.json")
    reference = read_reference(tmp_path / "scores.json", {"mrpc": 1725})
    assert reference_quality(reference["mrpc"], 100.0) == pytest.approx((60 / 2 + 63 / 2 + 61) / 2)
    scores = [elue_score(points, reference["mrpc"]) for points in seeds]
    assert statistics.fmean(scores) == pytest.approx(0.0, abs=1e-12)
    (entry,) = leaderboard_of([result], reference, "ours").entries
    assert (entry.macro, entry.tasks["mrpc"].score, entry.tasks["mrpc"].deviation) == (0.0, 0.0, None)
    single = Result("bent", {"mrpc": TaskResult("accuracy+f1", 9, [[seeds[0][0], Point("b", 100.0, 61.0)]])})
    write_result(single, tmp_path / "scores.json")
    with pytest.raises(ValueError, match=r"reference .*scores.json, mrpc: the reference has two qualities at 100"):
        read_reference(tmp_path / "scores.json", {})


def test_the_ends_are_continued_flat():
    assert reference_quality(REFERENCE, 10.0) == 60.0
    assert reference_quality(REFERENCE, 1e9) == 82.0
    cheaper, dearer = Point("a", 10.0, 50.0), Point("b", 1e9, 90.0)
    assert elue_score([cheaper, dearer], REFERENCE) == pytest.approx((-10.0 + 8.0) / 2)
    assert outside([cheaper, *REFERENCE, dearer], REFERENCE) == 2


def test_a_reference_is_a_function_of_cost():
    with pytest.raises(ValueError, match="two qualities at 100 FLOPs"):
        elue_score(REFERENCE, [*REFERENCE, Point("other", 100.0, 61.0)])
    twice = [*REFERENCE, REFERENCE[0]]
    assert elue_score(REFERENCE, twice) == 0.0
    with pytest.raises(ValueError, match="the reference has no points"):
        elue_score(REFERENCE, [])


def test_points_must_be_numbers():
    with pytest.raises(ValueError, match="point 'a': flops must be finite"):
        Point("a", float("nan"), 50.0)


def test_size_classes():
    sizes = {39_000_000: 40, 40_000_000: 40, 40_000_001: 55, 66_000_000: 70, 109_500_000: 110, 335_000_000: None}
    assert {parameters: size_class(parameters) for parameters in sizes} == sizes
    assert size_class(None) is None
    points = [Point("a", 100.0, 61.0, 39_000_000), Point("b", 200.0, 83.0, 60_000_000), Point("c", 400.0, 90.0)]
    assert scores_by_size(points, REFERENCE) == {40: 1.0, 55: 1.0, 70: 2.0, 110: 2.0}


def test_the_macro_average_needs_every_task():
    assert macro_average({"sst2": 1.0, "mrpc": -2.0}, ["sst2", "mrpc"]) == -0.5
    assert macro_average({"sst2": 1.0}, ["sst2", "mrpc"]) is None


def test_seeds_are_averaged_point_by_point_and_their_spread_is_told():
    seeds = [[Point("a", 100.0, 61.0)], [Point("a", 100.0, 63.0)]]
    board = leaderboard_of([Result("two", {"mrpc": TaskResult("f1", 1725, seeds)})], {"mrpc": REFERENCE}, "ours")
    scored = board.entries[0].tasks["mrpc"]
    assert (scored.score, scored.seeds) == (2.0, 2)
    assert scored.deviation == pytest.approx(2**0.5)
    assert "2.00 (1.41)" in text(board)


def test_seeds_with_points_of_their_own_are_scored_each_by_its_points():
    """Points chosen on dev are other settings of each seed: their mean by name was between two of them, and a name
    that one seed has counted as much as one that all have."""
    seeds = [[Point("point_1", 100.0, 60.0), Point("point_2", 200.0, 80.0)], [Point("point_2", 150.0, 74.0)]]
    one = TaskResult("f1", 1725, seeds)
    board = leaderboard_of([Result("two", {"mrpc": one})], {"mrpc": REFERENCE}, "ours")
    scored = board.entries[0].tasks["mrpc"]
    assert scored.score == statistics.fmean(elue_score(points, REFERENCE) for points in seeds)
    assert [point.name for point in scored.points] == ["point_1 #1", "point_2 #2", "point_2 #1"]
    costs = [[replace(point, flops=100.0 * seed) for point in seeds[1]] for seed in (1, 2)]
    assert len(TaskResult("f1", 1725, costs).curves) == 2  # one name at two costs


def test_results_on_other_rows_are_not_put_side_by_side():
    with pytest.raises(ValueError, match="b has 100 test rows of mrpc, others have 1725: they do not compare"):
        leaderboard_of([result_of("a", REFERENCE), result_of("b", REFERENCE, rows=100)], {}, None)


def test_a_result_survives_its_file_and_serves_as_reference(tmp_path):
    result = result_of("ours", REFERENCE, seeds=3)
    write_result(result, tmp_path / "scores.json")
    assert read_result(tmp_path) == result
    assert read_reference(tmp_path / "scores.json", {"mrpc": 1725}) == {"mrpc": REFERENCE}
    with pytest.raises(ValueError, match="reference .* has 1725 test rows of mrpc, not 408: they do not compare"):
        read_reference(tmp_path / "scores.json", {"mrpc": 408})
    (tmp_path / "curve.tsv").write_text("task\tflops\tquality\nMRPC \t100\t60\nmrpc\t200\t80\n\n")
    curve = read_reference(tmp_path / "curve.tsv", {"mrpc": 408})["mrpc"]
    assert [(point.flops, point.quality) for point in curve] == [(100.0, 60.0), (200.0, 80.0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("curve.tsv", "task\tflops\tquality\nmrpc\t1\tnan\n", "line 2: expected task, flops, quality"),
        ("curve.tsv", "task\tflops\tquality\ncola\t1\t2\n", "line 2: .*'cola' is not a task of ELUE"),
        ("curve.tsv", "task\tflops\tquality\n", "has no rows"),
        ("curve.tsv", "flops\tquality\n", "line 1: its columns must be task, flops, quality"),
        ("scores.json", "{}", r"not the scores.json of a submission \(KeyError"),
        ("scores.json", '{"format": 2}', "its format is 2, this version reads 1"),
        ("scores.json", '{"format": 1, "name": null, "tasks": {}}', "its name, its note and .* must be text"),
        (
            "scores.json",
            '{"format": 1, "name": "a", "note": 5, "tasks": {}}',
            "its name, its note and .* must be text",
        ),
        ("scores.json", SCORES % ('"accuracy"', "4", "[]"), "seeds must be lists of points, at least one of each"),
        ("scores.json", SCORES % ('"accuracy"', "4", "[[]]"), "seeds must be lists of points, at least one of each"),
        ("scores.json", SCORES % ('"accuracy"', '"4"', POINTS), "rows must be a whole number above 0, got '4'"),
        ("scores.json", SCORES % ('"f1"', "4", POINTS), "the metric of sst2 is accuracy, not 'f1'"),
        ("scores.json", TWICE, "task sst2 is there twice"),
        ("curve.tsv", "task\tflops\tquality\nmrpc\t1\t2\nmrpc\t1\t3\n", "curve.tsv, mrpc: .* two qualities at 1"),
    ],
)
def test_a_bad_reference_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / name, {"sst2": 4})


def test_a_reference_in_another_encoding_is_named(tmp_path):
    (tmp_path / "curve.tsv").write_text("task\tflops\tquality\nmrpc\t1\t2\n", encoding="utf-16")
    with pytest.raises(ValueError, match="reference .*curve.tsv: not a readable tsv file in UTF-8"):
        read_reference(tmp_path / "curve.tsv", {})


def test_points_of_one_name_are_refused():
    """One of the two was left out of the score and of the curve, without a word."""
    with pytest.raises(ValueError, match="the points of a seed must have names of their own, got a, a"):
        TaskResult("accuracy", 9, [[Point("a", 1.0, 10.0), Point("a", 2.0, 20.0)]])


def test_a_reference_of_other_tasks_scores_nothing_and_says_so():
    with pytest.raises(ValueError, match="the reference has none of the tasks mrpc; it has sst2"):
        leaderboard_of([result_of("a", REFERENCE)], {"sst2": REFERENCE}, "other")


@pytest.mark.parametrize("parameters", ["5", -5, 0.5])
def test_parameters_are_counts(parameters):
    with pytest.raises(ValueError, match="parameters must be a whole number from 0"):
        Point("a", 1.0, 1.0, parameters)


def test_the_published_tables_are_complete():
    for table in TABLES:
        head, rows = published(table)
        assert rows and {len(row) for row in rows} == {len(head)}
    head, rows = published("leaderboard")
    scores = {row[0]: row[-1] for row in rows}
    assert (scores["ElasticBERT-patience"], scores["BERT-base"]) == ("-0.09", "-3.7")


def test_a_split_that_is_not_elues_own_is_told():
    assert split_warnings({"mrpc": 1725}) == []
    (line,) = split_warnings({"mrpc": 1725, "sst2": 1821})
    assert line.startswith("warning: SST-2 is scored on 1,821 test rows, ELUE's own split has 2,208")


@pytest.fixture
def submission(tmp_path):
    """Four rows of SST-2 and of STS-B, a point each with modules of a table, and their true labels."""
    files = {
        "submission/SST-2/one.tsv": [f"{row}\t{answer}\t(4),emb; (4,8),layer_1" for row, answer in enumerate("1100")],
        "submission/SST-2/two.tsv": [
            f"{row}\t{answer}\t(4),emb; (4,8),layer_1; (4,8),layer_2" for row, answer in enumerate("1101")
        ],
        "submission/stsb.tsv": [f"{row}\t{row + 0.5}\t(4),emb; (4,8),layer_1" for row in range(4)],
        "labels/sst2.tsv": ["index\tlabel", "0\tpositive", "1\t1", "2\tnegative", "3\t1"],
        "labels/stsb.tsv": ["index\tlabel", *(f"{row}\t{row}" for row in range(4))],
        "model.tsv": ["module\tflops\tparameters", "emb\t0\t100", "layer_1\t5\t10", "layer_2\t7\t10"],
    }
    for name, lines in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def score(folder, *flags):
    own = ["--submission", str(folder / "submission"), "--labels", str(folder / "labels")]
    return run(lambda: _command(["elue", "score", *own, "--model-file", str(folder / "model.tsv"), *flags]))


def test_one_file_and_its_labels(submission, capsys):
    """Labels without an index are in the order of the rows."""
    (submission / "true.tsv").write_text("label\npositive\npositive\nnegative\nnegative\n")
    one = submission / "SST-2.tsv"
    shutil.copy(submission / "submission" / "SST-2" / "one.tsv", one)
    flags = ["--submission", str(one), "--labels", str(submission / "true.tsv")]
    model = ["--model-file", str(submission / "model.tsv")]
    assert run(lambda: _command(["elue", "score", *flags, *model])) == 0
    row = r"SST-2 +SST-2.tsv +SST-2 +5e-06 +100.00 +front"
    assert re.search(row, capsys.readouterr().out)
    shutil.copy(submission / "model.tsv", submission / "modules.tsv")  # beside the file it is found
    assert run(lambda: _command(["elue", "score", *flags])) == 0
    assert re.search(row, capsys.readouterr().out)


def test_the_papers_spelling_is_taken_of_what_lies_beside_the_test_files(submission, capsys):
    assert score(submission) == 0
    expected = capsys.readouterr().out
    (submission / "labels" / "sst2.tsv").rename(submission / "labels" / "SST-2.tsv")
    (submission / "costs").mkdir()
    for table in ("SST-2.tsv", "STS-B.tsv"):
        shutil.copy(submission / "model.tsv", submission / "costs" / table)
    for place in ("SST-2/modules.tsv", "modules.tsv"):
        shutil.copy(submission / "model.tsv", submission / "submission" / place)
    own = ["--submission", str(submission / "submission"), "--labels", str(submission / "labels")]
    for model in ([], ["--model-file", str(submission / "costs")]):
        assert run(lambda model=model: _command(["elue", "score", *own, *model])) == 0
        assert capsys.readouterr().out == expected


def test_labels_in_both_spellings_are_refused(submission, capsys):
    shutil.copy(submission / "labels" / "sst2.tsv", submission / "labels" / "SST-2.tsv")
    assert score(submission) == 2
    assert re.search("SST-2.tsv and .*sst2.tsv are of the same task; leave one", capsys.readouterr().err)


def test_without_labels_and_data_the_remedy_is_named(submission, capsys, monkeypatch):
    monkeypatch.delenv("ELASTIC_MODEL_DATA", raising=False)
    flags = ["--submission", str(submission / "submission"), "--model-file", str(submission / "model.tsv")]
    assert run(lambda: _command(["elue", "score", *flags])) == 2
    assert (
        "the test labels of sst2 are not public; set ELASTIC_MODEL_DATA, or give --labels" in capsys.readouterr().err
    )


def test_score_and_leaderboard(submission, capsys):
    assert score(submission, "--name", "first", "--output", str(submission / "first")) == 0
    printed = capsys.readouterr().out
    assert "no reference was given" in printed and "ElasticBERT-patience" in printed and "warning: SST-2" in printed
    tasks = read_result(submission / "first").tasks
    assert [(one.flops, one.quality, one.parameters) for one in tasks["sst2"].points] == [(5, 75, 110), (12, 100, 120)]
    assert [(one.flops, one.quality) for one in tasks["stsb"].points] == [(5, pytest.approx(100))]

    own = str(submission / "first")
    assert score(submission, "--output", str(submission / "again"), "--reference", own, "--trust_model_code") == 0
    board = json.loads((submission / "again" / "leaderboard.json").read_text())
    (entry,) = board["entries"]
    assert (entry["name"], entry["macro"], entry["size_class"]) == ("submission", 0.0, 40)
    assert {task: one["score"] for task, one in entry["tasks"].items()} == {"sst2": 0.0, "stsb": 0.0}

    both = [own, str(submission / "again" / "scores.json")]
    flags = ["--results", *both, "--reference", own, "--output", str(submission / "board")]
    assert run(lambda: _command(["elue", "leaderboard", *flags])) == 0
    board = json.loads((submission / "board" / "leaderboard.json").read_text())
    assert [entry["macro"] for entry in board["entries"]] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.tsv", None, "model.tsv does not exist"),
        ("labels/sst2.tsv", None, "sst2.tsv: No such file"),
        ("labels/stsb.tsv", "label\n1\nnan\n2\n3\n", "row 3: label 'nan' must be a finite number"),
        ("submission/sst2/one.tsv", "", "sst2/one.tsv: the point one of this task is also in .*SST-2/one.tsv"),
        ("labels/sst2.tsv", "index\tlabel\n0\t3\n", "label '3' must be one of negative, positive, 0, 1"),
        ("labels/sst2.tsv", "index\tlabel\n1\t1\n", "index '1' must be one of 0 to 0, each once"),
        ("submission/stsb.tsv", "0\tnan\t(4),emb\n", "stsb.tsv, line 1: pred 'nan' is not a finite number"),
        ("submission/cola.tsv", "", "'cola' is not a task of ELUE"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(submission, capsys, file, content, message):
    (submission / file).parent.mkdir(exist_ok=True)
    (submission / file).unlink() if content is None else (submission / file).write_text(content)
    assert score(submission, "--output", str(submission / "out")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert not (submission / "out").exists()


class Page(HTMLParser):
    """Cells of every table of a page by the table's id, the head first; how many points are plotted."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.circles, self.references, self.inside = {}, 0, [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[name] for name in ("src", "href") if name in attributes]
        self.circles += tag == "circle"
        if tag == "table":
            self.rows = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.inside = tag in ("td", "button")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path):
    """A leaderboard's page of three submissions, one without a score and one with a name that is markup."""
    better = [Point(point.name, point.flops, point.quality + 2) for point in REFERENCE]
    results = [
        result_of("reference", REFERENCE),
        result_of("<b>better</b> & more", better),
        result_of("elsewhere", REFERENCE, task="stsb", rows=1379),
        result_of("worse", [Point("a", 300.0, 70.5)]),
    ]
    write_board(leaderboard_of(results, {"mrpc": REFERENCE}, "reference"), tmp_path)
    return tmp_path / "leaderboard.html"


def test_the_page_stands_alone(page):
    html = page.read_text()
    parsed = Page(html)
    assert parsed.references == [] and "default-src 'none'" in html and "$" not in html.replace("$/", "")
    assert parsed.tables["scores"][0] == ["submission", "MRPC", "STS-B", "million parameters", "macro average"]
    assert {row[0]: row[1] for row in parsed.tables["scores"][1:]} == {
        "reference": "0.00",
        "<b>better</b> & more": "2.00",
        "elsewhere": "-",
        "worse": "-10.50",
    }
    assert parsed.circles == 3 + 3 + 3 + 1
    assert "<b>better" not in html
    assert '<td class="text">worse</td><td>-10.50</td>' in html  # what is read is set as text, what is compared not


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("#sort=scores,1", ["worse", "reference", "<b>better</b> & more", "elsewhere"]),
        ("#sort=scores,1,desc", ["<b>better</b> & more", "reference", "worse", "elsewhere"]),
        ("#sort=scores,0", ["<b>better</b> & more", "elsewhere", "reference", "worse"]),
    ],
)
def test_the_page_sorts_in_a_browser(page, tmp_path, link, expected):
    """A link clicks the buttons of the table's head. A dash is last whichever way."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [BROWSER, *flags, profile, f"file://{page}{link}"], capture_output=True, text=True, timeout=120
    )
    rows = Page(done.stdout).tables["scores"]
    assert [row[0] for row in rows[1:]] == expected


def test_runs_that_end_together_in_one_folder_lose_nothing(tmp_path):
    """A run that publishes while another does waits for it, then adds its tasks to what the other wrote."""
    own, others = result_of("deebert", REFERENCE), result_of("deebert", REFERENCE, "sst2")
    (tmp_path / "results").mkdir()
    with FileLock(tmp_path / ".lock"):
        late = Thread(target=publish, args=([own], [], tmp_path, None))
        late.start()
        late.join(1.0)
        write_result(others, tmp_path / "results" / "deebert.json")
    late.join()
    assert set(read_result(tmp_path / "results" / "deebert.json").tasks) == {"mrpc", "sst2"}


def test_a_result_is_as_large_as_its_largest_point_and_scored_by_size_over_seeds():
    points = [Point("a", 1.0, 50.0, 110), Point("b", 2.0, 60.0, 120)]
    assert Result("x", {"mrpc": TaskResult("f1", 9, [points])}).parameters == 120
    seeds = [[Point("a", 100.0, 61.0, 5)], [Point("b", 100.0, 63.0, 5)]]
    assert TaskResult("f1", 9, seeds).scores_by_size(REFERENCE)[40] == 2.0


def test_the_size_of_a_submission_is_known_only_where_all_its_points_have_one():
    known = Point("a", 1e6, 50.0, parameters=5)
    for other, expected in ((known, 5), (replace(known, parameters=None), None), (replace(known, parameters=9), 9)):
        result = Result("x", {"sst2": TaskResult("accuracy", 10, [[known, replace(other, name="b", flops=2e6)]])})
        assert result.parameters == expected


def test_points_at_nearly_one_cost_are_points_of_their_own():
    seeds = [[Point("a", 1000.0, 60.0, 7)], [Point("a", 1001.0, 70.0, 7)]]
    assert TaskResult("f1", 9, seeds).curves == seeds
    (mean,) = TaskResult("f1", 9, [seeds[0], [replace(seeds[1][0], flops=1000.0)]]).points
    assert mean == Point("a", 1000.0, 65.0, 7)


def test_the_deviation_of_a_reference_of_one_curve_is_told():
    seeds = [[Point("a", 100.0, 61.0)], [Point("a", 100.0, 63.0)]]
    result = Result("exits", {"mrpc": TaskResult("f1", 1725, seeds)})
    (entry,) = leaderboard_of([result], {"mrpc": result.tasks["mrpc"].reference}, "exits").entries
    assert (entry.tasks["mrpc"].score, entry.tasks["mrpc"].deviation) == (0.0, pytest.approx(2**0.5))


def test_a_note_and_sizes_survive_their_file(tmp_path):
    result = replace(result_of("ours", REFERENCE), note="a paper", settings={"mrpc": "MRPC: 3 epochs"})
    write_result(result, tmp_path / "scores.json")
    assert read_result(tmp_path) == result


def test_the_best_is_first_and_what_has_no_score_last():
    better, worse = ([replace(point, quality=point.quality + more) for point in REFERENCE] for more in (2, -2))
    results = [result_of("worse", worse), result_of("better", better), result_of("elsewhere", REFERENCE, "stsb")]
    board = leaderboard_of(results[:2], {"mrpc": REFERENCE}, "ours")
    assert [entry.name for entry in board.entries] == ["better", "worse"]
    board = leaderboard_of(results, {"mrpc": REFERENCE}, "ours")
    assert all(entry.macro is None for entry in board.entries)  # a task without a score leaves no average


def test_a_size_class_needs_a_score_on_every_task():
    points = [Point("a", 100.0, 61.0, 39_000_000), Point("b", 200.0, 83.0, 60_000_000)]
    tasks = {"mrpc": TaskResult("f1", 9, [points]), "stsb": TaskResult("f1", 9, [points[1:]])}
    (entry,) = leaderboard_of([Result("x", tasks)], dict.fromkeys(tasks, REFERENCE), "ours").entries
    assert entry.macro_by_size == {70: pytest.approx(2.5), 110: pytest.approx(2.5)}


def test_points_behind_the_front_are_told_apart(tmp_path):
    """In the text and on the page, where a better point is higher and a dearer one further right."""
    points = [Point("dear", 400.0, 70.0), Point("cheap", 100.0, 60.0), Point("good", 200.0, 80.0)]
    board = leaderboard_of([result_of("x", points)], {}, None)
    assert board.entries[0].tasks["mrpc"].front == ["cheap", "good"]
    lines = [line.split() for line in text(board).splitlines() if line.startswith("MRPC") and " x " in line]
    assert [(line[2], line[-1] == "front") for line in lines] == [("cheap", True), ("good", True), ("dear", False)]
    write_board(board, tmp_path)
    html = (tmp_path / "leaderboard.html").read_text()
    found = re.findall(r'class="(on-front|point)" cx="([0-9.]+)" cy="([0-9.]+)".*?<title>x, (\w+):', html)
    assert {name: kind for kind, _, _, name in found} == {"cheap": "on-front", "good": "on-front", "dear": "point"}
    (cheap, good, dear) = ((float(x), float(y)) for _, x, y, _ in found)
    assert cheap[0] < good[0] < dear[0] and good[1] < dear[1] < cheap[1]
    (line,) = re.findall(r'class="front" points="([^"]*)"', html)
    assert line == " ".join(f"{x},{y}" for x, y in (cheap, good))


def test_a_point_that_one_seed_alone_has_is_kept():
    one, more = [Point("a", 100.0, 60.0)], [Point("a", 100.0, 62.0), Point("b", 200.0, 80.0)]
    assert TaskResult("f1", 9, [one, more]).curves == [one, more]


def test_runs_at_two_sizes_are_named_beside_their_size():
    results = [replace(result_of(name, REFERENCE), settings={"mrpc": f"MRPC: {name}"}) for name in ("a", "b")]
    assert leaderboard_of(results, {}, None).notes == ["MRPC: a (a)", "MRPC: b (b)"]
    assert leaderboard_of(results[:1], {}, None).notes == ["MRPC: a"]


def test_a_later_run_replaces_its_own_numbers_and_keeps_what_else_is_there(tmp_path, capsys):
    """Of its tasks; an earlier method's note stays, and the reference that was given."""
    jobs = [SimpleNamespace(name="mrpc", sizes="MRPC: 3 epochs")]
    sizes = {"settings": {"mrpc": "MRPC: 3 epochs", "stsb": "STS-B: 1 epoch"}}
    old = Result(
        "ours", {**result_of("", REFERENCE[:1]).tasks, **result_of("", REFERENCE, "stsb").tasks}, "old", **sizes
    )
    other = replace(result_of("theirs", REFERENCE), note="a paper")
    (tmp_path / "results").mkdir()
    for one in (old, other):
        write_result(one, tmp_path / "results" / f"{one.name}.json")
    new = replace(result_of("ours", REFERENCE), note="new", settings={"mrpc": "MRPC: 3 epochs"})
    publish([new], jobs, tmp_path, ("curve.tsv", {"mrpc": REFERENCE}))
    found = read_result(tmp_path / "results" / "ours.json")
    assert found.tasks == {**old.tasks, **new.tasks} and (found.note, found.settings) == ("new", sizes["settings"])
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert {entry["name"]: entry["note"] for entry in board["entries"]} == {"ours": "new", "theirs": "a paper"}
    assert board["reference"] == "curve.tsv"
    publish([replace(new, name="elasticbert")], jobs, tmp_path, ("curve.tsv", {"mrpc": REFERENCE}))
    assert json.loads((tmp_path / "leaderboard.json").read_text())["reference"] == "curve.tsv"


def test_a_reference_is_of_the_rows_of_earlier_results_too(tmp_path):
    """Which the leaderboard scores as well; of a task of this run its own rows count."""
    write_result(result_of("curve", REFERENCE), tmp_path / "curve.json")
    (tmp_path / "results").mkdir()
    write_result(result_of("before", REFERENCE, rows=9), tmp_path / "results" / "before.json")
    options = SizeOptions(output=str(tmp_path), reference=str(tmp_path / "curve.json"))
    with pytest.raises(ValueError, match="has 1725 test rows of mrpc, not 9"):
        reference_of(options, [SimpleNamespace(name="sst2", test=[0])])
    own = SimpleNamespace(name="mrpc", test=range(1725))
    assert reference_of(options, [own]) == (options.reference, {"mrpc": REFERENCE})


def test_a_submission_of_other_settings_is_not_taken_for_made(tmp_path):
    make(tmp_path / "ours", {"epochs": 1}, lambda folder: {"emb": ModuleCost(5)})
    assert is_made(tmp_path / "ours", {"epochs": 1}) and not is_made(tmp_path / "ours", {"epochs": 2})
    assert not is_made(tmp_path / "theirs", {})
