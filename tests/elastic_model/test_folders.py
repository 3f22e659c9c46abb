import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_model import folders
from elastic_model.folders import (
    LOCK,
    MARKER,
    check_file,
    check_replaceable,
    check_writable,
    claim_folder,
    empty_folder,
    is_file,
    is_ours,
    new_file,
    new_folder,
    shipped,
    working_in,
)


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_finished_folder_appears_whole_and_marked(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "weights").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path / "deep" / "out") == {"weights", MARKER}
    assert contents(tmp_path / "deep") == {"out"}


@pytest.mark.parametrize("atomic", [True, False])
def test_a_folder_of_ours_is_exchanged(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    for name in ("first", "second"):
        with new_folder(tmp_path / "out") as folder:
            (folder / name).write_text(name)
    assert contents(tmp_path / "out") == {"second", MARKER}
    assert contents(tmp_path) == {"out"}


def test_an_error_leaves_what_was_there(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert contents(tmp_path / "out") == {"old", MARKER}
    assert contents(tmp_path) == {"out"}


@pytest.mark.parametrize("make", [new_folder, claim_folder])
def test_what_is_not_ours_is_not_touched(tmp_path, make):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter").write_text("years of work")
    with pytest.raises(ValueError, match="thesis exists and was not made by elastic-model"):
        with make(foreign):
            pass
    with pytest.raises(ValueError, match="chapter exists and is not a folder"):
        with make(foreign / "chapter"):
            pass
    assert contents(foreign) == {"chapter"} and (foreign / "chapter").read_text() == "years of work"


def test_what_a_job_reads_is_not_replaced_by_what_it_writes(tmp_path):
    with new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for output in ("model", "model/../model", "link", "."):
        with pytest.raises(ValueError, match=r"would replace .*, which is read; choose another output"):
            check_replaceable(tmp_path / output, tmp_path / "model", None)
    with pytest.raises(ValueError, match="would replace .*weights, which is read"):
        check_replaceable(tmp_path / "model", "org/model", tmp_path / "model" / "weights")
    with pytest.raises(ValueError, match=r"would replace what other jobs made there, as .*runs/inner"):
        with new_folder(claim_folder(tmp_path / "runs") / "inner"):
            pass
        with new_folder(tmp_path / "runs"):
            pass
    assert is_ours(tmp_path / "runs" / "inner")
    check_replaceable(tmp_path / "model" / "onnx", tmp_path / "model")
    check_replaceable(tmp_path / "other", tmp_path / "model", "org/model")


def test_an_empty_folder_is_nobodys(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
    assert contents(tmp_path / "out") == {"file", MARKER}
    assert is_ours(claim_folder(tmp_path / "out"))


def test_a_killed_writer_leaves_the_old_folder_and_its_rest_is_removed(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "old").write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from elastic_model.folders import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert contents(tmp_path / "out") == {"old", MARKER} and len(contents(tmp_path)) == 2
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert contents(tmp_path) == {"out"} and contents(tmp_path / "out") == {"new", MARKER}


def test_a_writer_that_lives_keeps_its_temporary_folder(tmp_path):
    with new_folder(tmp_path / "out") as slow:
        with new_folder(tmp_path / "out") as quick:
            (quick / "quick").write_text("")
        assert slow.exists()
        (slow / "slow").write_text("")
    assert contents(tmp_path / "out") == {"slow", MARKER}


def test_one_process_works_in_a_folder_until_it_ends_or_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from elastic_model.folders import working_in\n"
        "with working_in(Path(sys.argv[1])):\n"
        "    print('there', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "there\n"
        with (
            pytest.raises(ValueError, match="another process is working in .*out; wait"),
            working_in(tmp_path / "out"),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with working_in(tmp_path / "out") as folder, working_in(folder):  # a job within a job of this process
        assert is_ours(folder)


def test_a_file_does_not_replace_what_is_read(tmp_path):
    texts = tmp_path / "texts.tsv"
    texts.write_text("text\n")
    with pytest.raises(ValueError, match="texts.tsv would replace that file, which is read"):
        check_file(tmp_path / "a" / ".." / "texts.tsv", texts, None)
    with pytest.raises(ValueError, match="is a folder; give a file"):
        check_file(tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*nowhere; make it"):
        check_file(tmp_path / "nowhere" / "report.json")
    checkpoint = claim_folder(tmp_path / "checkpoint")
    for name in ("config.json", "report.json"):
        (checkpoint / name).write_text("{}")
    with pytest.raises(ValueError, match="config.json would replace that file"):
        check_file(checkpoint / "config.json")
    check_file(checkpoint / "report.json", texts)  # of a run before


def test_a_link_is_written_through(tmp_path):
    claim_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "weights").write_text("1")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"weights", MARKER}
    assert contents(tmp_path) == {"link", "real"}


def test_what_is_no_file_is_written_to(tmp_path):
    """`--output /dev/null` as root replaced the device, a link to a file the link."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with new_file(tmp_path / "pipe") as file:
        file.write_text("answers")
    assert os.read(reader, 99) == b"answers" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    code = "from elastic_model.folders import new_file\nwith new_file('/dev/stdout') as file: file.write_text('said')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "said"
    (tmp_path / "log").write_text("before\n")
    with (tmp_path / "log").open("a") as log:  # as the shell's >>: the log was replaced, with all that was in it
        subprocess.run([sys.executable, "-c", f"print('first')\n{code}\nprint('last')"], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\nfirst\nsaidlast\n"
    assert not is_file("/dev/stdout") and not is_file("/dev/null") and is_file(tmp_path / "new")
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_file(tmp_path / "link") as file:
        file.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_an_emptied_folder_is_still_ours(tmp_path):
    with working_in(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "log").write_text("1")
        (folder / "table").write_text("1")
        empty_folder(folder)
        assert contents(folder) == {MARKER, LOCK}


def test_a_new_file_replaces_the_old_one_at_once(tmp_path):
    (tmp_path / "table").write_text("old")
    with pytest.raises(RuntimeError), new_file(tmp_path / "table") as file:
        file.write_text("half")
        raise RuntimeError
    assert (tmp_path / "table").read_text() == "old" and contents(tmp_path) == {"table"}
    with new_file(tmp_path / "table") as file:
        file.write_text("new")
    assert (tmp_path / "table").read_text() == "new" and contents(tmp_path) == {"table"}


def test_a_killed_writer_leaves_the_old_file_and_its_rest_is_removed(tmp_path):
    (tmp_path / "table").write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from elastic_model.folders import new_file\n"
        "with new_file(Path(sys.argv[1])) as file:\n"
        "    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "table")])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "table").read_text() == "old" and len(contents(tmp_path)) == 2
    with new_file(tmp_path / "table") as file:
        file.write_text("new")
    assert (tmp_path / "table").read_text() == "new" and contents(tmp_path) == {"table"}


def test_shipped_names_mean_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped(Path("elastic_model/folders.py")).samefile(folders.__file__)
    assert shipped(Path("somewhere/else.txt")) == Path("somewhere/else.txt")
    os.mkdir("elastic_model")
    Path("elastic_model/folders.py").write_text("my own")
    assert shipped(Path("elastic_model/folders.py")).read_text() == "my own"


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    """The error was of an empty name."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for output in (".", "..", str(tmp_path / "run")):
        with pytest.raises(ValueError, match="is the working folder, or holds it, and cannot be replaced"):
            check_replaceable(Path(output))
    check_replaceable(Path("inner"))


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "answers.tsv").write_text("before")
    with pytest.raises(OSError, match="No space left on device") as caught:
        with new_file(tmp_path / "answers.tsv") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write, which knows no name
    assert caught.value.filename == str(tmp_path / "answers.tsv")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.tsv"]
    assert (tmp_path / "answers.tsv").read_text() == "before"


def test_the_state_of_a_pre_training_run_is_replaced_by_the_run_alone(tmp_path):
    state = tmp_path / "checkpoint-40"
    for _ in range(2):
        with new_folder(state) as folder:
            (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(
        ValueError, match="checkpoint-40 would replace the state of a pre-training run; choose another"
    ):
        check_replaceable(state)


def test_a_folder_that_nothing_can_be_added_to_is_named_beforehand(tmp_path):
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    for folder in (Path("/proc"), tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{folder} cannot be written to .*; work on a copy of it"):
            check_writable(folder)
