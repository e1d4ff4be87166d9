"""Options of the command line: changed settings, TensorBoard, the list of environments; and what MuJoCo says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from killed_runs import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_mbmpo import MBMPO
from sb3_mbmpo.__main__ import main
from sb3_mbmpo.cli import environments
from sb3_mbmpo.report.run_log import read_progress

ROOT = Path(__file__).parent.parent


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
    assert environments.results_folder() == ROOT / "docs" / "results" / "runs"
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert re.fullmatch(r"MuJoCo: Nan, Inf or huge value in QPOS at DOF 2\. The simulation is unstable\. .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
