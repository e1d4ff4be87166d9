"""The environment is queried at set-up only, whatever it answers: later, it may be closed, dead or hanging."""

import os
import time
from functools import partial
from threading import Lock
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from tiny import Drift, Unknown, tiny_model, vec_drift

from sb3_mbmpo import MBMPO
from sb3_mbmpo.common.env_reading import ask, attribute, env_id, env_spec_json
from sb3_mbmpo.rewards.functions import pendulum_reward
from sb3_mbmpo.rewards.resolve import known_functions
from sb3_mbmpo.zoo.extension import _survive_close

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def in_workers(*make):
    return SubprocVecEnv(list(make), start_method="fork")


def copied_pendulum():
    """Make a pendulum whose spec holds a lambda, which cannot be pickled."""
    env = gym.make("Pendulum-v1", g=5.0)
    return gym.wrappers.TransformObservation(env, lambda obs: obs.copy(), env.observation_space)


class Spec(Unknown):
    """An unrelated object called ``spec``, as in MuJoCo."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec


class AfterReset(Drift):
    """An environment whose attributes are properties that need a reset first."""

    @property
    def reward(self):
        return -abs(self.x).sum()

    @property
    def done(self):
        raise RuntimeError("reset first")

    spec = done


def own_attributes():
    env = Drift()
    env.reset(seed=0)
    return {*vars(env)}


OWN = own_attributes()


class Guarded(Drift):
    """An environment that ignores attributes other than its own."""

    def __setattr__(self, name, value):
        if name in OWN:
            super().__setattr__(name, value)


class Strict(Drift):
    """An environment that refuses attributes other than its own."""

    def __setattr__(self, name, value):
        if name not in OWN:
            raise AttributeError(f"no room for {name}")
        super().__setattr__(name, value)


class Exiting(Drift):
    """An environment whose attributes end the process when they are read."""

    @property
    def reward(self):
        raise SystemExit(1)

    spec = reward


class Fatal(Drift):
    """An environment that is gone once it is asked."""

    @property
    def spec(self):
        os._exit(1)


class Hanging(Drift):
    def step(self, action):
        time.sleep(20 if self.n_steps > 30 else 0)
        return super().step(action)


class Dying(Drift):
    def step(self, action):
        if self.n_steps > 30:
            raise SystemExit
        return super().step(action)


class Raising(Drift):
    def step(self, action):
        if self.n_steps > 30:
            raise RuntimeError("out of order")
        return super().step(action)


# ---------------------------------------------------------------- no queries after set-up


def close(env):
    env.close()


def kill(env):
    for process in env.unwrapped.processes:
        process.kill()
        process.join()


def leave_in_a_step(env):
    env.unwrapped.step_async(np.zeros((env.num_envs, 2)))


def lose_the_pipes(env):
    for remote in env.unwrapped.remotes:
        remote.close()


@pytest.mark.parametrize("end", [close, kill, leave_in_a_step, lose_the_pipes])
def test_everything_but_real_steps_works_when_the_environment_is_gone(end, tmp_path):
    env = VecNormalize(in_workers(*[lambda: gym.make("Pendulum-v1", max_episode_steps=8)] * 2))
    model = tiny_model(env).learn(20)
    obs = model._last_obs
    end(env)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model.predict(obs)
    model.adapt(model_index=1)
    model.imagined_env(n_envs=2).reset()
    loaded = MBMPO.load(tmp_path / "model")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == 10
    assert EnvSpec.from_json(loaded.env_spec).max_episode_steps == 8
    kill(env)


@pytest.mark.parametrize(
    ("end", "named"),
    [(close, "is closed"), (kill, "has lost a worker process"), (leave_in_a_step, "is in the middle of a step")],
)
def test_steps_in_an_environment_that_is_gone_are_refused_with_the_way_out(end, named):
    env = VecNormalize(in_workers(Drift))
    model = tiny_model(env).learn(20)
    end(env)
    another = VecNormalize(vec_drift())
    for steps in (
        lambda: model.learn(20),
        lambda: model.learn(20, reset_num_timesteps=False),
        lambda: model.adapt(n_episodes=2),
        lambda: tiny_model(another).adapt(env, n_episodes=2),
    ):
        with pytest.raises(ValueError, match=f"The environment {named}.*`set_env` or `adapt`"):
            steps()
    model.adapt(another, n_episodes=2)
    model.set_env(another)
    model.learn(20)
    kill(env)


@pytest.mark.parametrize("env_class", [Raising, Dying])
def test_a_worker_that_ends_costs_no_model(env_class, tmp_path):
    env = in_workers(env_class, Drift)
    model = tiny_model(env, learning_starts=40)
    with pytest.raises((EOFError, ConnectionError)):
        model.learn(200)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    assert MBMPO.load(tmp_path / "model").num_timesteps == model.num_timesteps > 40
    kill(env)


def test_a_worker_that_hangs_costs_no_model(tmp_path):
    env = in_workers(Hanging)
    model = tiny_model(env).learn(20)
    for _ in range(11):
        env.step(np.zeros((1, 2), np.float32))
    env.step_async(np.zeros((1, 2), np.float32))
    start = time.perf_counter()
    model.save(tmp_path / "model")
    MBMPO.load(tmp_path / "model", env=env, force_reset=False)
    assert time.perf_counter() - start < 5
    kill(env)


@pytest.mark.parametrize("end", [close, kill, leave_in_a_step])
def test_closing_workers_that_have_ended(end):
    env = in_workers(Drift, Drift)
    env.reset()
    _survive_close(env)
    end(env)
    env.close()
    for process in env.processes:
        process.join(5)
    assert env.closed
    assert not any(process.is_alive() for process in env.processes)


# ---------------------------------------------------------------- any answer at set-up


@pytest.mark.parametrize("vec_env", [in_workers, lambda make: DummyVecEnv([make])], ids=["workers", "here"])
def test_what_does_not_pickle_is_read_where_it_is(vec_env, tmp_path):
    env = vec_env(copied_pendulum)
    assert ask(env, env_id) == "Pendulum-v1"
    assert known_functions(env).reward_fn is pendulum_reward
    assert ask(env, env_spec_json) is None
    for reward_fn in ("auto", "learned"):
        tiny_model(env, reward_fn=reward_fn).learn(20).save(tmp_path / "model")
    assert MBMPO.load(tmp_path / "model").env_spec is None
    env.close()


class Holding(gym.Wrapper, RecordConstructorArgs):
    """A wrapper with an argument that cannot be copied, so that Gymnasium has no spec of the wrappers around it."""

    def __init__(self, env):
        RecordConstructorArgs.__init__(self, lock=Lock(), _disable_deepcopy=True)
        super().__init__(env)


@pytest.mark.filterwarnings("ignore:.*An exception occurred")
@pytest.mark.parametrize("vec_env", [in_workers, lambda make: DummyVecEnv([make])], ids=["workers", "here"])
def test_an_environment_is_known_within_wrappers_that_have_no_spec(vec_env):
    env = vec_env(lambda: gym.wrappers.ClipAction(Holding(gym.make("Pendulum-v1"))))
    assert ask(env, partial(attribute, "spec")) is None
    assert ask(env, env_id) == "Pendulum-v1"
    assert known_functions(env).reward_fn is pendulum_reward
    env.close()


@pytest.mark.parametrize(
    "spec",
    # The namesake has the number of observations that the known environment has
    [{"id": "Pendulum-v1"}, Lock(), 3, "Pendulum-v1", Lock, SimpleNamespace(id="MountainCar-v0")],
    ids=["dictionary", "lock", "number", "name", "class", "namesake"],
)
@pytest.mark.parametrize("vec_env", [in_workers, lambda make: DummyVecEnv([make])], ids=["workers", "here"])
def test_a_spec_that_is_none(spec, vec_env, tmp_path):
    env = vec_env(lambda: Spec(spec))
    assert ask(env, env_id) is None
    model = tiny_model(env)
    assert (model._functions.reward.source, model.env_spec) == ("learned", None)
    model.learn(10).save(tmp_path / "model")
    env.close()


@pytest.mark.parametrize("env_class", [AfterReset, Guarded, Strict, Exiting])
@pytest.mark.parametrize("vec_env", [in_workers, lambda make: DummyVecEnv([make])], ids=["workers", "here"])
def test_attributes_that_cannot_be_read_or_written(env_class, vec_env):
    env = vec_env(env_class)
    model = tiny_model(env)
    is_readable = env_class in (Guarded, Strict) and isinstance(env, DummyVecEnv)
    assert model._functions.reward.source == ("env.reward" if is_readable else "learned")
    model.learn(10)
    env.close()


def test_a_method_of_an_environment_in_another_process_is_not_fetched():
    env = in_workers(Drift)
    model = tiny_model(env)
    assert (model._functions.reward.source, model._functions.termination.source) == ("learned", "learned")
    env.close()


def unpicklable(get):
    return Lock()


def length(get):
    return get("unwrapped").length


def test_an_answer_that_does_not_pickle_is_none():
    env = in_workers(Drift)
    assert ask(env, unpicklable) is None
    assert ask(env, partial(attribute, "no_such_thing")) is None
    assert ask(env, length) == 8
    env.reset()
    env.close()
    assert ask(env, length) is None
    env = in_workers(Drift)
    kill(env)
    assert ask(env, length) is None
    assert ask(in_workers(Fatal), env_id) is None


class Foreign(Drift):
    """An environment whose methods take as many arguments as ours, but mean something else."""

    def reward(self, achieved, desired, info):
        return info["scale"] * float(np.linalg.norm(achieved - desired))

    def done(self, time):
        return self.elapsed + int(time) > 3


class ForeignShape(Drift):
    def reward(self, *states):
        return states[0].sum()


@pytest.mark.parametrize(
    ("env_class", "arguments", "named"),
    [
        (Foreign, {}, r"`env.reward\(obs, action, next_obs\)`.*failed .IndexError.*`reward_fn=\"learned\"`"),
        (Foreign, dict(reward_fn="learned"), r"`env.done\(next_obs\)`.*failed .ValueError.*`termination_fn=\"learned\"`"),
        (ForeignShape, {}, r"`env.reward\(obs, action, next_obs\)`.*failed .*one number per row.*`reward_fn=\"learned\"`"),
    ],
)
def test_a_foreign_attribute_is_named_with_the_way_out(env_class, arguments, named):
    env = vec_drift(env_class=env_class)
    model = tiny_model(env, **arguments)
    with pytest.raises(ValueError, match=named):
        model.learn(20)
    assert env.get_attr("n_steps") == [0]
    tiny_model(env, reward_fn="learned", termination_fn="learned").learn(20)
