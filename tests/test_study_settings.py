"""What a study searches, where it is stored, and settings, environments and storages that cannot work."""

from pathlib import Path

import gymnasium as gym
import optuna
import pytest
from optuna.storages import InMemoryStorage
from tiny_study import QUIET, STUDY

from sb3_mbmpo.zoo.search_space import suggest
from tuning import optimize, report, studies

pytestmark = QUIET


def settings_of(tmp_path, *options):
    return optimize.study_settings(optimize.parse(["--output", str(tmp_path), *options]))


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        ("{n_meta_steps: 5, inner_lr: 0.1}", {"n_meta_steps", "inner_lr"}),
        ("{dynamics_kwargs: {net_arch: [8]}, policy_kwargs: {}}", {"dynamics_kwargs.net_arch"}),
        ("{n_models: 3, n_tasks: 3}", {"n_models-n_tasks"}),
        ("{n_tasks: 5}", {"n_models-n_tasks"}),
    ],
)
def test_what_is_given_is_not_searched(given, gone, tmp_path):
    everything = settings_of(tmp_path)["names"]
    assert set(everything) - set(settings_of(tmp_path, "--set", given)["names"]) == gone


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ([], (200, 250, 500, 1000)),  # Pendulum's 2000 steps, of which 1000 are random
        (["--n-timesteps", "1600"], (200, 250, 500)),
        (["--n-timesteps", "1220"], None),
        (["--n-timesteps", "1001", "--n-evaluations", "1"], None),
        (["--n-timesteps", "5000", "--set", "{learning_starts: 50}"], (200, 250, 500, 1000, 2000)),
    ],
)
def test_an_iteration_is_not_longer_than_the_training(options, choices, tmp_path):
    space = studies.search_space(settings_of(tmp_path, *options))
    assert (space["n_steps"].choices if "n_steps" in space else None) == choices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "inner_lr", "--set", "{inner_lr: 0.1}"], "Nothing is left to search"),
        (["--n-timesteps", "1000"], r"All 1000 real steps would be random \(learning_starts=1000\)"),
        (["--set", "{env_kwargs: {day: 2026-01-01}}"], "Settings must be numbers, strings"),
        (["--env", "no_such_module:Env-v0"], "no_such_module"),
        (["--env", "sb3_mbmpo.envs:Point3D-v0"], "Point3D"),
        (
            ["--storage", "sqlite:////no/such/folder/study.db"],
            r"/no/such/folder/study\.db cannot be used \(.*unable to open database file\).*Its folder has to be there",
        ),
        (
            ["--storage", "/no/such/folder/study.log"],
            r"/no/such/folder/study\.log cannot be used .*Its folder has to be there",
        ),
        (["--storage", "sqlite://"], "^sqlite.* is in the memory of one process, and lost"),
        (["--storage", "sqlite:///:memory:"], "^sqlite.* is in the memory of one process, and lost"),
    ],
)
def test_searches_that_cannot_work_end_with_one_sentence(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as ended:
        optimize.main(["--output", str(tmp_path), *options])
    assert "\n" not in str(ended.value)
    assert list(tmp_path.iterdir()) == []


def test_a_report_on_no_study_ends_with_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="There is no study 'Pendulum-v1' in sqlite"):
        report.main(["--output", str(tmp_path)])


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "\udcff"])
@pytest.mark.parametrize("main", [optimize.main, report.main])
def test_what_cannot_be_a_folder_is_named(name, main, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"cannot be the folder of the report \(.*give another --output") as ended:
        main([f"--output={tmp_path / name}"])
    assert repr(str(tmp_path / name)) in str(ended.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_that_lacks_a_driver_ends_with_one_sentence(tmp_path, monkeypatch):
    def open_storage(url):
        raise ImportError("No module named 'redis'.\nTraceback")

    monkeypatch.setattr(report, "open_storage", open_storage)
    with pytest.raises(SystemExit, match=r"^No module named 'redis'.$"):
        report.main(["--output", str(tmp_path), "--storage", "redis://localhost"])


def test_processes_that_were_killed_are_said_to_be(tmp_path, monkeypatch):
    class Killed:
        Process = staticmethod(lambda **_: Killed())
        exitcode = -9

        def start(self):
            pass

        def is_alive(self):
            return False

    monkeypatch.setattr(optimize, "check_model", lambda *_: None)
    monkeypatch.setattr(optimize.mp, "get_context", lambda _: Killed)
    monkeypatch.setattr(optimize.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"were killed \(exit codes \[-9\]\): the same command resumes the study"):
        optimize.main(["--output", str(tmp_path)])


def test_environments_of_modules_are_found(tmp_path, monkeypatch):
    (tmp_path / "package_of_mine.py").write_text("import gymnasium; gymnasium.register('Mine-v0', entry_point='tiny:Drift')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Point2D-v0", "package_of_mine:Mine-v0"):
        assert settings_of(tmp_path, "--env", name, "--n-timesteps", "3000")["env"] == name
    assert "Mine-v0" in gym.registry


@pytest.mark.parametrize("name", ["what?", "a#b", "50%41", "pkg:Env-v0", "{x}", "a b&c=d"])
def test_any_folder_can_hold_the_study(name, tmp_path):
    arguments = optimize.parse(["--output", str(tmp_path / name)])
    storage = studies.open_storage(arguments.storage)
    optuna.create_study(storage=storage, study_name="study")
    storage.remove_session()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path(name) / "study.db"]


def test_a_changed_search_space_is_refused_with_one_sentence(url, monkeypatch):
    settings = STUDY | {"names": ["n_steps"], "n_timesteps": 520}
    storage = studies.open_storage(url)
    suggest(studies.open_study(storage, "study", settings).ask(), ["n_steps"], studies.search_space(settings))
    assert len(studies.open_study(storage, "study", settings).trials) == 1
    monkeypatch.setitem(studies.part_of_space.__globals__["SPACE"], "n_steps", optuna.distributions.IntDistribution(1, 9))
    with pytest.raises(ValueError, match=r"another search space.*n_steps.*200, 250, 500.*--study-name") as raised:
        studies.open_study(storage, "study", settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"]])
def test_a_study_of_another_direction_is_refused(directions, url):
    storage = studies.open_storage(url)
    optuna.create_study(storage=storage, study_name="study", directions=directions)
    with pytest.raises(studies.SettingsError, match=rf"'study' is to {' and '.join(directions)}.*give another --study-name"):
        studies.open_study(storage, "study", STUDY)


def test_trials_of_another_program_are_not_taken_for_ours(url, monkeypatch):
    monkeypatch.setattr(studies, "CREATION_TIME", 0)
    storage = studies.open_storage(url)
    theirs = optuna.create_study(storage=storage, study_name="study", direction="maximize")
    theirs.tell(theirs.ask(), 1e6)
    with pytest.raises(studies.SettingsError, match=r"'study' has trials of another program.*give another --study-name"):
        studies.open_study(storage, "study", STUDY)
    assert theirs.user_attrs == {}


def test_other_settings_are_named_to_the_entry():
    storage = InMemoryStorage()
    studies.open_study(storage, "study", STUDY)
    changed = STUDY | {"config": STUDY["config"] | {"horizon": 77}}
    with pytest.raises(ValueError, match=r"\{'config\.horizon': \(4, 77\)\}"):
        studies.open_study(storage, "study", changed)
