"""Train MB-MPO on Pendulum-v1 and save it: two thousand real steps, a minute or two."""

import argparse

from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mbmpo import MBMPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="a few steps only, to see that it runs")
args = parser.parse_args()

model = MBMPO(
    "MlpPolicy",
    "Pendulum-v1",
    learning_starts=100 if args.fast else 600,  # random real steps before the first model
    n_steps=200,  # real steps before each of the next ones
    n_tasks=10,
    n_imagined_rollouts=1 if args.fast else 20,
    n_meta_steps=1 if args.fast else 15,
    horizon=100,  # imagined steps: errors of the models add up
    imagined_start="buffer",  # imagine from any state that was seen, not only from first ones
    stop_on_return_drop=True,
    policy_kwargs=dict(net_arch=[32, 32], log_std_init=-0.5),
    dynamics_kwargs=dict(net_arch=[200, 200], max_epochs=1 if args.fast else 100, batch_size=64),
    seed=args.seed,
)
model.learn(300 if args.fast else 2_000, progress_bar=True)

mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=2 if args.fast else 20)
print(f"Return after {model.num_timesteps} real steps: {mean:.0f} +- {std:.0f}; a random policy earns about -1200")
model.save("pendulum")
model.save_replay_buffer("pendulum_buffer")
