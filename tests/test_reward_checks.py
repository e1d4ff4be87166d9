"""The errors of reward and termination functions on real steps, by hand."""

from typing import Any

import pytest
import torch as th

from sb3_mbmpo.rewards.resolve import (
    RewardFn,
    TerminationFn,
    check_reward_fn,
    check_termination_fn,
    never_terminates,
)


def shifted(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    return obs[:, 0] + th.tensor([0.0, 0.0, 0.0, 2.0])


def check(fn: RewardFn, reward: Any) -> Any:
    reward = th.tensor(reward)
    obs = reward[:, None]
    return check_reward_fn(fn, obs, obs, obs, reward)


def test_reward_errors_by_hand():
    # Standard deviation of the rewards: sqrt(5 / 4) * 2; root mean square error: sqrt(4 / 4)
    result = check(shifted, [0.0, 2.0, 4.0, 6.0])
    assert result == pytest.approx((0.5, 2.0, 1 / 5**0.5))


@pytest.mark.parametrize(("level", "relative"), [(1.0, 100.0), (10.0, 10.0)])
def test_the_error_of_constant_rewards_is_relative_to_their_size(level, relative):
    assert check(shifted, [level] * 4).relative_error == pytest.approx(relative)
    assert check(lambda obs, action, next_obs: obs[:, 0] * (1 + 1e-6), [level] * 4).relative_error < 1e-3


def test_the_error_of_rewards_that_are_all_zero():
    assert check(lambda obs, action, next_obs: obs[:, 0], [0.0] * 4) == (0.0, 0.0, 0.0)
    assert check(shifted, [0.0] * 4).relative_error > 1e3


def test_the_disagreement_of_terminations():
    fn: TerminationFn = lambda next_obs: next_obs[:, 0] > 0  # noqa: E731
    next_obs = th.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert check_termination_fn(fn, next_obs, th.tensor([True, False, True, False])) == 0.0
    assert check_termination_fn(fn, next_obs, th.tensor([True, True, True, False])) == 0.25
    assert check_termination_fn(never_terminates, next_obs, th.tensor([True, False, True, False])) == 0.5


def test_checks_do_not_broadcast():
    with pytest.raises(ValueError, match=r"\(4,\).*\(4, 1\)"):
        check(lambda obs, action, next_obs: obs, [0.0] * 4)
    with pytest.raises(ValueError, match=r"\(4,\).*\(\)"):
        check_termination_fn(lambda next_obs: next_obs.any(), th.zeros(4, 2), th.zeros(4, dtype=th.bool))
