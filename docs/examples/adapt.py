"""
Adapt the policy that train.py learned to a pendulum whose motor pulls to one side, from ten real episodes with it.

It shows how to adapt, and that the result has to be compared. Of three policies that train.py learned, with three seeds, one
gained 314 here, one nothing, and one 72 or 429, by the ten episodes; other changes gained nothing, or lost. Figures of
several are in docs/guide/few-shot.md.
"""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mbmpo import MBMPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="run only a few steps, as a quick check")
args = parser.parse_args()


def skewed():
    """Make the pendulum that differs from the one in training."""
    env = gym.make("Pendulum-v1")  # its motor has torques of -2 to 2
    return gym.wrappers.TransformAction(env, lambda torque: torque + 1, env.action_space)


model = MBMPO.load("pendulum")
# A larger policy-gradient step than in training, because this pendulum differs from the old one more than the models do
env = make_vec_env(skewed, seed=args.seed)
policy = model.adapt(env, n_episodes=1 if args.fast else 10, inner_lr=0.02)

for name, candidate in {"meta-policy": model.policy, "adapted": policy}.items():
    env = make_vec_env(skewed, seed=1_000)  # the same first states for both
    returns, _ = evaluate_policy(candidate, env, n_eval_episodes=1 if args.fast else 50, return_episode_rewards=True)
    print(f"{name:>12}: mean return {np.mean(returns):.0f}")
