"""Learning curves: what has been learned at an evaluation, runs that were interrupted or killed, several processes."""

import signal
import subprocess
import sys
import time
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from tiny import ENTRY
from tiny_runs import MACHINE, ROOT, SMALL_SAC, pendulum, write_queue

from sb3_mbmpo.report.episodes import evaluation_seed
from tuning.results import checkpoints, records, training
from tuning.results.files import claim, csv_file, steps_left, work_folder
from tuning.results.recipes import make_recipe
from tuning.results.runs import read_queue


def rows_of(output, run):
    return records.read_rows(csv_file(output, run))


# ---------------------------------------------------------------- evaluations


@pytest.mark.parametrize(
    ("algo", "evaluate_at", "seen"),
    [
        # (real steps, updates) so far: trained on the steps up to then, and on nothing of the step that follows
        ("sac", (2, 8, 12), [(3, 0), (9, 4), (12, 8)]),
        ("ppo", (4, 12, 20), [(5, 0), (13, 2), (21, 4)]),  # learns after 8 and 16 steps; ends in the middle of a rollout
        ("mbmpo", (10, 20, 50), [(11, 0), (21, 1), (50, 3)]),  # learns after 20, 40 and 50 steps
    ],
)
def test_policy_that_is_evaluated_has_learned_from_all_steps_so_far(algo, evaluate_at, seen, tmp_path, monkeypatch):
    found = []

    def evaluate(model, env, run):
        found.append((model.num_timesteps, model._n_updates))
        return np.array([1.0, 3.0])

    monkeypatch.setattr(training, "evaluate", evaluate)
    run = pendulum(algo, evaluate_at)
    training.train(run, tmp_path, MACHINE)
    assert found == seen
    rows = [[row["real_steps"], row["mean_return"], row["std_return"]] for row in rows_of(tmp_path, run)]
    assert rows == [[str(n), "2", "1"] for n in evaluate_at]
    assert steps_left(tmp_path, run) == []
    assert not work_folder(tmp_path, run).exists()


@pytest.mark.parametrize("normalize", [None, {"gamma": 0.9}])
def test_evaluation_is_of_the_same_episodes_each_time_in_raw_rewards(normalize, tmp_path):
    run = pendulum("ppo")
    recipe = make_recipe(run)._replace(normalize=normalize)
    env, evaluation_env = (training.make_env(run, recipe, seed, n) for seed, n in ((0, 1), (5, 2)))
    model = recipe.algorithm(env=env, seed=0, **recipe.arguments)
    model.learn(8)
    expected = []
    for episode in range(2):
        single = gym.make("Pendulum-v1", max_episode_steps=10)
        obs, _ = single.reset(seed=evaluation_seed(0) + episode)
        total, done = 0.0, False
        while not done:
            seen = obs if normalize is None else env.normalize_obs(obs)
            obs, reward, _, done, _ = single.step(model.predict(seen, deterministic=True)[0])
            total += reward
        expected.append(total)
    before = None if normalize is None else env.obs_rms.count
    for _ in range(2):
        assert training.evaluate(model, evaluation_env, run) == pytest.approx(expected, rel=1e-4)
    assert before is None or env.obs_rms.count == before


# ---------------------------------------------------------------- interrupted runs


class CutError(Exception):
    """A stand-in for a power failure after a number of rows."""


def cut_after(n_rows, monkeypatch, run, output, **kwargs):
    append = records.append_row

    def failing(path, row):
        if len(records.read_rows(path)) == n_rows:
            raise CutError
        append(path, row)

    with monkeypatch.context() as patch:
        patch.setattr(training, "append_row", failing)
        with pytest.raises(CutError):
            training.train(run, output, MACHINE, **kwargs)


@pytest.mark.parametrize("algo", ["mbmpo", "sac", "ppo"])
def test_cut_run_goes_on_from_its_checkpoint(algo, tmp_path, monkeypatch):
    run = pendulum(algo)
    if algo == "ppo":
        monkeypatch.setattr(training, "make_recipe", lambda run: make_recipe(run)._replace(normalize={"gamma": 0.9}))
    cut_after(2, monkeypatch, run, tmp_path)
    rows = rows_of(tmp_path, run)
    assert [row["real_steps"] for row in rows] == ["20", "40"]
    path, state = checkpoints.find_checkpoint(work_folder(tmp_path, run))
    # After the first start of a rollout that follows an evaluation; MBMPO's rollout from 40 to 60 steps was the last one
    names = {"mbmpo": "steps-000000040", "sac": "steps-000000041", "ppo": "steps-000000048"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name] == [names[algo]]
    begun = []
    load = checkpoints.load_model
    monkeypatch.setattr(training, "load_model", lambda *args: begun.append(load(*args)) or begun[-1])
    training.train(run, tmp_path, MACHINE)
    assert rows_of(tmp_path, run)[:2] == rows
    assert steps_left(tmp_path, run) == []
    assert begun[0].num_timesteps >= 60
    for column, seconds in zip(("wall_seconds", "cpu_seconds"), state["seconds"], strict=True):
        assert float(rows_of(tmp_path, run)[2][column]) >= round(seconds, 1)
        assert seconds > 0


