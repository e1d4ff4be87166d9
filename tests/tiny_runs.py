"""Runs of learning curves that take a second, and a queue of them."""

from pathlib import Path

import yaml
from tiny import ENTRY

from tuning.results import records
from tuning.results.runs import Run

ROOT = Path(__file__).parents[1]
MACHINE = records.describe_machine("0123abc", threads=1)
# rl_zoo3's PPO for Pendulum collects 4 x 1,024 steps before it learns
SMALL_SAC = dict(learning_starts=4, policy_kwargs=dict(net_arch=[8]))
SMALL_PPO = dict(n_envs=1, n_steps=8, batch_size=8, n_epochs=2)


def pendulum(algo="mbmpo", evaluate_at=(20, 40, 60), overrides=None, **kwargs):
    if overrides is None:
        overrides = {"mbmpo": ENTRY, "sac": SMALL_SAC, "ppo": SMALL_PPO}.get(algo, {})
    settings = dict(env_id="Pendulum-v1", env_kwargs={"max_episode_steps": 10}, entry="Pendulum-v1", seed=0, n_eval_episodes=2)
    return Run(algo, "Pendulum-v1", evaluate_at=evaluate_at, overrides=overrides, **settings | kwargs)


def write_queue(path, environments=None, queue=(), **others):
    document = {"environments": environments or {"Pendulum-v1": {"evaluate_at": [100, 200]}}, "queue": list(queue), **others}
    path.write_text(yaml.safe_dump(document))
    return path
