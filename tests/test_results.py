"""Learning curves of tuning/results: queue, fair peers, evaluations, interrupted and killed runs, numbers of the page."""

import csv
import io
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from rl_zoo3 import ALGOS

from sb3_mbmpo import MBMPO, zoo
from tuning.results import __main__ as command_line
from tuning.results import checkpoints, curves, page, plots, recipes, records, training, workers
from tuning.results.files import claim, csv_file, steps_left, work_folder
from tuning.results.recipes import default_of, make_recipe
from tuning.results.runs import Run, read_queue

ROOT = Path(__file__).parents[1]
MACHINE = records.describe_machine("0123abc", threads=1)
ORIGIN = {"environment": "Pendulum-v1", "settings": "as they are", **MACHINE}
TINY = dict(
    learning_starts=20,
    n_steps=20,
    n_models=2,
    n_tasks=2,
    n_imagined_rollouts=2,
    horizon=5,
    n_meta_steps=1,
    policy_kwargs=dict(net_arch=[8]),
    dynamics_kwargs=dict(net_arch=[8], max_epochs=2),
)
# rl_zoo3's PPO for Pendulum collects 4 x 1,024 steps before it learns
SMALL_SAC = dict(learning_starts=4, policy_kwargs=dict(net_arch=[8]))
SMALL_PPO = dict(n_envs=1, n_steps=8, batch_size=8, n_epochs=2)


def pendulum(algo="mbmpo", evaluate_at=(20, 40, 60), overrides=None, **kwargs):
    if overrides is None:
        overrides = {"mbmpo": TINY, "sac": SMALL_SAC, "ppo": SMALL_PPO}.get(algo, {})
    settings = dict(env_id="Pendulum-v1", env_kwargs={"max_episode_steps": 10}, entry="Pendulum-v1", seed=0, n_eval_episodes=2)
    return Run(algo, "Pendulum-v1", evaluate_at=evaluate_at, overrides=overrides, **settings | kwargs)


def rows_of(output, run):
    return records.read_rows(csv_file(output, run))


# ---------------------------------------------------------------- queue


def write_queue(path, environments=None, queue=(), **others):
    document = {"environments": environments or {"Pendulum-v1": {"evaluate_at": [100, 200]}}, "queue": list(queue), **others}
    path.write_text(yaml.safe_dump(document))
    return path


def test_queue_is_done_seed_by_seed_with_the_same_episodes_for_all(tmp_path):
    environments = {
        "HalfCheetah-v5": {"evaluate_at": [100, 200]},
        "Long": {"evaluate_at": [7], "entry": "HalfCheetah-v5", "env_kwargs": {}, "learning_starts": 3},
    }
    items = [
        {"environment": "Long", "algorithms": ["sac"], "seeds": [4]},
        {"environment": "HalfCheetah-v5", "algorithms": ["mbmpo", "sac"], "seeds": [0, 1], "max_steps": 150},
    ]
    runs = read_queue(write_queue(tmp_path / "queue.yml", environments, items, n_eval_episodes=3))
    assert [run.name for run in runs] == [
        "sac-Long-seed4",
        *("mbmpo-HalfCheetah-v5-seed0", "sac-HalfCheetah-v5-seed0", "mbmpo-HalfCheetah-v5-seed1", "sac-HalfCheetah-v5-seed1"),
    ]
    assert {run.n_eval_episodes for run in runs} == {3}
    assert (runs[0].env_id, runs[0].env_kwargs, runs[0].learning_starts) == ("HalfCheetah-v5", {}, 3)
    assert [(run.env_kwargs, run.evaluate_at) for run in runs[1:]] == [({"max_episode_steps": 200}, (100,))] * 4


