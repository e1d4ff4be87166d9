"""Warnings about the training: when they appear, that each appears once, and that healthy metrics cause none."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch as th
from tiny import tiny_model, vec_drift

from sb3_mbmpo import MBMPO
from sb3_mbmpo.common.health import EXPLOITATION_PATIENCE, LINE_SEARCH_WINDOW, TrainingHealth


def caught(act):
    """Return the messages of the warnings that a function causes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act()
    assert all(warning.category is UserWarning for warning in found)
    return [str(warning.message) for warning in found]


def returns(first, iterations, health=None):
    """
    Report the returns of a training to its health checks.

    :param iterations: (imagined return, return of the real episode that follows it)
    """
    health = health or TrainingHealth()
    health.real_episodes(first)
    for imagined, real in iterations:
        health.meta_trained(imagined, [True])
        health.real_episodes([real])


# ---------------------------------------------------------------- exploitation

# Imagined and next real return of runs with the shipped settings, and the returns of their first, random episodes
HEALTHY = {
    "HalfCheetah": (
        [-43, -60, -20],
        [(347, -52), (217, -21), (177, 30), (170, 29), (175, 44), (279, 177), (393, 211), (452, 90)],
    ),
    "HalfCheetah, other settings": ([-49, -30], [(192, -58), (84, -48), (176, -7), (222, 107), (400, 176), (511, 174)]),
    "Pendulum": (
        [-1290, -1000, -1500],
        [(-660, -900), (-227, -191), (-113, -132), (-164, -130), (-79, -195), (-55, -194)] * 2,
    ),
    "CartPole": ([22, 14, 30, 18], [(22, 16), (277, 206), (296, 290), (295, 414), (300, 500), (300, 500)]),
    "solved from the first": ([500.0] * 4, [(500, 500)] * 10),
    "imagined below the real ones": ([-100, -90], [(-500, -95)] * 10),
}


@pytest.mark.parametrize(("first", "iterations"), HEALTHY.values(), ids=HEALTHY)
def test_healthy_returns_bring_no_warning(first, iterations):
    assert caught(lambda: returns(first, iterations)) == []


def test_real_returns_that_stay_behind_are_warned_of_once_with_the_figures():
    few = [(500, -50)] * (EXPLOITATION_PATIENCE - 1)
    assert caught(lambda: returns([-60, -40], few)) == []
    messages = caught(lambda: returns([-60, -40], [(500, -51)] * 3 * EXPLOITATION_PATIENCE))
    assert len(messages) == 1
    for part in ("imagined to earn 500", "real episodes earn -51", "random actions, -50", "`n_meta_steps`", "clip_margin"):
        assert part in messages[0]


def test_one_good_iteration_starts_the_count_again():
    behind = [(500, -50)] * (EXPLOITATION_PATIENCE - 1)
    assert caught(lambda: returns([-60, -40], [*behind, (500, 200), *behind])) == []


def test_a_gain_within_the_noise_of_the_first_returns_is_none():
    assert caught(lambda: returns([-600, 400], [(500, -100)] * 10)) == []


def test_iterations_without_the_end_of_an_episode_say_nothing():
    health = TrainingHealth()

    def act():
        for _ in range(20):
            health.real_episodes([])
            health.meta_trained(500, [True])

    assert caught(act) == []


# ---------------------------------------------------------------- validation loss


def losses(values, log_likelihood=False):
    health = TrainingHealth()
    for value in values:
        health.dynamics_fitted(value, log_likelihood)


@pytest.mark.parametrize(
    "values",
    [[0.057, 0.063, 0.054, 0.037, 0.029], [0.00055, 0.00019, 0.0011, 0.00011, 0.00035], [0.9, 0.9, 2.0], [0.0, 0.0, 0.05]],
    ids=["HalfCheetah", "Pendulum", "poor from the first", "exact"],
)
def test_losses_that_change_a_little_bring_no_warning(values):
    assert caught(lambda: losses(values)) == []


