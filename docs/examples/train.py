"""Train MB-MPO on Pendulum-v1 with 2,000 real steps, which takes about a minute, and save it."""

import argparse

from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mbmpo import MBMPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="run only a few steps, as a quick check")
args = parser.parse_args()

few = dict(learning_starts=100, n_steps=100, n_imagined_rollouts=1, n_meta_steps=1, dynamics_kwargs=dict(max_epochs=1))
model = MBMPO("MlpPolicy", "Pendulum-v1", seed=args.seed, **(few if args.fast else {}))
model.learn(300 if args.fast else 2_000, progress_bar=True)

mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=2 if args.fast else 20)
print(f"Return after {model.num_timesteps} real steps: {mean:.0f} +- {std:.0f}; a random policy gets about -1200")
model.save("pendulum")
model.save_replay_buffer("pendulum_buffer")
