"""Trainings of the command line: killed, interrupted, on a full disk, resumed bit for bit, never overwriting an older one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from killed_runs import TOTAL, learned
from tiny import assert_same, tiny_model
from tiny_training import Point

from sb3_mbmpo import MBMPO
from sb3_mbmpo.cli.interrupts import Interrupted, interrupts_raise
from sb3_mbmpo.cli.repeatable import RepeatableEpisode
from sb3_mbmpo.report.run_log import read_progress

TESTS = Path(__file__).parent


class SecretNumbers(Point):
    """An environment whose first states come from the operating system's random numbers, which no seed controls."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.x = np.frombuffer(os.urandom(2), np.uint8).astype(np.float32) / 256
        return self.x.copy(), {}


gym.register("SecretNumbers-v0", SecretNumbers, disable_env_checker=True)


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
