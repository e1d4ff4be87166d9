"""Trainings of the command line: killed, interrupted, on a full disk, resumed bit for bit, never overwriting an older one."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from killed_runs import TINY, TOTAL, learned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Drift, assert_same, tiny_model

from sb3_mbmpo import MBMPO
from sb3_mbmpo.__main__ import main
from sb3_mbmpo.cli import environments, training_run
from sb3_mbmpo.cli.interrupts import Interrupted, interrupts_raise
from sb3_mbmpo.cli.repeatable import RepeatableEpisode
from sb3_mbmpo.report.run_log import RunLogFile, read_progress

TESTS = Path(__file__).parent


class Point(Drift):
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as Gymnasium has it


class SecretNumbers(Point):
    """An environment whose first states come from the operating system's random numbers, which no seed controls."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.x = np.frombuffer(os.urandom(2), np.uint8).astype(np.float32) / 256
        return self.x.copy(), {}


for _class in (Point, SecretNumbers):
    gym.register(f"{_class.__name__}-v0", _class, disable_env_checker=True)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Return the command line, with settings so small that an iteration takes a fraction of a second."""
    config = {**TINY, "env_id": "Point-v0"}
    monkeypatch.setattr(training_run, "read_config", lambda name: {**config, "env_id": name})

    def run(*options, env="Point-v0", save="run", steps=60):
        common = ["--total-timesteps", str(steps), "--eval-episodes", "1", "--no-progress-bar"]
        main(["train", "--env", env, "--save", str(tmp_path / save), *common, *options])

    return run


# -- Killed, interrupted, disk full -------------------------------------------------------------------------------------------


def test_thirty_kills_lose_nothing_that_was_finished():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, str(TESTS / "killed_runs.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert (report["kills"], report["lost"], report["left_behind"]) == (30, 0, [])
    assert len(report["resumed_from"]) > 3, "the kills came at different times"
    # Everything that was learned, including random numbers and buffer, equals that of an undisturbed run
    assert report["finished_differs_in"] == report["ended_differs_in"] == []
    for name, word in (("SIGINT", "Interrupted"), ("SIGTERM", "Terminated")):
        code, output, steps = report[name]
        assert code == 128 + getattr(signal, name)
        assert "Traceback" not in output
        assert output.splitlines()[-1].startswith(f"{word}. ")
        assert f"up to {steps} real steps: the same command with --resume" in output.splitlines()[-1]
    code, output, steps = report["full"]
    assert code == 1
    assert "File too large: not written, what was there before is as it was" in output
    assert 0 < steps < TOTAL


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_interrupts_and_further_ones_do_not_disturb_the_cleanup(name):
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    missed = []
    before = {number: signal.signal(number, lambda number, _: missed.append(number)) for number in numbers}
    ours = [signal.getsignal(number) for number in numbers]
    try:
        with interrupts_raise():
            with pytest.raises(Interrupted) as interrupt:
                signal.raise_signal(getattr(signal, name))
            try:
                for number in numbers:
                    signal.raise_signal(number)
            except Interrupted:
                pytest.fail("the cleanup was interrupted")
        assert interrupt.value.exit_code == 128 + getattr(signal, name)
        assert missed == []
        assert [signal.getsignal(number) for number in numbers] == ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_process_that_is_to_survive_the_end_of_its_terminal_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` sets it
    try:
        with interrupts_raise():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        (0, [], [0, 20, 40, 60, 80, 100]),
        (35, [], [0, 40, 80, 100]),
        (0, ["--eval-at", "10"], [0, 10, 20, 40, 60, 80, 100]),
        # No model that has learned nothing takes the place of an older one
        (0, ["--overwrite", "--eval-at", "10"], [20, 40, 60, 80, 100]),
        (35, ["--overwrite"], [20, 60, 100]),
    ],
)
def test_a_run_is_saved_every_so_many_steps_and_at_its_end(every, options, expected, train, monkeypatch):
    if "--overwrite" in options:
        train()
    saved, save = [], MBMPO.save

    def noted(self, *args):
        saved.append(self.num_timesteps)
        save(self, *args)

    monkeypatch.setattr(MBMPO, "save", noted)
    train("--save-every", str(every), *options, steps=100)
    assert saved == expected


# -- The same command repeated ------------------------------------------------------------------------------------------------


def test_the_same_command_says_how_to_go_on_and_touches_nothing(train, tmp_path):
    train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"run\.zip is there already.*--resume.*--overwrite") as error:
        train()
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("every", [0, 40])
def test_more_steps_later_are_those_of_one_long_run(every, train, tmp_path):
    train("--save-every", str(every), steps=100, save="long")
    train("--save-every", str(every), steps=60)
    train("--resume", "--save-every", str(every), steps=100)
    assert_same(learned(tmp_path / "run.zip"), learned(tmp_path / "long.zip"))
    logs = [read_progress(tmp_path / name / "progress.csv") for name in ("run", "long")]
    for key in ("time/total_timesteps", "imagined/ep_rew_mean", "dynamics/val_loss"):
        np.testing.assert_array_equal(logs[0][key], logs[1][key])
    assert len(list((tmp_path / "run").glob("replay_buffer-*.pkl"))) == 1


def test_a_finished_run_is_only_evaluated_again(train, tmp_path, capsys):
    train()
    before = (tmp_path / "run.zip").read_bytes()
    train("--resume")
    assert (tmp_path / "run.zip").read_bytes() == before
    assert "goes on from 60 real steps" in capsys.readouterr().out


def test_resume_begins_where_nothing_is_there_yet(train, tmp_path):
    train("--resume")
    assert MBMPO.load(tmp_path / "run.zip").num_timesteps == 60


def test_another_run_takes_the_place_of_an_older_one_when_it_has_something_to_show(train, tmp_path, monkeypatch, capsys):
    train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(self, *_):
        raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MBMPO, "train", interrupt)
        with pytest.raises(SystemExit, match="130"):
            train("--overwrite", "--seed", "1")
    assert "run.zip is as it was" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, "the log, too"
    train("--overwrite", "--seed", "1", steps=40)
    assert MBMPO.load(tmp_path / "run.zip").seed == 1
    assert read_progress(tmp_path / "run" / "progress.csv")["time/total_timesteps"].tolist() == [20, 40]


def test_an_older_run_keeps_its_real_steps_if_a_new_one_cannot_be_saved(train, tmp_path, monkeypatch):
    train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(self, *_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(MBMPO, "save", fail)
        with pytest.raises(SystemExit, match=r"no space\n.*run\.zip is as it was"):
            train("--overwrite", "--seed", "1")  # its buffer is of as many real steps
    assert {path: path.read_bytes() for path in before} == before
    train("--resume", steps=80)


def test_what_cannot_be_resumed_is_said_in_a_line(train, tmp_path):
    train()
    with pytest.raises(SystemExit, match=r"run\.zip is another one, \(its, yours\): {'seed': \(0, 1\)}"):
        train("--resume", "--seed", "1")
    (buffer,) = (tmp_path / "run").glob("*.pkl")
    buffer.write_bytes(buffer.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=rf"{buffer.name} .*earlier copy"):
        train("--resume")
    buffer.unlink()
    with pytest.raises(SystemExit, match=rf"its real steps, .*{buffer.name}, are gone"):
        train("--resume")
    tiny_model().save(tmp_path / "other")
    with pytest.raises(SystemExit, match="is no run of this command line"):
        train("--resume", save="other")
    with pytest.raises(SystemExit, match="2"):
        train("--resume", "--overwrite")


def test_a_training_that_would_not_learn_is_refused_with_both_numbers(train, tmp_path):
    with pytest.raises(SystemExit, match=r"All 19 real steps would be random \(`learning_starts`: 20\)"):
        train(steps=19)
    assert not (tmp_path / "run.zip").exists()
    train(steps=20)


def test_what_is_evaluated_before_the_first_fit_is_called_untrained(train, capsys):
    train("--eval-at", "10", steps=40)  # no warning: it goes on
    rows = [line.split()[:-1] for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows if row[:1] in (["untrained"], ["MB-MPO"])] == [["untrained", "10"], ["MB-MPO", "40"]]


def test_names_with_dots_and_folders_have_files_of_their_own(train, tmp_path):
    (tmp_path / "plain").mkdir()
    for name, steps in (("lr0.001", 20), ("lr0.003", 40), ("plain", 60)):
        train(save=name, steps=steps)
        assert MBMPO.load(tmp_path / name).num_timesteps == steps
        assert read_progress(tmp_path / name / "progress.csv")["time/total_timesteps"][-1] == steps


# -- Changed settings, TensorBoard, the list of environments ------------------------------------------------------------------


def test_settings_are_changed_by_name_also_nested_ones(train, tmp_path, capsys):
    train("--set", "{horizon: 3, dynamics_kwargs: {max_epochs: 1}, env_kwargs: {length: 5}}", steps=40)
    model = MBMPO.load(tmp_path / "run.zip")
    assert (model.horizon, model.n_models) == (3, TINY["n_models"])
    assert model.dynamics_kwargs == {**TINY["dynamics_kwargs"], "max_epochs": 1}
    assert read_progress(tmp_path / "run" / "progress.csv")["rollout/ep_len_mean"][-1] == 5
    assert "Point-v0 {'length': 5} seed 0" in capsys.readouterr().out


def test_a_run_is_resumed_with_its_own_settings_only(train, tmp_path):
    train("--set", "{horizon: 3}", steps=40)
    for other in ([], ["--set", "{horizon: 2}"]):
        with pytest.raises(SystemExit, match=r"another one, \(its, yours\): {'set': \({'horizon': 3}, {.*}\)}"):
            train("--resume", *other)
    train("--resume", "--set", "{horizon: 3}")
    assert MBMPO.load(tmp_path / "run.zip").num_timesteps == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{horzion: 3}", "`horzion` is no setting of MBMPO .*: do you mean `horizon`?"),
        ("{seed: 3}", "`seed` is no setting of MBMPO"),
        ("{n_envs: 0.5}", "`n_envs` must be an integer of at least 1, not 0.5"),
        ("{horizon: 0}", "`horizon` must be an integer of at least 1"),
        ("horizon", "2"),
    ],
)
def test_settings_that_cannot_be_are_named_before_anything_is_written(change, message, train, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train("--set", change)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_what_the_log_gets_and_a_resumed_run_goes_on_there(train, tmp_path):
    for steps in (40, 60):
        train("--tensorboard-log", str(tmp_path / "boards"), "--resume", steps=steps)
    events = EventAccumulator(str(tmp_path / "boards" / "run"))
    events.Reload()
    progress = read_progress(tmp_path / "run" / "progress.csv")
    logged = events.Scalars("imagined/ep_rew_mean")
    assert [event.step for event in logged] == progress["time/total_timesteps"].tolist() == [20, 40, 60]
    np.testing.assert_allclose([event.value for event in logged], progress["imagined/ep_rew_mean"], rtol=1e-6)


def test_without_tensorboard_the_extra_is_named(train, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else found(name))
    with pytest.raises(SystemExit, match=r"pip install 'sb3-mbmpo\[tensorboard\]'"):
        train("--tensorboard-log", str(tmp_path / "boards"))


def curve(path, *rows):
    """Write a learning curve as ``tuning.results`` does."""
    lines = ["real_steps,cpu_seconds,mean_return,settings", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_entry_has_the_returns_at_the_end_of_its_budget(tmp_path):
    ours = "zoo_configs/mbmpo.yml: Pendulum-v1"
    files = [
        curve(tmp_path / "0.csv", (1000, 10, -900, ours), (2000, 20, -150, ours), (3000, 30, -120, ours)),
        curve(tmp_path / "1.csv", (1000, 12, -800, ours), (2000, 40, -450, ours)),
        curve(tmp_path / "2.csv", (1000, 12, -700, ours)),
        curve(tmp_path / "3.csv", (2000, 1, 0, f"{ours}; horizon=50"), (2000, 1, 0, "zoo_configs/mbmpo.yml: Pendulum-v11")),
    ]
    assert environments.measured("Pendulum-v1", 2000, environments.read_curves(files[:2])) == (2000, [-450, -150], 30)
    curves = environments.read_curves(files)
    # Most seeds have not got so far yet
    assert environments.measured("Pendulum-v1", 2000, curves) == (1000, [-900, -800, -700], 12)
    assert environments.measured("Pendulum-v1", 500, curves) is None


def test_the_list_has_budgets_and_measured_returns(tmp_path, monkeypatch, capsys):
    pendulum, cheetah = (f"zoo_configs/mbmpo.yml: {name}" for name in ("Pendulum-v1", "HalfCheetah-v5"))
    curve(tmp_path / "mbmpo-a-seed0.csv", (2000, 40, -132.25, pendulum), (15000, 3000, 4321.5, cheetah))
    curve(tmp_path / "mbmpo-b-seed1.csv", (2000, 40, -100, pendulum))
    monkeypatch.setattr(environments, "results_folder", lambda: tmp_path)
    for command in (["--list"], ["train", "--list"]):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        rows = [line.split() for line in lines]
        assert ["Pendulum-v1", "2,000", "-116", "-132,", "-100", "2", "40", "s"] in rows
        assert ["HalfCheetah-v5", "20,000", "4,322", "4,322,", "4,322", "1", "50", "min"] in rows
        assert ["measured", "after", "15,000", "of", "them"] in rows
        assert ["Hopper-v5", "40,000", "not", "measured"] in rows
        assert any(line.startswith("Any other environment id gets 20,000 real steps") for line in lines)


def test_the_list_knows_what_the_results_page_knows():
    assert environments.results_folder() == TESTS.parent / "docs" / "results" / "runs"
    files = list(environments.results_folder().glob("mbmpo-*.csv"))
    found = environments.measured("Pendulum-v1", 2000, environments.read_curves(files))
    assert len(found.returns) == len([path for path in files if path.name.startswith("mbmpo-Pendulum-v1-seed")])


# -- What MuJoCo says -------------------------------------------------------------------------------------------------------

UNSTABLE = """
import gymnasium as gym
from sb3_mbmpo.common.mujoco_messages import tidy_mujoco_messages

