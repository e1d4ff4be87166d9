"""Learning curves: which runs a queue has, in which order, with which settings, and the command line."""

import pytest
import yaml
from rl_zoo3 import ALGOS
from tiny_runs import ROOT, pendulum, write_queue

from sb3_mbmpo import MBMPO, zoo
from tuning.results import __main__ as command_line
from tuning.results import recipes, workers
from tuning.results.recipes import default_of, make_recipe
from tuning.results.runs import Run, read_queue

# ---------------------------------------------------------------- queue


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


def test_patterns_select_runs():
    runs = [pendulum(algo, seed=seed) for algo in ("mbmpo", "sac") for seed in (0, 1)]
    assert workers.select(runs, []) == runs
    assert [run.name for run in workers.select(runs, ["sac-*", "*-seed1"])] == [run.name for run in runs[1:]]
    with pytest.raises(ValueError, match=r"'tqc-\*' matches no run of the queue; names look like mbmpo-Pendulum-v1-seed0"):
        workers.select(runs, ["tqc-*"])


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
