"""The record, tables and the progress bar."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from secateur.cli import progress_bar
from secateur.cli.output import check_json, print_table, write_json
from secateur.cli.progress_bar import ProgressBar
from secateur.errors import SaveFailure, UsageError


def test_the_record_is_replaced_whole(tmp_path):
    file = tmp_path / "r.json"
    file.write_text("old")
    write_json(str(file), {"value": float("nan"), "path": tmp_path, "shape": (2, 3), "text": "±"})
    assert json.loads(file.read_text("utf-8")) == {
        "value": None, "path": str(tmp_path), "shape": [2, 3], "text": "±"
    }  # fmt: skip
    assert [*tmp_path.iterdir()] == [file]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_full_disk_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    file.write_text("old")

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SaveFailure, match=r"could not be written to .*r\.json: No space left on device"):
        write_json(str(file), {})
    assert [*tmp_path.iterdir()] == [file] and file.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(str(pipe), {"a": 1})
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1} and stat.S_ISFIFO(pipe.stat().st_mode)


def test_where_a_record_cannot_go(tmp_path):
    check_json(None)
    check_json("-")
    check_json(str(tmp_path / "new.json"))
    check_json(str(tmp_path / "out" / "r.json"), tmp_path / "out")  # the folder will be made
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        check_json(str(tmp_path))
    with pytest.raises(UsageError, match="does not exist; make it first"):
        check_json(str(tmp_path / "nowhere" / "r.json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="no permission"):
        check_json(str(tmp_path / "r.json"))


def test_a_table_is_not_folded_in_a_pipe_and_reads_brackets_as_they_are(capsys):
    print_table([("a", "x" * 300), ("bb", "[red]{3}")], ("name", "what"))
    assert capsys.readouterr().out == f"name  what\na     {'x' * 300}\nbb    [red]{{3}}\n"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


def test_no_line_before_two_seconds_then_one_a_tenth(clock, capsys):
    with ProgressBar() as progress:
        for done in range(101):
            clock[0] = done * 0.1
            progress(done, 100, "pruning")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pruning: 20 %, about 8.0 s left"
    assert lines[1:3] == [
        "pruning: 30 %, about 7.0 s left",
        "pruning: 40 %, about 6.0 s left",
    ]
    assert lines[-1] == "pruning: 100 %" and len(lines) == 9


def test_every_step_has_its_own_two_seconds(clock, capsys):
    with ProgressBar() as progress:
        for _ in range(3):  # the whole stays the same, the work falls back
            for done in range(11):
                clock[0] += 0.15
                progress(done, 10, "counting")
    assert not capsys.readouterr().err


def test_a_bar_on_a_terminal_is_gone_at_the_end(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as progress:
        progress(0, 10, "pruning [layer]")
        assert progress._bar is None
        clock[0] = 5.0
        progress(5, 10, "pruning [layer]")
        assert progress._bar is not None and progress._bar.tasks[0].completed == 5
        progress._bar.refresh()
    assert progress._bar is None
    assert "pruning [layer]" in capsys.readouterr().err
