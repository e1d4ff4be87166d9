"""A reward of one's own: a pendulum that is paid for spinning instead of for standing upright."""

import argparse

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mbmpo import MBMPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="a few steps only, to see that it runs")
args = parser.parse_args()


def spin(obs, action, next_obs):
    """Batches of torch tensors in, one number a row out. The last of the three observations is the angular velocity."""
    return next_obs[:, 2] - 0.1 * action[:, 0] ** 2


class Spinning(gym.Wrapper):
    """The real environment has to pay the same: MBMPO compares, and warns if the two differ."""

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        return obs, float(obs[2] - 0.1 * action[0] ** 2), terminated, truncated, info


few = dict(learning_starts=100, n_steps=100, n_imagined_rollouts=1, n_meta_steps=1, dynamics_kwargs=dict(max_epochs=1))
model = MBMPO(
    "MlpPolicy",
    Spinning(gym.make("Pendulum-v1")),
    reward_fn=spin,  # "auto" would find a method `reward(obs, action, next_obs)` of the environment
    seed=args.seed,
    **(few if args.fast else {}),
)
model.learn(300 if args.fast else 2_000, progress_bar=True)
mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=2 if args.fast else 20)
print(f"Return of spinning: {mean:.0f} +- {std:.0f}; at full speed all the time, 8 radians a second, it would be 1600")
