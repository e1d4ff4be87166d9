"""Learn models from a file of recorded steps, without any environment, and train an SB3 algorithm inside them."""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbmpo import DynamicsEnsemble, ModelVecEnv
from sb3_mbmpo.offline import load_transitions

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="run only a few steps, as a quick check")
args = parser.parse_args()

# A stand-in for recorded data: 20 episodes of random actions
env = Monitor(gym.make("Pendulum-v1"))
env.action_space.seed(args.seed)
steps = []
for episode in range(2 if args.fast else 20):
    obs, _ = env.reset(seed=args.seed + 1_000 * episode)
    truncated = False
    while not truncated:
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        steps.append((obs, action, next_obs, reward, terminated))
        obs = next_obs
names = ("observations", "actions", "next_observations", "rewards", "terminations")
np.savez("recording.npz", **{name: np.array(column) for name, column in zip(names, zip(*steps, strict=True), strict=True)})

data = load_transitions("recording.npz", action_space=spaces.Box(-2, 2, (1,)))
ensemble = DynamicsEnsemble(data.observation_space, data.action_space, learned_reward=True, seed=args.seed)
ensemble.fit(data.transitions, max_epochs=1 if args.fast else 100, max_gradient_steps=2_000)
ensemble.save("ensemble")  # load it with DynamicsEnsemble.load("ensemble")

# Short episodes that start from all recorded states, because errors accumulate over imagined steps
imagined_env = ModelVecEnv(ensemble, data.transitions.obs.numpy(), n_envs=32, horizon=50, resample_model="step")
ppo = PPO("MlpPolicy", imagined_env, n_steps=64, batch_size=128, gamma=0.95, learning_rate=1e-3, device="cpu", seed=args.seed)
ppo.learn(2_048 if args.fast else 200_000, progress_bar=True)

mean, std = evaluate_policy(ppo, env, n_eval_episodes=2 if args.fast else 20)
print(f"PPO's return in the real environment, which it has never seen before: {mean:.0f} +- {std:.0f}")