def test_checkpoints_come_with_time_too_and_only_the_newest_stays(tmp_path, monkeypatch):
    saved = []
    original = checkpoints.save_checkpoint

    def save(folder, model, state):
        original(folder, model, state)
        saved.append((model.num_timesteps, [path.name for path in folder.iterdir()]))

    monkeypatch.setattr(training, "save_checkpoint", save)
    training.train(pendulum("sac", (6,)), tmp_path, MACHINE, checkpoint_seconds=0.0)
    assert saved == [(n, [f"steps-00000000{n}"]) for n in range(1, 6)]


def test_cut_run_without_checkpoint_begins_anew_and_keeps_its_rows(tmp_path):
    run = pendulum("sac", (8, 12))
    records.append_row(csv_file(tmp_path, run), origin_of(run) | {"real_steps": 8})
    training.train(run, tmp_path, MACHINE)
    first, second = rows_of(tmp_path, run)
    assert (first["real_steps"], first["mean_return"], second["real_steps"]) == ("8", "-5", "12")


def origin_of(run):
    measured = {"wall_seconds": 1.0, "cpu_seconds": 1.0, "mean_return": -5, "std_return": 0.0}
    return {**measured, "environment": training.describe_environment(run), "settings": make_recipe(run).settings, **MACHINE}


@pytest.mark.parametrize(
    ("algo", "changed", "same"),
    [
        ("sac", {"settings": "rl_zoo3: other"}, False),
        ("sac", {"torch": "1.0"}, False),
        ("sac", {"environment": "Pendulum-v0"}, False),
        ("sac", {"commit": "4567def", "cpu": "another"}, True),  # our code does not affect what SAC learns
        ("mbmpo", {"commit": "4567def"}, False),
        ("mbmpo", {"cpu": "another", "threads": "2"}, True),
    ],
)
def test_rows_of_another_run_are_set_aside(algo, changed, same, tmp_path):
    run = pendulum(algo, (20, 40))
    records.append_row(csv_file(tmp_path, run), origin_of(run) | {"real_steps": 20} | changed)
    training.train(run, tmp_path, MACHINE)
    assert (rows_of(tmp_path, run)[0]["mean_return"] == "-5") == same
    assert len(list((tmp_path / ".work").glob("*.csv"))) == (0 if same else 1)


def test_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    cut_after(1, monkeypatch, pendulum("sac", (8, 12)), tmp_path)
    monkeypatch.setattr(training, "load_model", lambda *args: pytest.fail("loaded"))
    run = pendulum("sac", (8, 12), SMALL_SAC | {"learning_starts": 5})
    training.train(run, tmp_path, MACHINE)
    assert [row["settings"] for row in rows_of(tmp_path, run)] == [make_recipe(run).settings] * 2


# ---------------------------------------------------------------- several processes


def test_a_run_has_one_owner(tmp_path):
    run = pendulum()
    with claim(tmp_path, run) as first, claim(tmp_path, run) as second:
        assert (first, second) == (True, False)
    with claim(tmp_path, run) as again:
        assert again


def test_two_processes_share_a_queue_and_one_is_killed(tmp_path):
    """Each run is finished and each evaluation done once; a run that fails does not stop the others."""
    environments = {"Pendulum-v1": {"evaluate_at": list(range(20, 181, 20)), "env_kwargs": {"max_episode_steps": 10}}}
    item = {"environment": "Pendulum-v1", "algorithms": ["mbmpo"]}
    items = [item | {"seeds": [9], "overrides": ENTRY | {"n_models": 0}}, item | {"seeds": [0, 1], "overrides": ENTRY}]
    queue = write_queue(tmp_path / "queue.yml", environments, items, n_eval_episodes=1)
    options = ["--queue", str(queue), "--commit", "abc", "--checkpoint-minutes", "0"]
    command = [sys.executable, "-m", "tuning.results", "run", *options]
    processes = []
    for name in ("a.txt", "b.txt"):
        with (tmp_path / name).open("w") as out:
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + 300
        while "real steps" not in (tmp_path / "a.txt").read_text():
            assert time.monotonic() < deadline, (tmp_path / "a.txt").read_text()
            assert processes[0].poll() is None, (tmp_path / "a.txt").read_text()
            time.sleep(0.01)
        processes[0].send_signal(signal.SIGKILL)
        status = processes[1].wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [(tmp_path / name).read_text() for name in ("a.txt", "b.txt")]
    assert status == 1
    assert "Failed, see above: mbmpo-Pendulum-v1-seed9" in texts[1]
    assert "n_models" in texts[1]
    runs = read_queue(queue)
    for run in runs[1:]:
        assert [int(row["real_steps"]) for row in rows_of(tmp_path / "runs", run)] == list(run.evaluate_at)
    told = Counter(line.partition(" real steps")[0] for text in texts for line in text.splitlines() if "real steps, " in line)
    assert set(told.values()) == {1}
    assert len(told) >= 17  # a process may be killed after writing a row and before reporting it
