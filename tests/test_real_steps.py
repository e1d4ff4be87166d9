"""Real steps: how many, which policy acts, and what an interruption or a number that is not finite leaves behind."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from tiny import ACTION_SPACES, Drift, assert_same, parameters, push, tiny_model, vec_drift


class Stop(BaseCallback):
    def __init__(self, at, error=None):
        super().__init__()
        self.at, self.error = at, error

    def _on_step(self):
        if self.num_timesteps < self.at:
            return True
        if self.error is not None:
            raise self.error
        return False


@pytest.mark.parametrize(("total", "n_envs", "expected"), [(1, 1, 1), (33, 1, 33), (60, 3, 60), (61, 3, 63), (50, 4, 52)])
def test_no_more_real_steps_than_asked_for(total, n_envs, expected):
    model = tiny_model(vec_drift(n_envs)).learn(total)
    assert model.num_timesteps == expected
    assert sum(env.unwrapped.n_steps for env in model.env.envs) == expected
    assert model.replay_buffer.size() * n_envs == expected


class Rollouts(BaseCallback):
    """A callback that records the rows of each real rollout, and what the meta-policy would have done there."""

    def __init__(self):
        super().__init__()
        self.ends, self.greedy, self.n_updates = [], [], []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.ends.append(self.num_timesteps)
        self.n_updates.append(self.model._n_updates)
        buffer = self.model.replay_buffer
        self.greedy.append(self.model.predict(buffer.observations[: buffer.size(), 0], deterministic=True)[0])


@pytest.mark.parametrize("chunks", [[70], [10, 10, 30, 20], [25, 45]])
def test_first_fit_waits_for_the_random_steps_and_there_are_no_others(chunks):
    rollouts = Rollouts()
    model = tiny_model(learning_starts=30, policy_kwargs=dict(net_arch=[8], log_std_init=-10.0), exploration="meta")
    for chunk in chunks:
        model.learn(chunk, reset_num_timesteps=False, callback=rollouts)
    first = rollouts.ends.index(30)
    assert rollouts.n_updates[: first + 2] == [0] * (first + 1) + [1]
    actions = model.replay_buffer.actions[: model.replay_buffer.size(), 0]
    end = 30
    assert np.abs(actions[:end] - rollouts.greedy[first]).max() > 0.3, "random"
    for k in range(first + 1, len(rollouts.ends)):
        start, end = end, rollouts.ends[k]
        np.testing.assert_allclose(actions[start:end], rollouts.greedy[k][start:end], atol=1e-2)


def test_adapted_policies_act_in_turn():
    """As in the authors' code, every episode uses another model's policy, until all tasks have had their turn."""
    model = tiny_model(Drift(length=5), n_tasks=4, policy_kwargs=dict(net_arch=[8], log_std_init=-10.0)).learn(20)
    constant = th.zeros(4, len(model.policy.actor_vector()))
    constant[:, :2] = -10.0  # log_std
    constant[:, -2:] = th.tensor([[-0.75], [-0.25], [0.25], [0.75]])  # the bias of the mean, in [-1, 1]
    model._adapted.copy_(constant)
    model.learn(40, reset_num_timesteps=False, callback=Stop(60))  # before they are adapted anew
    actions = model.replay_buffer.actions[20 : model.replay_buffer.size() - 1, 0, 0]  # in [-1, 2]
    who = np.rint((actions - 0.5) / 1.5 * 2 + 1.5).astype(int)
    episodes = who[[0, 5, 10, 15]]
    np.testing.assert_array_equal(who[:15], episodes[:3].repeat(5))
    assert sorted(episodes) == [0, 1, 2, 3]
    assert [task // 2 for task in episodes] in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_a_stopped_iteration_leaves_no_torn_transition():
    """The step at which a callback stops is not stored; continuing from the observation before it would invent dynamics."""
    model = tiny_model(Drift(ACTION_SPACES["discrete"]))
    for at in (7, 31):
        model.learn(40, reset_num_timesteps=False, callback=Stop(at))
    with pytest.raises(KeyboardInterrupt):
        model.learn(40, reset_num_timesteps=False, callback=Stop(60, KeyboardInterrupt()))
    model.learn(20, reset_num_timesteps=False)
    buffer = model.replay_buffer
    for obs, action, next_obs in zip(
        buffer.observations[: buffer.pos, 0],
        buffer.actions[: buffer.pos, 0],
        buffer.next_observations[: buffer.pos, 0],
        strict=True,
    ):
        np.testing.assert_array_equal(push(obs, action), next_obs)


def test_interrupted_model_can_be_saved_and_go_on(tmp_path):
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=Stop(33, KeyboardInterrupt()))
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = type(model).load(tmp_path / "model", env=Drift())
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.num_timesteps == 33
    assert loaded.replay_buffer.size() == 32
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 53


@pytest.mark.parametrize("where", ["fit", "imagination"])
def test_interrupted_training_can_be_saved_and_goes_on(where, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    model = tiny_model(n_meta_steps=3).learn(20)
    targets = {"fit": "dynamics.training.ParallelTraining.mean_loss", "imagination": "meta.training.estimate_advantages"}
    with monkeypatch.context() as patched:
        patched.setattr(f"sb3_mbmpo.{targets[where]}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.learn(20, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=Drift())
    assert_same(parameters(loaded), parameters(model))
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 60


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (("reset", "obs"), "observation"),
        ((27, "obs"), "observation"),
        ((27, "reward"), "reward"),
        ((24, "obs"), "terminal observation"),
    ],
)
def test_numbers_that_are_not_finite_stop_training(where, name, value, tmp_path):
    model = tiny_model(Drift(ACTION_SPACES["discrete"], random_start=False, bad={where: value}))
    steps = 0 if where[0] == "reset" else where[0]
    with pytest.raises(ValueError, match=f"NaN or infinite {name} at real step {steps}, environment 0"):
        model.learn(60)
    buffer = model.replay_buffer
    assert buffer.size() == max(0, steps - 1)
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        assert np.isfinite(array[: buffer.size()]).all()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = type(model).load(tmp_path / "model", env=Drift(ACTION_SPACES["discrete"]))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(20, reset_num_timesteps=False)
