"""Command line: ``python -m sb3_mbmpo train --env Pendulum-v1`` trains, compares with a random policy, and saves."""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import BasePolicy

from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.zoo import ENV_ENTRIES, read_config


class RandomPolicy(BasePolicy):
    """Uniformly random actions: what any learned return must be compared with."""

    def _predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("predict() samples the action space")

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        """:return: one random action an environment"""
        return np.array([self.action_space.sample() for _ in range(len(observation))]), None


def train(arguments: argparse.Namespace) -> None:
    """
    Train as the configuration says, report the return at each milestone, save the model FILE.zip, and its log
    FILE/progress.csv.
    """
    config = read_config(arguments.env)
    env_id, n_envs = config.get("env_id", arguments.env), int(config.get("n_envs", 1))
    env_kwargs = config.get("env_kwargs", {})
    hyperparams = {key: value for key, value in config.items() if key not in ENV_ENTRIES}
    total = arguments.total_timesteps or int(config["n_timesteps"])
    milestones = sorted({*(step for step in arguments.eval_at if step < total), total})

    def evaluation(policy: BaseAlgorithm | BasePolicy) -> tuple[float, float]:
        # A seed of its own: neither the training episodes nor those of another milestone
        env = make_vec_env(env_id, n_envs=1, seed=arguments.seed + 10_000, env_kwargs=env_kwargs)
        mean, std = evaluate_policy(policy, env, n_eval_episodes=arguments.eval_episodes, deterministic=True)
        env.close()
        return float(np.mean(mean)), float(np.mean(std))

    env = make_vec_env(env_id, n_envs=n_envs, seed=arguments.seed, env_kwargs=env_kwargs)
    model = MBMPO(env=env, seed=arguments.seed, verbose=arguments.verbose, device=arguments.device, **hyperparams)
    if total < model.learning_starts:
        sys.exit(
            f"Nothing would be learned: all {total} real steps would be random ones, which the first fit waits for "
            f"{model.learning_starts} of (learning_starts). Ask for more --total-timesteps."
        )
    path = arguments.save or Path("runs") / f"mbmpo-{arguments.env.rpartition(':')[2]}-seed{arguments.seed}.zip"
    model.set_logger(configure(str(path.with_suffix("")), ["csv", *(["stdout"] if arguments.verbose else [])]))
    # A copy: the model draws its first actions from this very object
    random_policy = RandomPolicy(env.observation_space, copy.deepcopy(env.action_space))
    random_policy.action_space.seed(arguments.seed)

    def report(name: str, steps: int, seconds: float, policy: BaseAlgorithm | BasePolicy) -> None:
        mean, std = evaluation(policy)
        print(f"{name:<14}{steps:>12}{seconds:>10.0f} s{mean:>12.1f}{std:>10.1f}", flush=True)

    print(
        f"{env_id} {env_kwargs or ''} seed {arguments.seed}: mean return of {arguments.eval_episodes} deterministic episodes"
    )
    print(f"{'policy':<14}{'real steps':>12}{'wall time':>12}{'return':>12}{'std':>10}")
    report("random policy", 0, 0.0, random_policy)
    seconds = 0.0
    for milestone in milestones:
        start = time.perf_counter()
        model.learn(
            milestone - model.num_timesteps,
            reset_num_timesteps=model.num_timesteps == 0,
            progress_bar=not arguments.no_progress_bar,
        )
        seconds += time.perf_counter() - start
        report("MB-MPO" if model.num_timesteps >= model.learning_starts else "untrained", model.num_timesteps, seconds, model)

    model.save(path)
    model.logger.close()
    print(f"Model saved to {path}")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the verb."""
    parser = argparse.ArgumentParser(prog="python -m sb3_mbmpo", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help=train.__doc__, description=train.__doc__)
    verb.add_argument("--env", default="Pendulum-v1", help="environment id, or another entry of zoo_configs/mbmpo.yml")
    verb.add_argument("--total-timesteps", type=int, help="real steps; by default those of the configuration")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--eval-at", type=int, nargs="*", default=[], help="evaluate at these real steps too")
    verb.add_argument("--eval-episodes", type=int, default=20)
    verb.add_argument("--save", type=Path, help="where the model goes; by default runs/mbmpo-ENV-seedSEED.zip")
    verb.add_argument("--device", default="auto")
    verb.add_argument("--verbose", type=int, default=0)
    verb.add_argument("--no-progress-bar", action="store_true")
    verbs_to_functions: dict[str, Callable[[argparse.Namespace], None]] = {"train": train}
    arguments = parser.parse_args(argv)
    verbs_to_functions[arguments.verb](arguments)


if __name__ == "__main__":
    main()
