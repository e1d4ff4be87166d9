"""MB-MPO learns: returns of deterministic episodes in real environments, with the shipped settings."""

import time

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mbmpo import MBMPO
from sb3_mbmpo.__main__ import main


def trained_return(capsys: pytest.CaptureFixture[str], tmp_path, *arguments: str) -> float:
    """Train with the command line and return the last return that it reports."""
    main(["train", "--no-progress-bar", "--save", str(tmp_path / "model.zip"), *arguments])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("MB-MPO")]
    return float(rows[-1][-2])


def test_pendulum_improves_within_1000_real_steps(capsys, tmp_path):
    # Five episodes of random actions, and one training. A random policy's mean over 10 episodes is about -1200 +- 100, so that
    # reaching -700 by luck would take five standard deviations
    arguments = ("--env", "Pendulum-v1", "--total-timesteps", "1000", "--eval-episodes", "10")
    assert trained_return(capsys, tmp_path, *arguments) > -700


def test_a_random_policy_does_not_pass_the_test_above():
    from sb3_mbmpo.report.episodes import RandomPolicy

    env = make_vec_env("Pendulum-v1", seed=10_000)
    policy = RandomPolicy(env.action_space, 0)
    assert evaluate_policy(policy, env, n_eval_episodes=10)[0] < -700


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "seed", "bar"),
    [
        ("Pendulum-v1", 0, -200),
        ("Pendulum-v1", 1, -200),
        ("Pendulum-v1", 2, -200),
        ("CartPole-v1", 0, 475),
        ("InvertedPendulum-v5", 0, 950),
    ],
)
def test_shipped_settings_reach_the_bar(env, seed, bar, capsys, tmp_path):
    assert trained_return(capsys, tmp_path, "--env", env, "--seed", str(seed)) >= bar


@pytest.mark.slow
def test_half_cheetah_learns_from_20_000_real_steps(capsys, tmp_path):
    # SB3's tuned SAC is at 13 there
    arguments = ("--env", "HalfCheetah-v5", "--seed", "2", "--total-timesteps", "20000", "--eval-episodes", "10")
    assert trained_return(capsys, tmp_path, *arguments) >= 600


def seconds_of_an_iteration(n_real_steps):
    """Return the processor times of three trainings on that many real steps, 500 of which are new."""
    env = make_vec_env("HalfCheetah-v5", seed=0, env_kwargs=dict(max_episode_steps=200))
    model = MBMPO("MlpPolicy", env, learning_starts=n_real_steps + 1, n_meta_steps=4, seed=0)
    model.learn(n_real_steps)  # random steps only: the first fit would come one step later
    times = []
    for _ in range(3):
        model._n_new_steps = 500
        start = time.process_time()
        model.train()
        times.append(time.process_time() - start)
    return times


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Nothing will be learned")
def test_an_iteration_takes_no_longer_with_twice_the_data():
    # So 100,000 real steps cost no more than twice what 50,000 do
    half, whole = (np.median(seconds_of_an_iteration(n_real_steps)) for n_real_steps in (50_000, 100_000))
    print(f"an iteration with 50,000 rows: {half:.1f} s, with 100,000: {whole:.1f} s of processor time")
    assert whole < 1.2 * half


# ---------------------------------------------------------------- few-shot adaptation


# The training pendulum has length 1 and gravity 10. The meta-policy copes with smaller changes without adaptation
CHANGES = {"l": 1.5, "g": 15.0}


def changed_pendulum(name):
    """Return a function that makes a pendulum whose length "l" or gravity "g" is changed as in ``CHANGES``."""

    def make():
        env = gym.make("Pendulum-v1")
        setattr(env.unwrapped, name, CHANGES[name])
        return env

    return make


def mean_return(policy, make_env):
    """Return the mean return of 50 deterministic episodes of 200 steps, with the same first states for every policy."""
    env = make_vec_env(make_env, 50, seed=20_000)
    obs, total = env.reset(), np.zeros(50)
    for _ in range(200):
        obs, rewards, _, _ = env.step(policy.predict(obs, deterministic=True)[0])
        total += rewards
    return total.mean()


def gains(model, name, batches):
    """Return the meta-policy's return, and by how much each adaptation to ten episodes improves it."""
    make_env = changed_pendulum(name)
    before = mean_return(model.policy, make_env)
    found = []
    for batch in range(batches):
        model.set_random_seed(batch)  # other actions and first states for each batch
        adapted = model.adapt(make_vec_env(make_env, 10, seed=30_000 + 100 * batch), inner_lr=0.02)
        found.append(mean_return(adapted, make_env) - before)
    return before, found


@pytest.mark.slow
def test_ten_episodes_adapt_to_a_changed_pendulum_on_average_over_five_seeds(tmp_path):
    found = {name: [] for name in CHANGES}
    for seed in range(5):
        path = tmp_path / f"{seed}.zip"
        main(["train", "--env", "Pendulum-v1", "--seed", str(seed), "--no-progress-bar", "--save", str(path)])
        for name in found:
            found[name].append(gains(MBMPO.load(path), name, batches=4))
    for name, by_seed in found.items():
        before, after = zip(*by_seed, strict=True)
        print(
            f"{name} {CHANGES[name]}: meta-policy {np.round(before)}, gains {np.mean(after):.0f} on average, by seed\n"
            f"{np.round(after)}"
        )
        assert np.mean(after) > 0, f"{name}: {by_seed}"
