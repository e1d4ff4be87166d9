"""
The engine against the machine's own limit: achieved FLOP/s beside the same matmuls alone, in the same run.

``make bench`` times; ``make test`` runs each once, so that they cannot rot.
"""

import time
from collections.abc import Callable
from statistics import median

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_mbmpo import DynamicsEnsemble, MlpPolicy
from sb3_mbmpo.actions import ActionCodec
from sb3_mbmpo.dynamics import Transitions
from sb3_mbmpo.imagination import World, imagine
from sb3_mbmpo.meta import MetaProblem, TaskBatch, adapt, fisher_vector_product, meta_gradient, trust_region_step

# Observation size, action size, hidden layers, tasks, rollouts a task, horizon
SIZES = {
    "pendulum": (3, 1, [200, 200], 10, 20, 200),
    "half-cheetah": (17, 6, [200, 200, 200], 20, 10, 200),
    "authors": (17, 6, [512, 512], 20, 50, 200),
}
N_MODELS = 5


def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    return next_obs[:, 0] - 0.1 * action.square().sum(1)


class Engine:
    def __init__(self, size: str) -> None:
        self.n_obs, self.n_act, self.net_arch, self.n_tasks, self.n_rollouts, self.horizon = SIZES[size]
        obs_space = gym.spaces.Box(-np.inf, np.inf, (self.n_obs,), np.float32)
        act_space = gym.spaces.Box(-1, 1, (self.n_act,), np.float32)
        self.dynamics = DynamicsEnsemble(obs_space, act_space, N_MODELS, self.net_arch, seed=0)
        self.policy = MlpPolicy(obs_space, act_space, lambda _: 0.0)
        self.theta = self.policy.actor_vector()
        self.generator = th.Generator().manual_seed(0)
        self.layer_sizes = [self.n_obs + self.n_act, *self.net_arch, self.n_obs]

    def flops_per_row(self) -> int:
        return sum(2 * i * o for i, o in zip(self.layer_sizes[:-1], self.layer_sizes[1:], strict=True))

    def imagine(self, parameters: th.Tensor, horizon: int | None = None):
        codec = ActionCodec(self.dynamics.action_space)
        step = self.dynamics.step_fn(0.1)
        world = World([step], reward, None, codec, self.policy.standardize, N_MODELS)
        starts = th.randn(self.n_tasks, self.n_rollouts, self.n_obs, generator=self.generator)
        return imagine(world, self.policy.actor(parameters), starts, horizon or self.horizon, self.generator)

    def matmuls(self, rows: int) -> Callable[[], None]:
        """:return: the dynamics' matmuls alone, for as many rows a model"""
        inputs = [th.randn(N_MODELS, rows, width) for width in self.layer_sizes[:-1]]

        def run() -> None:
            for x, weight in zip(inputs, self.dynamics.weights, strict=True):
                th.bmm(x, weight.detach())

        return run

    def batch(self, rollouts) -> TaskBatch:
        advantages = th.randn(rollouts.rewards.shape, generator=self.generator)
        return TaskBatch.from_rollouts(rollouts, advantages)


def seconds(function: Callable[[], object], repeat: int = 5) -> float:
    """:return: median of a few runs, after one to warm up"""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times[1:])


@pytest.fixture(params=SIZES)
def engine(request):
    if request.param == "authors" and not request.config.getoption("benchmark_only"):
        pytest.skip("too long where nothing is timed")
    return Engine(request.param)


def test_imagination(engine, benchmark, capsys):
    horizon = 50  # a fixed share of the work a step: the horizon only multiplies it
    parameters = engine.theta.expand(engine.n_tasks, -1)
    rows = engine.n_tasks * engine.n_rollouts
    rollouts = benchmark.pedantic(engine.imagine, (parameters, horizon), rounds=5, warmup_rounds=1)
    assert rollouts.alive.shape == (engine.n_tasks, horizon, engine.n_rollouts)
    if benchmark.enabled:
        achieved = benchmark.stats.stats.median
        bound = horizon * seconds(engine.matmuls(rows // N_MODELS), 20)
        gflops = rows * horizon * engine.flops_per_row() / 1e9
        with capsys.disabled():
            print(
                f"\nimagination {engine.net_arch}, {rows} rows: {rows * horizon / achieved:,.0f} steps/s, "
                f"{gflops / achieved:.0f} GFLOP/s beside {gflops / bound:.0f} of the dynamics' matmuls alone "
                f"({100 * bound / achieved:.0f} %)"
            )


def test_fit(engine, benchmark, capsys):
    n_rows, batch = 2000, 256
    obs = th.randn(n_rows, engine.n_obs)
    data = Transitions(obs, th.rand(n_rows, engine.n_act), obs + 1, th.zeros(n_rows), th.zeros(n_rows, dtype=th.bool))
    report = benchmark.pedantic(engine.dynamics.fit, (data,), dict(max_epochs=2, batch_size=batch), rounds=3, warmup_rounds=1)
    assert (report.epochs == 2).all()
    if benchmark.enabled:
        achieved = benchmark.stats.stats.median
        # A training row is a forward and two backward matmuls a layer, a validation row one forward
        forwards = 2 * (0.8 * n_rows * 3 + 0.2 * n_rows) / batch
        bound = forwards * seconds(engine.matmuls(batch), 20)
        with capsys.disabled():
            print(
                f"\nfit {engine.net_arch}: {2 * n_rows * N_MODELS / achieved:,.0f} rows x models/s, "
                f"{100 * bound / achieved:.0f} % of its matmuls alone"
            )


@pytest.mark.parametrize("part", ["adapt", "meta_gradient", "fisher_build", "fisher_product", "whole_step"])
def test_meta_step(engine, part, benchmark):
    pre = engine.batch(engine.imagine(engine.theta.expand(engine.n_tasks, -1)))
    adapted = adapt(engine.policy.actor, engine.theta, [pre], 0.003)
    problem = MetaProblem(engine.policy.actor, (pre,), engine.batch(engine.imagine(adapted)), 0.003)
    subsample = problem.subsample(10)
    product = fisher_vector_product(subsample, engine.theta, 1e-5)
    parts = {
        "adapt": lambda: adapt(engine.policy.actor, engine.theta, [pre], 0.003),
        "meta_gradient": lambda: meta_gradient(problem, engine.theta)[0],
        "fisher_build": lambda: fisher_vector_product(subsample, engine.theta, 1e-5)(engine.theta),
        "fisher_product": lambda: product(engine.theta),
        "whole_step": lambda: trust_region_step(problem, engine.theta, target_kl=0.03, sub_sampling_factor=10)[0],
    }
    assert th.isfinite(benchmark.pedantic(parts[part], rounds=3, warmup_rounds=1)).all()
