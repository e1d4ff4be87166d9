"""Study files that are damaged are named, with what to do."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from tiny_study import QUIET, STUDY, search, trials_of

from tuning import optimize, report, studies

pytestmark = QUIET


def damaged(content, how):
    """Return the content of a file after an accident."""
    middle = len(content) // 2
    return {
        "cut": content[: content.rfind(b"\n", 0, middle) + 5],
        "overwritten": content[:middle] + b"x" * 600 + content[middle + 600 :],
        "zeroed": bytes(300) + content[300:],
        "junk": b"[1, 2]\n" * 500,
    }[how]


@pytest.fixture
def command(url, tmp_path):
    """Return the command line of a finished search."""
    argv = ["--env", "Pendulum-v1", "--study-name", "study", "--storage", url, "--output", str(tmp_path)]
    more = ["--n-timesteps", "2000", "--n-trials", "1"]
    settings = optimize.study_settings(optimize.parse([*argv, *more]))
    study = studies.open_study(studies.open_storage(url), "study", settings)
    for _ in range(3):
        study.tell(study.ask(studies.search_space(settings)), state=TrialState.PRUNED)
    return argv, more


@pytest.mark.parametrize("how", ["cut", "overwritten", "zeroed", "junk"])
def test_a_damaged_study_is_named_with_what_to_do(how, url, command, tmp_path):
    if how == "cut" and url.endswith(".log"):
        pytest.skip("a truncated journal is still a valid one, see below")
    argv, more = command
    file = tmp_path / ("study.log" if url.endswith(".log") else "study.db")
    file.write_bytes(damaged(file.read_bytes(), how))
    before = file.read_bytes()
    for main, options in ((report.main, argv), (optimize.main, [*argv, *more])):
        with pytest.raises(SystemExit) as end:
            main(options)
        assert str(file) in str(end.value)
        assert "another --storage" in str(end.value) or "give --study-name or --storage" in str(end.value)
        assert "\n" not in str(end.value)
    assert file.read_bytes()[:300] == before[:300]


def test_a_database_whose_index_misses_a_row_is_named(tmp_path):
    url = studies.sqlite_url(tmp_path / "study.db")
    optuna.create_study(storage=studies.open_storage(url), study_name="a_name_of_its_own")
    content = (tmp_path / "study.db").read_bytes()
    before, name, after = content.rpartition(b"a_name_of_its_own")
    (tmp_path / "study.db").write_bytes(before + name.replace(b"its", b"hit") + after)
    with (
        pytest.raises(studies.DamagedStudyError, match=r"study\.db is damaged.*missing from index"),
        studies.damage_named(url),
    ):
        studies.open_storage(url)


def test_a_journal_that_ends_within_a_line_goes_on_without_it(journal):
    study = studies.open_study(studies.open_storage(journal), "study", STUDY)
    study.tell(study.ask(studies.search_space(STUDY)), state=TrialState.PRUNED)
    whole = Path(journal).read_bytes()
    studies.repair_journal(journal)
    assert Path(journal).read_bytes() == whole, "nothing to repair"
    Path(journal).write_bytes(whole + b'{"op_code":4,"work')
    with pytest.warns(UserWarning, match=r"study\.log ended with an incomplete line, now removed"):
        studies.repair_journal(journal)
    assert Path(journal).read_bytes() == whole
    assert not Path(f"{journal}.lock").exists()
    trials_of(journal)
    search(journal, n_trials=1)
