"""Use a custom reward: the pendulum is rewarded for spinning instead of for standing upright."""

import argparse

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mbmpo import MBMPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="run only a few steps, as a quick check")
args = parser.parse_args()


def spin(obs, action, next_obs):
    """Return one reward per row of a batch of torch tensors. The last of the three observations is the angular velocity."""
    return next_obs[:, 2] - 0.1 * action[:, 0] ** 2


class Spinning(gym.Wrapper):
    """The real environment with the same reward: MBMPO compares the two and warns if they differ."""

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        return obs, float(obs[2] - 0.1 * action[0] ** 2), terminated, truncated, info


few = dict(learning_starts=100, n_steps=100, n_imagined_rollouts=1, n_meta_steps=1, dynamics_kwargs=dict(max_epochs=1))
model = MBMPO(
    "MlpPolicy",
    Spinning(gym.make("Pendulum-v1")),
    reward_fn=spin,  # the default "auto" would use a method `reward(obs, action, next_obs)` of the environment
    seed=args.seed,
    **(few if args.fast else {}),
)
model.learn(300 if args.fast else 2_000, progress_bar=True)
mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=2 if args.fast else 20)
print(f"Return of spinning: {mean:.0f} +- {std:.0f}; at full speed (8 radians per second) all the time, it would be 1600")
