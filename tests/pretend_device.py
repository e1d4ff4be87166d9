"""A pretended device that reveals without a GPU what would fail on one: ``python -m pretend_device [CASE ...]``.

Its tensors live in ordinary memory but cannot be accessed directly: an operation that mixes a tensor of the device with one
of the CPU fails as it does with CUDA, and operations that would make a GPU wait are counted. The CPU computes the numbers.

PyTorch lets a process register only one such device, permanently. So this module is a program that prints its findings as
JSON. On a machine with a GPU, the cases run there as well.
"""

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize
from tiny import ACTION_SPACES, Drift, Unknown, tiny_model, vec_drift
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sb3_mbmpo.imagination import rollouts as imagination
from sb3_mbmpo.meta import training as meta_training
from sb3_mbmpo.meta.adaptation import TaskBatch
from sb3_mbmpo.meta.outer_step import fisher_vector_product, meta_gradient
from sb3_mbmpo.meta.problem import MetaProblem

_setup_privateuseone_for_python_backend("pretend")
DEVICE = th.device("pretend", 0)
# Operations that accept tensors of two devices, as with CUDA
CROSSING_ALLOWED = ("aten._to_copy", "aten.copy_", "aten.index")
# Number of synchronisations between device and CPU, by operation
waits: Counter[str] = Counter()
HORIZON = imagination.ALIVE_CHECK_INTERVAL


class Remote(th.Tensor):
    """A tensor of the device; ``near`` is the CPU tensor with its numbers."""

    near: th.Tensor

    @staticmethod
    def __new__(cls, near: th.Tensor) -> "Remote":
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        remote: Remote = th.Tensor._make_wrapper_subclass(cls, near.shape, device=DEVICE, **layout)
        remote.near = near
        return remote

    __torch_function__ = th._C._disabled_torch_function_impl

    def __deepcopy__(self, memo: dict[int, Any]) -> "Remote":
        memo[id(self)] = copy = Remote(self.near.clone()).requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)  # marks parameters of other tensor classes for PyTorch
        return copy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Interception(TorchDispatchMode):
    """A mode that also intercepts operations without a tensor argument, such as ``torch.zeros(3, device=...)``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Generator(th.Generator):
    """A CPU generator that claims to belong to another device."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.claimed = th.device(device)
        return generator

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.claimed


