"""Learning curves: the rows of measurements, and which code and machine they come from."""

import csv
import io
import subprocess

import pytest

from tuning.results import records


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "runs" / "a.csv"
    row = dict.fromkeys(records.COLUMNS, "x") | {"real_steps": 20, "settings": 'a, "b"\nc', "cpu": "Ünï"}
    records.append_row(path, row)
    records.append_row(path, row | {"real_steps": 3})
    read = records.read_rows(path)
    assert [each["real_steps"] for each in read] == ["3", "20"]
    assert read[1] == {**row, "real_steps": "20", "settings": 'a, "b" c'}
    assert [row["settings"] for row in csv.DictReader(io.StringIO(path.read_text()))] == ['a, "b" c'] * 2


def test_half_a_line_is_no_row(tmp_path):
    path = tmp_path / "a.csv"
    row = dict.fromkeys(records.COLUMNS, "1")
    for n in (20, 40):
        records.append_row(path, row | {"real_steps": n})
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 9, whole.index(b"\n") + 5, 7):
        path.write_bytes(whole[:cut])
        n_left = whole[:cut].count(b"\n") - 1
        assert len(records.read_rows(path)) == max(n_left, 0)
        records.append_row(path, row | {"real_steps": 40})
        assert [each["real_steps"] for each in records.read_rows(path)] == ["20"] * max(n_left, 0) + ["40"]


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("steps,return\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv does not have the columns real_steps"):
        records.read_rows(path)


def test_commit_is_given_or_git_s_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MBMPO_COMMIT", raising=False)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="--commit or MBMPO_COMMIT"):
        records.read_commit()
    monkeypatch.setenv("MBMPO_COMMIT", "def")
    assert (records.read_commit("abc"), records.read_commit()) == ("abc", "def")
    monkeypatch.delenv("MBMPO_COMMIT")

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "a.py").write_text("1")
    git("init")
    git("add", "tuning")
    git("commit", "-m", "a")
    (tmp_path / "rows.csv").write_text("results are no change of the code")
    assert records.read_commit() == git("rev-parse", "HEAD")
    (tmp_path / "tuning" / "a.py").write_text("2")
    assert records.read_commit() == git("rev-parse", "HEAD") + "-dirty"
    # The commit of a repository says nothing about an archive that is unpacked inside it
    monkeypatch.setattr(records, "ROOT", tmp_path / "tuning")
    with pytest.raises(ValueError, match="--commit"):
        records.read_commit()


def test_code_from_two_places_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="run the command in the folder that has both"):
        records.describe_machine("abc", 1)