@pytest.mark.parametrize(
    ("values", "log_likelihood", "figures"),
    [
        ([0.05, 0.04, 0.06, 0.2], False, ("jumped to 0.2", "after 0.05")),
        ([-4.0, -4.2, -1.0, -9.0, -0.5], True, ("jumped to -1", "after -4.1")),
        ([math.inf], False, ("jumped to inf",)),
        ([0.05, math.nan], False, ("jumped to nan", "after 0.05")),
    ],
)
def test_a_jump_of_the_loss_is_warned_of_once(values, log_likelihood, figures):
    messages = caught(lambda: losses(values * 2, log_likelihood))
    assert len(messages) == 1
    for part in (*figures, "`learning_rate`", "max_epochs"):
        assert part in messages[0]


# ---------------------------------------------------------------- line search


def searches(*iterations):
    health = TrainingHealth()
    for successes in iterations:
        health.meta_trained(0.0, successes)


def test_a_line_search_that_keeps_failing_is_warned_of_once():
    failing = [True] + [False] * (LINE_SEARCH_WINDOW - 1)
    assert caught(lambda: searches(failing[:-1])) == [], "too few for a warning"
    messages = caught(lambda: searches(failing, failing, failing))
    assert len(messages) == 1
    assert "only 3 % of the last 30 meta-steps" in messages[0]
    assert "`n_imagined_rollouts`" in messages[0]


def test_line_searches_that_fail_now_and_then_bring_no_warning():
    assert caught(lambda: searches(*[[True, False, False, False]] * 20)) == []
    assert caught(lambda: searches(*[[]] * 20)) == []


# ---------------------------------------------------------------- in MBMPO


def test_a_policy_that_exploits_bad_models_is_warned_of():
    # The models imagine a drift to 0, where the reward is highest; the real point stays where it is pushed
    model = tiny_model(
        vec_drift(length=4),
        baseline="linear",
        reward_fn=lambda obs, action, next_obs: next_obs[:, 0],
        dynamics_kwargs=dict(net_arch=[8], max_epochs=2, clip_margin=None, output_bias=[[5.0, 0.0]] * 2),
    )
    messages = caught(lambda: model.learn(20 * (2 + EXPLOITATION_PATIENCE)))
    assert [message for message in messages if "exploits the models" in message]


def test_what_was_warned_of_and_counted_is_in_the_file(tmp_path):
    model = tiny_model(baseline="linear").learn(40)
    expected = vars(model._health)
    assert expected["_imagined"] is not None
    assert len(expected["_losses"]) == 2
    assert len(expected["_first_returns"]) > 0
    model.save(tmp_path / "model")
    assert vars(MBMPO.load(tmp_path / "model")._health) == expected
    assert vars(pickle.loads(pickle.dumps(model._health))) == expected


@pytest.mark.parametrize("baseline", ["critic", "linear"])
def test_each_real_episode_counts_once(baseline):
    seen = []
    model = tiny_model(vec_drift(2, length=5, random_start=False), stats_window_size=100, baseline=baseline)
    model._health.real_episodes = lambda earned, unit="": seen.append(len(earned))
    model.learn(20).learn(20, reset_num_timesteps=False).learn(40)
    assert seen == [4, 4, 4, 4]


def test_real_episodes_longer_than_the_imagined_ones_count_in_proportion():
    seen = []
    model = tiny_model(vec_drift(length=8, random_start=False), baseline="linear", horizon=4)
    model._health.real_episodes = lambda earned, unit="": seen.extend(earned)
    model.learn(20)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    assert seen == pytest.approx([0.5 * value for value in returns])


def test_a_critic_is_held_against_discounted_returns_that_go_on_behind_time_limits():
    seen = []
    model = tiny_model(vec_drift(length=8, random_start=False), gamma=0.9, learning_starts=8, n_steps=8)
    model._health.real_episodes = lambda earned, unit="": seen.append((earned, unit))
    model.learn(8)
    model.policy.predict_values = lambda obs: th.full((len(obs), 1), 50.0)
    model.learn(8, reset_num_timesteps=False)
    rewards = model.replay_buffer.rewards[:16, 0]
    discounts = 0.9 ** np.arange(8)
    assert not model.replay_buffer.dones[:16][[*range(7), *range(8, 15)]].any(), "the point is still within its bounds"
    # Before its first fit the critic knows nothing
    assert seen[0] == ([pytest.approx(float(discounts @ rewards[:8]))], " in discounted reward")
    assert seen[1] == ([pytest.approx(float(discounts @ rewards[8:] + 0.9**8 * 50))], " in discounted reward")
