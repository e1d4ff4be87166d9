"""Train PPO entirely inside the model that train.py learned, without any further real steps."""

import argparse

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor

from sb3_mbmpo import MBMPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="run only a few steps, as a quick check")
args = parser.parse_args()

real_env = Monitor(gym.make("Pendulum-v1"))
mbmpo = MBMPO.load("pendulum", env=real_env)
mbmpo.load_replay_buffer("pendulum_buffer")  # imagined episodes start from the states in the buffer

# Errors accumulate over imagined steps, and PPO would exploit them. Hence short episodes of 50 steps, and one of the five
# models drawn anew for each step
imagined_env = mbmpo.imagined_env(n_envs=32, horizon=50, resample_model="step", seed=args.seed)
ppo = PPO(
    "MlpPolicy",
    VecMonitor(imagined_env),
    n_steps=64,
    batch_size=128,
    gamma=0.95,
    learning_rate=lambda progress_remaining: 1e-3 * progress_remaining,
    device="cpu",
    seed=args.seed,
)
ppo.learn(2_048 if args.fast else 200_000, progress_bar=True)

mean, std = evaluate_policy(ppo, real_env, n_eval_episodes=2 if args.fast else 20)
print(f"PPO's return in the real environment: {mean:.0f} +- {std:.0f}, after {mbmpo.num_timesteps} real steps of MB-MPO")
