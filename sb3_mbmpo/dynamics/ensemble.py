"""An ensemble of dynamics networks with stacked weights: one batched matmul per layer serves all members.

Legend of shapes: ``M`` members, ``B`` rows, ``O`` observation size, ``A`` width of the encoded action.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import get_device
from torch import nn

from sb3_mbmpo.common.actions import ActionCodec, check_spaces
from sb3_mbmpo.common.save_util import Path, plain
from sb3_mbmpo.common.world import ALONE, World
from sb3_mbmpo.dynamics import groups
from sb3_mbmpo.dynamics.disagreement import Disagreement, relative_spread
from sb3_mbmpo.dynamics.files import opened_ensemble, save_ensemble
from sb3_mbmpo.dynamics.losses import member_losses
from sb3_mbmpo.dynamics.networks import ACTIVATIONS, PRECISIONS, Layer, cast, forward, matmul_dtype
from sb3_mbmpo.dynamics.parallel import is_stacked
from sb3_mbmpo.dynamics.standardization import folded, standardize
from sb3_mbmpo.dynamics.step import EnsembleStep, NoiseBounds, OutputLayout
from sb3_mbmpo.dynamics.training import FitReport, PassHook, fit_members
from sb3_mbmpo.dynamics.types import Transitions

# Default widths of the hidden layers
NET_ARCH = (200, 200, 200)
# Power of the variances that weight a probabilistic member's likelihood in training, as recommended by Seitzer et al. (2022)
BETA = 0.5


class DynamicsEnsemble(nn.Module):
    """
    An ensemble of ``M`` networks that predict the change of the observation from observation and action.

    They also predict the reward and the termination if those are to be learned (Clavera et al. 2018, section 4.2). Inputs and
    targets are standardised with statistics of the data of the last fit. These statistics are buffers of the module, so that
    they are saved, moved and loaded with the weights.

    :param observation_space: Box of one dimension
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param n_models: number of members
    :param net_arch: hidden layer widths
    :param activation_fn: one of "relu", "swish" (= "silu"), "tanh", "elu", "gelu"
    :param weight_norm: learn direction and length of each unit's weights separately (Salimans and Kingma 2016)
    :param probabilistic: predict a Gaussian with learned variances, and sample it in the imagination, instead of a point
        (Chua et al. 2018)
    :param learned_reward: add a reward head
    :param learned_termination: add a termination head
    :param learning_rate: Adam step size
    :param weight_decay: L2 penalty, see ``torch.optim.Adam``
    :param seed: seed of the initial weights
    :param device: where the networks are
    :param precision: dtype of the matmuls in fits and imagined steps: "float32", "bfloat16", or "auto": bfloat16 on GPUs and
        on CPUs with AMX, where it is several times faster. Weights, optimiser and statistics are always float32
    """

    observation_mean: th.Tensor
    # What rounding to float32 loses of the mean (where it matters), of the lowest and of the highest observation (3, O)
    observation_tails: th.Tensor
    observation_std: th.Tensor
    action_mean: th.Tensor
    action_std: th.Tensor
    target_mean: th.Tensor
    target_std: th.Tensor
    observation_low: th.Tensor
    observation_high: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        n_models: int = 5,
        *,
        net_arch: Sequence[int] = NET_ARCH,
        activation_fn: str = "swish",
        weight_norm: bool = False,
        probabilistic: bool = False,
        learned_reward: bool = False,
        learned_termination: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int | None = None,
        device: th.device | str = "cpu",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        check_spaces(observation_space, action_space)
        assert isinstance(observation_space, spaces.Box)
        n_models, net_arch, learning_rate, weight_decay, seed = plain(
            (n_models, list(net_arch), learning_rate, weight_decay, seed)
        )
        weight_norm, probabilistic, learned_reward, learned_termination = map(
            bool, (weight_norm, probabilistic, learned_reward, learned_termination)
        )
        self._check(n_models, net_arch, activation_fn, precision)
        self.observation_space, self.action_space = observation_space, action_space
        self.codec = ActionCodec(action_space)
        self.n_models, self.net_arch, self.activation_fn = n_models, list(net_arch), activation_fn
        self.weight_norm, self.probabilistic = weight_norm, probabilistic
        self.learned_reward, self.learned_termination = learned_reward, learned_termination
        self.learning_rate, self.weight_decay, self.precision = learning_rate, weight_decay, precision

        self.observation_dim, self.action_dim = observation_space.shape[0], self.codec.dynamics_dim
        # Standardised targets: the change of the observation, and the reward if it is learned
        self.target_dim = self.observation_dim + int(learned_reward)
        self.layout = OutputLayout(
            observation_dim=self.observation_dim,
            target_dim=self.target_dim,
            probabilistic=probabilistic,
            learned_termination=learned_termination,
        )
        sizes = [self.observation_dim + self.action_dim, *self.net_arch, self.layout.output_dim]
        self.weights = nn.ParameterList(th.empty(n_models, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(th.empty(n_models, 1, o) for o in sizes[1:])
        self.gains = nn.ParameterList(th.empty(n_models, 1, o) for o in sizes[1:]) if weight_norm else None
        if probabilistic:
            self.max_log_var = nn.Parameter(th.empty(n_models, 1, self.target_dim))
            self.min_log_var = nn.Parameter(th.empty(n_models, 1, self.target_dim))
        for name, size in (("observation", self.observation_dim), ("action", self.action_dim), ("target", self.target_dim)):
            self.register_buffer(f"{name}_mean", th.zeros(size))
            self.register_buffer(f"{name}_std", th.ones(size))
        self.register_buffer("observation_low", th.full((self.observation_dim,), -math.inf))
        self.register_buffer("observation_high", th.full((self.observation_dim,), math.inf))
        self.register_buffer("observation_tails", th.zeros(3, self.observation_dim))

        generator = th.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        self.to(device)
        self.reset_parameters(generator)

    @staticmethod
    def _check(n_models: int, net_arch: Sequence[int], activation_fn: str, precision: str) -> None:
        if n_models < 1:
            raise ValueError(f"`n_models` must be at least 1, not {n_models}.")
        if not all(width > 0 for width in net_arch):
            raise ValueError(f"`net_arch` of the dynamics must list positive layer widths, not {net_arch!r}.")
        if activation_fn not in ACTIVATIONS:
            raise ValueError(f"`activation_fn` of the dynamics must be one of {sorted(ACTIVATIONS)}, not {activation_fn!r}.")
        if precision not in PRECISIONS:
            raise ValueError(f"`precision` of the dynamics must be one of {sorted(PRECISIONS)}, not {precision!r}.")

    @property
    def matmul_dtype(self) -> th.dtype:
        """The dtype in which the networks are evaluated."""
        return matmul_dtype(self.precision, self.device)

    @property
    def device(self) -> th.device:
        """Where the networks are."""
        return self.observation_mean.device

    @property
    def observation_dtype(self) -> th.dtype:
        """
        The dtype of imagined observations.

        It is float32, unless rounding would lose the changes in the data, as of map coordinates that the environment gives in
        double precision. The networks' inputs are always float32.
        """
        assert isinstance(self.observation_space, spaces.Box)
        if np.result_type(self.observation_space.dtype, np.float32) == np.float32:
            return th.float32
        largest = th.maximum(self.observation_low.abs(), self.observation_high.abs())
        change = self.target_std[: self.observation_dim]
        is_swallowed = largest.isfinite() & (change > 0) & (2.0**-24 * largest > 0.01 * change)
        is_swallowed |= self.observation_tails[0] != 0
        return th.float64 if is_swallowed.any() else th.float32

    @property
    def flops(self) -> int:
        """Number of floating-point operations of one member's prediction for one row."""
        return sum(2 * weight[0].numel() for weight in self.weights)

    def shares(self, world: World) -> list[list[slice]]:
        """
        Return the groups of members that each process computes, see ``member_groups``.

        On CPUs they depend on the number of processes only if there are fewer groups than processes. On GPUs, which are
        parallel themselves, a process computes all its members together.

        :param world: the processes
        :raises ValueError: if there are more processes than members
        """
        if world.size > self.n_models:
            raise ValueError(f"{world.size} processes cannot share {self.n_models} models: start fewer, or raise `n_models`.")
        is_cpu = self.device.type == "cpu"
        if not is_cpu and world.size == 1:
            return [[slice(0, self.n_models)]]
        at_least = max(groups.SAME_DIGITS_UP_TO, world.size) if is_cpu else world.size
        members = groups.member_groups(self.n_models, self.flops if is_cpu else 0, at_least)
        return groups.shares_of_processes(members, world.size)

    @th.no_grad()
    def reset_parameters(self, generator: th.Generator) -> None:
        """
        Draw new weights, as ``torch.nn.Linear`` does, and create a new optimiser.

        :param generator: on the CPU, so that a seed gives the same weights on every device
        """
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[1])
            for tensor in (weight, bias):
                tensor.copy_((th.rand(tensor.shape, generator=generator) * 2 - 1) * bound)
        if self.gains is not None:
            for gain, weight in zip(self.gains, self.weights, strict=True):
                gain.copy_(weight.norm(dim=1, keepdim=True))
        if self.probabilistic:
            self.max_log_var.fill_(0.5)
            self.min_log_var.fill_(-10.0)
        self.optimizer = th.optim.Adam(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)

    # ---------------------------------------------------------------- the networks

    def _chosen(self, members: th.Tensor | None) -> dict[str, th.Tensor]:
        """Return the parameters of some members (long; None: all) by name."""
        return {name: x if members is None else x[members] for name, x in self.named_parameters()}

    def _layers(self, parameters: Mapping[str, th.Tensor]) -> list[Layer]:
        """
        Apply the weight normalisation, if there is one.

        :param parameters: parameters of any members by name
        :return: effective weights and biases of each layer, ([M, in, out], [M, 1, out])
        """
        layers: list[Layer] = []
        for i in range(len(self.weights)):
            weight = parameters[f"weights.{i}"]
            if self.weight_norm:
                weight = weight * (parameters[f"gains.{i}"] / weight.norm(dim=1, keepdim=True))
            layers.append((weight, parameters[f"biases.{i}"]))
        return layers

    # ---------------------------------------------------------------- fit

    def fit(
        self,
        data: Transitions,
        *,
        max_epochs: int = 100,
        max_gradient_steps: int = 600,
        batch_size: int = 256,
        validation_fraction: float = 0.2,
        rolling_average_persistency: float = 0.9,
        generator: th.Generator | None = None,
        n_new_rows: int = 0,
        on_pass: PassHook | None = None,
        n_threads: int = 1,
        world: World = ALONE,
    ) -> FitReport:
        """
        Recompute the statistics of the data, and train every member from its current weights.

        :param data: transitions in raw units
        :param max_epochs: maximum number of epochs; early stopping may end the fit sooner
        :param max_gradient_steps: maximum number of optimiser steps, so that more data does not make the fit longer
        :param batch_size: rows per member and gradient step
        :param validation_fraction: share of the rows that each member holds out, drawn anew at every fit
        :param rolling_average_persistency: of the early stopping, see ``training.fit_members``
        :param generator: determines each member's splits and batches
        :param n_new_rows: number of the last rows that no fit has seen yet; they come first if there is no time for all
        :param on_pass: called after every pass with its number, the maximum number, and the mean best validation loss
        :param n_threads: how many threads share the members, see ``threads.worker_threads``
        :param world: the processes that share the members; all of them call this with the same arguments
        :return: losses, epochs, gradient steps and errors of learned rewards of each member
        :raises ValueError: if the data is empty or not finite
        """
        inputs, targets = self._standardize(data)
        terminated = data.terminated.to(self.device, th.float32)
        names = [name for name, _ in self.named_parameters()]

        def output_of(named: Mapping[str, th.Tensor], rows: th.Tensor) -> th.Tensor:
            return forward(cast(self._layers(named), self.matmul_dtype), inputs[rows], self.activation_fn)

        def reward_error(parameters: Sequence[th.Tensor], rows: th.Tensor) -> th.Tensor:
            mean, _, _ = self.layout.split(output_of(dict(zip(names, parameters, strict=True)), rows))
            return self.target_std[-1] * (mean[..., -1] - targets[rows][..., -1]).abs().mean(1)

        def loss_fn(parameters: Sequence[th.Tensor], rows: th.Tensor) -> th.Tensor:
            named = dict(zip(names, parameters, strict=True))
            bounds = (named["min_log_var"], named["max_log_var"]) if self.probabilistic else None
            return member_losses(
                self.layout.split(output_of(named, rows)),
                targets[rows],
                terminated[rows],
                self.observation_dim,
                log_var_bounds=bounds,
                # Validation compares likelihoods: weights that move with the variances would not be comparable
                beta=BETA if th.is_grad_enabled() else 0.0,
            )

        shares = self.shares(world)
        own = shares[world.rank]
        report = fit_members(
            list(self.parameters()),
            self.optimizer,
            loss_fn,
            len(inputs),
            max_epochs=max_epochs,
            max_gradient_steps=max_gradient_steps,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            rolling_average_persistency=rolling_average_persistency,
            generator=generator if generator is not None else th.Generator(self.device),
            n_new_rows=n_new_rows,
            on_pass=on_pass,
            n_threads=n_threads,
            groups=groups.merged(own, self.flops) if groups.SAME_DIGITS_UP_TO == 1 else own,
            error_fn=reward_error if self.learned_reward else None,
        )
        return self._exchanged(report, world, [slice(share[0].start, share[-1].stop) for share in shares])

    @th.no_grad()
    def _exchanged(self, report: FitReport, world: World, members: Sequence[slice]) -> FitReport:
        """Give every process the weights, averages and losses of the members that the others have trained."""
        if world.size == 1:
            return report
        own, counts = members[world.rank], [share.stop - share.start for share in members]
        for parameter in self.parameters():
            parameter.copy_(world.gather(parameter[own], counts))
            state = self.optimizer.state[parameter]
            for name in sorted(state):
                if is_stacked(state[name], parameter):
                    state[name] = world.gather(state[name][own], counts)
                else:  # the number of steps
                    state[name] = th.full_like(state[name], world.largest(int(state[name])))
        columns = th.as_tensor(np.stack(report, axis=1))[own]
        return FitReport(*world.gather(columns, counts).numpy().T)

    @th.no_grad()
    def _standardize(self, data: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """
        Update the statistics, and standardise the data.

        :param data: transitions in raw units
        :return: standardised inputs (B, O + A) and targets (B, target_dim), float32
        """
        data = Transitions(*(x.to(self.device) for x in data))
        action = self.codec.to_dynamics(data.action)
        standardised, statistics = standardize(data, action, learned_reward=self.learned_reward)
        for name, value in statistics.items():
            getattr(self, name).copy_(value)
        return th.cat([standardised["observation"], standardised["action"]], dim=1), standardised["target"]

    # ---------------------------------------------------------------- use

    @th.no_grad()
    def step_fn(
        self,
        clip_margin: float | None = None,
        *,
        generator: th.Generator | None = None,
        members: Sequence[int] | None = None,
        dtype: th.dtype | None = None,
    ) -> EnsembleStep:
        """
        Return the imagined step as a function of tensors, for the imagination and for ``ModelVecEnv``.

        The standardisation is folded into the first and the last layer, so that a step is little more than its matmuls.
        Only the mean of the observations is subtracted separately: if it is large, folding it would lose all precision.

        :param clip_margin: clip predicted observations to the range of the data, widened on both sides by this many
            standard deviations; None: no clipping
        :param generator: draws the noise of probabilistic members if the caller of the function gives none; None: predict
            their mean then
        :param members: the ``M`` members of the function, in this order; None: all
        :param dtype: dtype of the matmuls; None: that of the ensemble's ``precision``
        :return: a function of (obs (M, B, O), encoded action (M, B, A)) for the current weights; a later fit does not
            change it
        """
        chosen = self._chosen(None if members is None else th.as_tensor(members, device=self.device))
        center = self.observation_mean.clone()
        if self.observation_dtype == th.float64:
            center = center.double() + self.observation_tails[0]
        noise_bounds = None
        if self.probabilistic:
            noise_bounds = NoiseBounds.of(chosen["min_log_var"], chosen["max_log_var"], self.target_std)
        layers = folded(
            self._layers(chosen),
            input_std=th.cat([self.observation_std, self.action_std]),
            action_mean=self.action_mean,
            target_mean=self.target_mean,
            target_std=self.target_std,
        )
        return EnsembleStep(
            layers=tuple(cast(layers, dtype or self.matmul_dtype)),
            activation_fn=self.activation_fn,
            layout=self.layout,
            center=center,
            observation_range=None if clip_margin is None else self.observation_range(clip_margin),
            noise_bounds=noise_bounds,
            generator=generator,
        )

    def observation_range(self, margin: float) -> tuple[th.Tensor, th.Tensor]:
        """Return the range of the observations in the data, widened by ``margin`` standard deviations: low, high (O,)."""
        spread, low, high = margin * self.observation_std, self.observation_low, self.observation_high
        if self.observation_dtype == th.float64:
            low, high = low.double() + self.observation_tails[1], high.double() + self.observation_tails[2]
        return low - spread, high + spread

    @th.no_grad()
    def predict(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """
        Predict the next observation with every member (the mean of probabilistic members).

        :param obs: (B, O)
        :param action: (B, ``*action_space.shape``), as an environment takes it
        :return: next observations (M, B, O), in ``observation_dtype``
        """
        obs_tensor = th.as_tensor(np.asarray(obs), device=self.device, dtype=self.observation_dtype)
        action_tensor = self.codec.to_dynamics(self.codec.from_numpy(np.asarray(action), self.device))
        shapes = obs_tensor.shape, action_tensor.shape
        if shapes != ((len(action_tensor), self.observation_dim), (len(obs_tensor), self.action_dim)):
            raise ValueError(
                f"`obs` must have shape (B, {self.observation_dim}) and `action` as many rows of {self.action_space}, "
                f"not {np.shape(obs)} and {np.shape(action)}."
            )
        expand = (self.n_models, -1, -1)
        # Members may differ by less than bfloat16 can represent
        step = self.step_fn(dtype=th.float32)
        next_obs = step(obs_tensor.expand(expand), action_tensor.expand(expand)).next_obs
        return next_obs.cpu().numpy()

    def disagreement(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """
        Measure the disagreement of the members.

        It is the standard deviation of the predictions over the members, in standard deviations of the observed changes,
        averaged over the dimensions.

        :param obs: (B, O)
        :param action: (B, ``*action_space.shape``)
        :return: (B,), 0 where all members agree
        """
        spread: np.ndarray = relative_spread(th.as_tensor(self.predict(obs, action)), self._unit().cpu()).numpy()
        return spread

    def disagreement_fn(self) -> Disagreement:
        """Return ``disagreement`` as a function of tensors, for the current weights; a later fit does not change it."""
        return Disagreement(self.step_fn(), self.n_models, self._unit())

    def _unit(self) -> th.Tensor:
        """Return the standard deviations of the observed changes (O,)."""
        return self.target_std[: self.observation_dim].clone()

    # ---------------------------------------------------------------- files

    def save(self, path: Path) -> None:
        """
        Save the ensemble: spaces, arguments, weights, statistics and optimiser. Nothing in the file can run code.

        :param path: a file name (".zip" is appended if it has no suffix) or an open file
        :raises OSError: if the file cannot be written; an older file is left as it was
        """
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if hasattr(self, name)}
        del arguments["device"]
        save_ensemble(path, arguments, {"dynamics": self, "dynamics.optimizer": self.optimizer})

    @classmethod
    def load(cls, path: Path, device: th.device | str = "auto") -> "DynamicsEnsemble":
        """
        Load a saved ensemble. Nothing is unpickled, so a file of unknown origin cannot run code.

        :param path: a file name or an open file
        :param device: where to put the networks; "auto" is a GPU if there is one
        :return: the saved ensemble, ready to predict or to be trained further
        :raises ValueError: if the file is damaged, holds something else, or is of an unsupported version
        """
        with opened_ensemble(path, device) as (arguments, params):
            ensemble = cls(**arguments, device=get_device(device))
            ensemble.load_state_dict(params["dynamics"])
            ensemble.optimizer.load_state_dict(params["dynamics.optimizer"])
        return ensemble
