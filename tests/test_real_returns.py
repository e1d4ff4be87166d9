"""Discounted returns of real episodes, compared with hand-computed numbers."""

import numpy as np

from sb3_mbmpo.real.returns import DiscountedReturns


def test_discounted_returns_by_hand():
    returns = DiscountedReturns(n_envs=2, gamma=0.5)

    def step(number, rewards, terminated=(False, False), truncated=(False, False)):
        obs = np.array([[number], [10.0 + number]])
        returns.step(obs, np.array(rewards), obs + 1, np.array(terminated), np.array(truncated))

    step(0, [4.0, 1.0])
    step(1, [4.0, 2.0], terminated=(True, False))
    step(5, [8.0, 4.0], truncated=(False, True))
    first, second = returns.take()
    # 4 + 4 / 2, and nothing after the termination; 1 + 2 / 2 + 4 / 4, and the value after the time limit counts an eighth
    assert (first.first_obs, first.final_obs, first.discounted_return, first.bootstrap) == ([0], [2], 6.0, 0.0)
    assert (second.first_obs, second.final_obs, second.discounted_return, second.bootstrap) == ([10], [16], 3.0, 0.125)
    step(6, [2.0, 7.0], truncated=(True, True))
    third, fourth = returns.take()
    # The first environment's second episode began at 5, the second one's at 16
    assert (third.first_obs, third.discounted_return, third.bootstrap) == ([5], 8 + 2 / 2, 0.25)
    assert (fourth.first_obs, fourth.discounted_return, fourth.bootstrap) == ([16], 7.0, 0.5)
    assert returns.take() == []