ITEM = {"environment": "Pendulum-v1", "algorithms": ["sac"], "seeds": [0]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"queue": [ITEM, ITEM]}, "sac-Pendulum-v1-seed0 twice"),
        ({"queue": [ITEM | {"algorithms": ["a2c"]}]}, r"algorithms \['a2c'\] are not among mbmpo, sac"),
        ({"queue": [ITEM | {"environment": "Hopper-v5"}]}, "'Hopper-v5' is not one of Pendulum-v1"),
        ({"queue": [ITEM | {"max_steps": 99}]}, "max_steps=99 leaves no evaluation of Pendulum-v1: the first is at 100"),
        ({"queue": [ITEM | {"seed": 3}]}, r"unknown \['seed'\]"),
        ({"queue": [{"environment": "Pendulum-v1"}]}, r"lacks \['algorithms', 'seeds'\]"),
        ({"environments": {"Pendulum-v7": {"evaluate_at": [1]}}}, "no entry 'Pendulum-v7'"),
        ({"environments": {"Pendulum-v1": {"evaluate_at": [200, 100]}}}, r"ascending.*\[200, 100\]"),
        ({"environments": {"Pendulum-v1": {"evaluate_at": []}}}, "ascending"),
        ({"environments": {"Pendulum-v1": {"evaluate_at": [0]}}}, "positive"),
        ({"environments": {"Pendulum-v1": [100]}}, r"must be a dictionary with evaluate_at, not \[100\]"),
        ({"n_episodes": 3}, "n_episodes"),
    ],
)
def test_queue_that_cannot_work(document, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_queue(write_queue(tmp_path / "queue.yml", **document))


def test_shipped_queue_trains_everything_with_the_same_episodes_and_no_more_random_steps_than_ours():
    runs = read_queue(ROOT / command_line.QUEUE)
    environments = {run.environment for run in runs}
    assert len(environments) == 13
    assert {run.environment for run in runs if run.algo == "mbmpo"} == environments
    config = yaml.safe_load(zoo.config_file().read_text())
    checked = {}
    for run in runs:
        if run.algo != "mbmpo" and (run.algo, run.environment) not in checked:
            arguments = checked[run.algo, run.environment] = make_recipe(run).arguments
            starts = arguments.get("learning_starts", default_of(ALGOS[run.algo], "learning_starts")) or 0
            assert starts <= config[run.entry].get("learning_starts", default_of(MBMPO, "learning_starts")), run.name
    assert len({run.env_id for run in runs}) == 12


# ---------------------------------------------------------------- recipes


def run_in(env_id, algo, overrides=None, n_timesteps=50, learning_starts=7):
    return Run(algo, env_id, env_id, {}, "default", 0, (n_timesteps,), learning_starts, overrides=overrides or {})


def test_peers_have_the_tuned_settings_of_rl_zoo3_as_it_reads_them():
    sac = make_recipe(run_in("HalfCheetah-v5", "sac"))
    assert sac.algorithm is ALGOS["sac"]
    assert sac.arguments == {"policy": "MlpPolicy", "learning_starts": 7, "buffer_size": 50}
    assert sac.settings == "rl_zoo3: HalfCheetah-v4; learning_starts=7 (there 10000)"
    assert (sac.n_envs, sac.normalize, sac.wrapper) == (1, None, None)

    ppo = make_recipe(run_in("CartPole-v1", "ppo"))
    assert ppo.n_envs == 8
    assert [ppo.arguments["clip_range"](progress) for progress in (1.0, 0.5)] == pytest.approx([0.2, 0.1])  # from "lin_0.2"
    assert ppo.settings == "rl_zoo3: CartPole-v1"

    ppo = make_recipe(run_in("Reacher-v5", "ppo"))  # rl_zoo3 has only v2; HalfCheetah's policy_kwargs are Python code
    assert (ppo.settings, ppo.normalize) == ("rl_zoo3: Reacher-v2", {"gamma": 0.9})
    assert make_recipe(run_in("HalfCheetah-v5", "ppo")).arguments["policy_kwargs"]["log_std_init"] == -2

    sac = make_recipe(run_in("InvertedPendulum-v5", "sac", n_timesteps=10))  # SB3's default of learning_starts is 100
    assert sac.settings == "defaults of SB3: rl_zoo3 has no tuned entry; learning_starts=7 (there 100)"
    assert "learning_starts" not in make_recipe(run_in("Acrobot-v1", "ppo")).arguments


def test_overrides_replace_settings_and_are_told():
    narrow = {"policy_kwargs": {"net_arch": {"pi": [4], "qf": [5]}}}
    crossq = make_recipe(run_in("Hopper-v5", "crossq", narrow, learning_starts=9000))
    assert crossq.arguments["policy_kwargs"] == narrow["policy_kwargs"]
    assert crossq.arguments["learning_starts"] == 5000
    there = "dict(net_arch=dict(pi=[256, 256], qf=[2048, 2048]))"
    assert crossq.settings == f"rl_zoo3: Hopper-v4; policy_kwargs={narrow['policy_kwargs']} (there {there})"

    ours = make_recipe(pendulum(overrides={"inner_lr": 0.5, "dynamics_kwargs": {"max_epochs": 3}}))
    entry = zoo.read_config("Pendulum-v1")
    assert ours.arguments["inner_lr"] == 0.5
    assert ours.arguments["dynamics_kwargs"] == entry.get("dynamics_kwargs", {}) | {"max_epochs": 3}
    assert "n_timesteps" not in ours.arguments
    assert ours.settings == "zoo_configs/mbmpo.yml: Pendulum-v1; inner_lr=0.5; dynamics_kwargs={'max_epochs': 3}"


def test_what_rl_zoo3_asks_for_and_we_do_not_know_is_refused(monkeypatch):
    monkeypatch.setattr(recipes, "read_zoo", lambda algo, env_id: ("Mine-v1", {"policy": "MlpPolicy", "frame_stack": 4}))
    with pytest.raises(ValueError, match=r"support \['frame_stack'\], which rl_zoo3's settings Mine-v1 of sac"):
        make_recipe(run_in("Pendulum-v1", "sac"))


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
        obs, _ = single.reset(seed=training.EVALUATION_SEED + episode)
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


# ---------------------------------------------------------------- rows


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


# ---------------------------------------------------------------- several processes


def test_a_run_has_one_owner(tmp_path):
    run = pendulum()
    with claim(tmp_path, run) as first, claim(tmp_path, run) as second:
        assert (first, second) == (True, False)
    with claim(tmp_path, run) as again:
        assert again


def test_patterns_select_runs():
    runs = [pendulum(algo, seed=seed) for algo in ("mbmpo", "sac") for seed in (0, 1)]
    assert workers.select(runs, []) == runs
    assert [run.name for run in workers.select(runs, ["sac-*", "*-seed1"])] == [run.name for run in runs[1:]]
    with pytest.raises(ValueError, match=r"'tqc-\*' matches no run of the queue; names look like mbmpo-Pendulum-v1-seed0"):
        workers.select(runs, ["tqc-*"])


def test_two_processes_share_a_queue_and_one_is_killed(tmp_path):
    """Each run is finished and each evaluation done once; a run that fails does not stop the others."""
    environments = {"Pendulum-v1": {"evaluate_at": list(range(20, 181, 20)), "env_kwargs": {"max_episode_steps": 10}}}
    item = {"environment": "Pendulum-v1", "algorithms": ["mbmpo"]}
    items = [item | {"seeds": [9], "overrides": TINY | {"n_models": 0}}, item | {"seeds": [0, 1], "overrides": TINY}]
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


# ---------------------------------------------------------------- page


def write_curve(output, algo, seed, returns, seconds=1.0):
    for step, value in returns.items():
        measured = (step, 9 * seconds * step, seconds * step, value, 1.0)
        row = ORIGIN | dict(zip(records.MEASURED, measured, strict=True))
        records.append_row(csv_file(output, pendulum(algo, seed=seed)), row)


@pytest.fixture
def measured(tmp_path):
    """Write a queue with handmade rows of three algorithms."""
    items = [
        {"environment": "Pendulum-v1", "algorithms": ["sac", "mbmpo"], "seeds": [0, 1, 2]},
        {"environment": "Pendulum-v1", "algorithms": ["ppo"], "seeds": [0], "max_steps": 200},
        {"environment": "Pendulum-v1", "algorithms": ["tqc"], "seeds": [0]},
    ]
    environments = {"Pendulum-v1": {"evaluate_at": [100, 200, 400]}}
    folder = tmp_path / "results"
    folder.mkdir()
    queue = write_queue(folder / "queue.yml", environments, items, picture=["Pendulum-v1"])
    write_curve(folder / "runs", "mbmpo", 0, {100: -900.4, 200: -150, 400: -99.94}, 2.0)
    write_curve(folder / "runs", "mbmpo", 1, {100: -700, 200: -170, 400: -99.94}, 4.0)
    write_curve(folder / "runs", "mbmpo", 2, {100: -800, 200: -1160}, 3.0)
    write_curve(folder / "runs", "sac", 0, {100: -1300, 200: -150, 400: -50})
    write_curve(folder / "runs", "sac", 1, {100: -1100, 200: -190, 400: -40})
    write_curve(folder / "runs", "sac", 2, {100: -1200, 200: -170, 400: -60})
    write_curve(folder / "runs", "ppo", 0, {100: -1000, 200: -1000})
    return queue


def test_page_has_the_right_numbers(measured):
    path = page.write_page(measured, measured.parent / "runs")
    assert path == measured.parent.with_suffix(".md")
    lines = path.read_text().splitlines()
    table = [line for line in lines if line.startswith(("| real steps", "| 100", "| 200", "| 400", "| processor"))]
    assert table == [
        "| real steps | MB-MPO (seeds 0 1 2) | SAC (seeds 0 1 2) | PPO (seeds 0) |",
        "| 100 | **-800** (-900 -700 -800) | -1,200 (-1,300 -1,100 -1,200) | -1,000 |",
        "| 200 | **-170** (-150 -170 -1,160) | **-170** (-150 -190 -170) | -1,000 |",
        "| 400 | -99.9 (-99.9 -99.9 -) | **-50.0** (-50.0 -40.0 -60.0) |  |",
        "| processor time | 20 min for 400 | 6.7 min for 400 | 3.3 min for 200 |",
    ]
    text = "\n".join(lines)
    assert (
        "`Pendulum-v1`. MB-MPO's median is ahead of every peer's at 100; level with the best peer's at 200; behind SAC at 400 "
        "real steps." in text
    )
    assert "Not finished yet: MB-MPO seed 2." in text
    assert "| Pendulum-v1 | 100 | **-800** | -1,000 (PPO) |" in text
    assert "| Pendulum-v1 | 200 | -170 | -170 (SAC) |" in text
    assert "| Pendulum-v1 | 400 | -99.9 | **-50.0 (SAC)** |" in text
    assert "| SAC | Pendulum-v1 | as they are |" in text
    assert "| commit (MB-MPO's runs) | 0123abc |" in text
    assert f"| torch | {MACHINE['torch']} |" in text
    for picture in (measured.parent / "Pendulum-v1.png", measured.parent.parent / "images" / "results.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(results/Pendulum-v1.png)" in text


def test_variants_have_runs_of_their_own_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "save_environment", lambda *arguments: None)
    monkeypatch.setattr(page, "save_overview", lambda *arguments: None)
    items = [
        {"environment": "Pendulum-v1", "algorithms": ["mbmpo"], "seeds": [0, 1, 2]},
        {
            "environment": "Pendulum-v1",
            "algorithms": ["mbmpo"],
            "seeds": [0, 1],
            "variant": "horizon-10",
            "overrides": {"horizon": 10},
            "max_steps": 200,
        },
    ]
    (folder := tmp_path / "results").mkdir()
    queue = write_queue(folder / "queue.yml", {"Pendulum-v1": {"evaluate_at": [100, 200, 400]}}, items)
    runs = read_queue(queue)
    assert [run.name for run in runs][2:4] == ["mbmpo-Pendulum-v1-seed2", "mbmpo-Pendulum-v1-horizon-10-seed0"]
    write_curve(folder / "runs", "mbmpo", 0, {100: -900, 200: -150, 400: -99})
    write_curve(folder / "runs", "mbmpo", 2, {100: -1, 200: -1, 400: -1})
    for run, returns in ((runs[3], {100: -850}), (runs[4], {100: -800, 200: -700})):
        for step, value in returns.items():
            row = ORIGIN | dict(zip(records.MEASURED, (step, 1.0, 1.0, value, 1.0), strict=True))
            records.append_row(csv_file(folder / "runs", run), row)
    lines = page.write_page(queue, folder / "runs").read_text().splitlines()
    table = lines[lines.index("| variant (seeds 0 1) | 100 | 200 |") :]
    assert table[2:4] == ["| unchanged | -900 - | -150 - |", "| horizon-10 | -850 -800 | - -700 |"]
    assert "horizon-10" not in "\n".join(lines[: lines.index("## Ablation: Pendulum-v1")])


def test_what_was_written_by_hand_stays_on_the_page(measured, monkeypatch):
    monkeypatch.setattr(page, "save_environment", lambda *arguments: None)
    monkeypatch.setattr(page, "save_overview", lambda *arguments: None)
    path = page.write_page(measured, measured.parent / "runs")
    first = path.read_text()
    path.write_text(first.replace("## Pendulum-v1\n", "## Pendulum-v1, by hand\n\nTried: a\\b.\n").replace("-1,200", "stale"))
    page.write_page(measured, measured.parent / "runs")
    assert path.read_text() == first.replace("## Pendulum-v1\n", "## Pendulum-v1, by hand\n\nTried: a\\b.\n")


def test_curves_that_are_drawn(measured):
    of_environment = curves.read_curves(read_queue(measured), measured.parent / "runs", "processor")["Pendulum-v1"]
    assert list(of_environment) == ["mbmpo", "sac", "ppo"]
    steps, means = plots.mean_curve(of_environment["mbmpo"])
    assert steps == [100, 200, 400]
    assert means == pytest.approx([-2400.4 / 3, -1480 / 3, -99.94])
    assert plots.mean_curve(of_environment["mbmpo"][1:])[0] == [100, 200]  # 400: one seed of two makes no mean
    assert plots.mean_curve(of_environment["ppo"]) == ([100, 200], [-1000, -1000])
    assert curves.median_seconds(of_environment["mbmpo"], 200) == 600
    by_wall_time = curves.read_curves(read_queue(measured), measured.parent / "runs", "wall")["Pendulum-v1"]
    assert curves.median_seconds(by_wall_time["mbmpo"], 200) == 5400


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2.0 min"), (1500, "25 min"), (7200, "2.0 h"), (72_000, "20 h")]
)
def test_duration(seconds, text):
    assert page.duration(seconds) == text


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("run --queue missing.yml", "missing.yml"),
        ("run --jobs 0", "must be an integer of at least 1, not '0'"),
        ("run --only tqc-Pendulum*", "'tqc-Pendulum*' matches no run"),
        ("page --output nowhere", "nowhere has no rows of any run"),
    ],
)
def test_command_lines_that_cannot_work(options, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        command_line.main(options.split())
    assert message in f"{ended.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(("missing", "options"), [("rl_zoo3", "run --only sac-Pendulum* --commit a"), ("matplotlib", "page")])
def test_missing_package_is_named_with_what_to_install(missing, options, monkeypatch):
    monkeypatch.chdir(ROOT)
    find = command_line.find_spec
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(SystemExit, match=rf"needs {missing}: pip install -c constraints.txt '\.\[tuning,zoo\]'"):
        command_line.main(options.split())