@contextmanager
def pretending():
    """Make the device exist inside the block."""
    real, th.Generator = th.Generator, Generator
    try:
        with Interception():
            yield
    finally:
        th.Generator = real


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU, and return its results on the device on which they would be with real hardware."""
    name, tensors = str(func), []
    tree_map_only(th.Tensor, tensors.append, (args, kwargs))
    remote = [x for x in tensors if isinstance(x, Remote)]
    strangers = [x for x in tensors if not isinstance(x, Remote) and x.dim() > 0]
    if remote and strangers and not name.startswith(CROSSING_ALLOWED):
        raise RuntimeError(f"{name} got tensors on two devices; on the CPU {[tuple(x.shape) for x in strangers]}")
    device = kwargs.get("device")
    goes_there = th.device(device).type == DEVICE.type if device is not None else bool(remote)
    waited_for = name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero"))
    if (remote and (waited_for or not goes_there or strangers)) or (goes_there and strangers):
        waits[name] += 1

    def near(x: Any) -> Any:
        return x.near if isinstance(x, Remote) else th.device("cpu")

    args, kwargs = tree_map_only((Remote, th.device), near, (args, kwargs))
    result = func(*args, **kwargs)
    if not goes_there:
        return result
    # An in-place operation returns the tensor that it was given
    known = {id(x.near): x for x in remote}
    return tree_map_only(th.Tensor, lambda x: known[id(x)] if id(x) in known else Remote(x), result)


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Remote(th.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    waits["torch.tensor"] += 1
    near = [x.near if isinstance(x, Remote) else x for x in (target, source)]
    near[0].copy_(near[1])
    return target


# ``torch.tensor(numbers, device=...)`` bypasses the interception
LIBRARY = th.library.Library("aten", "IMPL")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")

ENSEMBLE = {"net_arch": [8], "max_epochs": 2}
EVERYTHING = {"probabilistic": True, "weight_norm": True, "output_bias": 0.1, "output_noise": 0.1}


class Square(th.nn.Module):
    """An activation that the fast path does not support, so that the policy is evaluated through vmap."""

    def forward(self, x):
        return x.square()


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: lambda space=space: {"env": Drift(space)} for name, space in ACTION_SPACES.items()},
    "vec_normalize": lambda: {"env": VecNormalize(vec_drift(2))},
    "learned_heads": lambda: {"env": Unknown()},
    "every_option_of_the_ensemble": lambda: {"env": Unknown(), "dynamics_kwargs": {**ENSEMBLE, **EVERYTHING}},
    "bfloat16": lambda: {"dynamics_kwargs": {**ENSEMBLE, "precision": "bfloat16"}},
    "starts_from_the_buffer": lambda: {"imagined_start": "buffer", "recent_starts": 0.5, "stop_on_return_drop": True},
    "learned_inner_steps": lambda: {"learn_inner_lr": True, "n_inner_steps": 2, "baseline": "fourier"},
    "ppo": lambda: {"outer_optimizer": "ppo", "outer_kwargs": {}},
    "several_chunks": lambda: {"chunk_size": 1, "n_tasks": 4},
    "new_ensemble": lambda: {"dynamics_kwargs": {**ENSEMBLE, "reinit_every": 1}},
    "any_activation": lambda: {"policy_kwargs": {"net_arch": [8], "activation_fn": Square}},
}


@contextmanager
def noted(found: dict[str, Any]):
    """Record the synchronisations in the hot loop, and the numbers of the first meta-step to compare with the CPU's."""
    inside, step = imagination._GroupImagination.run, meta_training.MetaTrainer.step

    def counting(group, *args):
        before = waits.total()
        inside(group, *args)
        found["waits_in_the_loop"] = max(found.get("waits_in_the_loop", 0), waits.total() - before)

    def noting(trainer, meta, previous):
        if "meta-gradient" not in found["numbers"]:
            s = trainer.settings
            if not isinstance(meta.inner_lr, th.Tensor):
                adaptation = trainer.adapt(meta)
                rollouts, estimate = trainer.imagine(adaptation.parameters)
                post = TaskBatch.from_rollouts(rollouts, estimate.advantages)
                problem = MetaProblem(trainer.actor, adaptation.batches, post, chunk_size=s.chunk_size)
                gradient, *_ = meta_gradient(problem, meta)
                found["numbers"] |= {
                    "imagined observations": rollouts.policy_input.flatten().cpu().tolist(),
                    "imagined rewards": rollouts.rewards.flatten().cpu().tolist(),
                    "adapted parameters": adaptation.parameters.flatten().cpu().tolist(),
                    "meta-gradient": gradient.cpu().tolist(),
                    "Fisher product": fisher_vector_product(problem, meta)(gradient).cpu().tolist(),
                }
        return step(trainer, meta, previous)

    imagination._GroupImagination.run, meta_training.MetaTrainer.step = counting, noting
    try:
        yield
    finally:
        imagination._GroupImagination.run, meta_training.MetaTrainer.step = inside, step


def train(device: str, **kwargs: Any) -> dict[str, Any]:
    """Run a small training and what follows one, and return its numbers, its synchronisations and its error, if any."""
    found: dict[str, Any] = {"numbers": {}, "error": None}
    try:
        with pretending() if device == DEVICE.type else nullcontext(), noted(found):
            model = tiny_model(**{"device": device, "horizon": HORIZON, **kwargs})
            model.learn(41)  # two iterations
            obs = model.get_env().reset()
            model.predict(obs)
            model.adapt(n_episodes=2).predict(obs)
            model.dynamics.disagreement(np.zeros((1, 2), np.float32), np.stack([model.action_space.sample()]))
    except Exception:  # noqa: BLE001 - the test that reads the report shows the error, whatever it is
        found["error"] = traceback.format_exc()
    return found


def main() -> None:
    th.set_num_threads(1)
    devices = ["cpu", DEVICE.type, *["cuda"] * th.cuda.is_available()]
    print(json.dumps({name: {device: train(device, **CASES[name]()) for device in devices} for name in sys.argv[1:] or CASES}))


if __name__ == "__main__":
    main()