tidy_mujoco_messages()
for _ in range(2):
    env = gym.make("HalfCheetah-v5")
    for t in range(3):
        env.reset(seed=0)
        env.unwrapped.data.qpos[2 + t] = float("nan")
        env.unwrapped.do_simulation(env.action_space.sample(), 1 + t)
"""


def test_mujoco_leaves_no_file_and_says_what_matters_once(tmp_path):
    code = [sys.executable, "-W", "ignore", "-c", UNSTABLE]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert re.fullmatch(r"MuJoCo: Nan, Inf or huge value in QPOS at DOF 2\. The simulation is unstable\. .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


# -- The environment continues --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Point-v0", "CartPole-v1", "Pendulum-v1"])
def test_an_environment_repeats_its_episode_to_the_last_bit(env_id):
    def step(env, n_steps, rng):
        """Take random actions, with resets at the ends of episodes, and return observations and rewards."""
        rows = []
        for _ in range(n_steps):
            env.action_space.np_random.bit_generator.state = rng.bit_generator.state
            rng.random()
            obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            rows.append([*obs, reward])
            if terminated or truncated:
                rows.append([*env.reset()[0], 0.0])
        return np.array(rows, dtype=np.float64)

    first, second = (RepeatableEpisode(gym.make(env_id)) for _ in range(2))
    first.reset(seed=3)
    for n_steps in (0, 7, 40):  # in the first episode, and in later ones, which start without a seed
        step(first, n_steps, np.random.default_rng(0))
        assert second.repeat(first.so_far())
        rows = [step(env, 230, np.random.default_rng(1)) for env in (first, second)]
        np.testing.assert_array_equal(*rows)


def test_an_environment_that_does_not_repeat_itself_begins_a_new_episode(train, capsys, tmp_path):
    train(env="SecretNumbers-v0", steps=45)
    train("--resume", env="SecretNumbers-v0", steps=60)
    assert "The environment does not repeat itself" in capsys.readouterr().out
    model = MBMPO.load(tmp_path / "run.zip")
    model.load_replay_buffer(next((tmp_path / "run").glob("*.pkl")))
    buffer = model.replay_buffer
    moved = np.abs(buffer.next_observations - buffer.observations)[:60]
    assert moved.max() < 0.4, "no step leads from one episode to another"


# -- The log --------------------------------------------------------------------------------------------------------------


def test_a_log_goes_on_and_new_columns_find_room(tmp_path):
    path = tmp_path / "progress.csv"
    log = RunLogFile(path)
    for step in (20, 40, 60):
        log.write({"time/total_timesteps": step, "a": 1 / 3}, {"time/total_timesteps": (), "a": ()})
    log = RunLogFile(path, last_step=40)
    log.write({"time/total_timesteps": 60, "b": "x,y", "c": 1}, {"time/total_timesteps": (), "b": (), "c": ("csv",)})
    columns = read_progress(path)
    np.testing.assert_array_equal(columns["time/total_timesteps"], [20, 40, 60])
    np.testing.assert_array_equal(columns["a"], [1 / 3, 1 / 3, np.nan])
    assert columns.keys() == {"time/total_timesteps", "a", "b"}


def test_a_damaged_log_is_named(tmp_path):
    path = tmp_path / "progress.csv"
    log = RunLogFile(path)
    for step in (20, 40):
        log.write(
            {"time/total_timesteps": step, "rollout/ep_rew_mean": -12.5},
            {"time/total_timesteps": (), "rollout/ep_rew_mean": ()},
        )
    good = path.read_bytes()
    for damaged in (good.replace(b"40,-12.5", b"40,-92.5"), good.replace(b"20,", b"20"), good.replace(b"12", b"\xff2")):
        assert damaged != good
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"progress\.csv"):
            read_progress(path)
        with pytest.raises(ValueError, match=r"progress\.csv"):
            RunLogFile(path, last_step=40)
