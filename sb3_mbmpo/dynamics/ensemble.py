"""An ensemble of dynamics networks as stacked weights: one batched matmul a layer serves all members.

Legend of shapes: ``M`` members, ``B`` rows, ``O`` observation size, ``A`` width of the encoded action.
"""

import inspect
import io
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file
from stable_baselines3.common.utils import get_device
from torch import nn

from sb3_mbmpo.actions import ActionCodec, check_spaces
from sb3_mbmpo.dynamics.networks import ACTIVATIONS, PRECISIONS, Layer, cast, forward, matmul_dtype, softly_bounded
from sb3_mbmpo.dynamics.step import EnsembleStep, NoiseBounds, OutputLayout
from sb3_mbmpo.dynamics.training import FitReport, PassHook, fit_members
from sb3_mbmpo.dynamics.types import StepFn, Transitions
from sb3_mbmpo.finite import mean_tail, resolution
from sb3_mbmpo.save_util import TAKE_A_COPY, Path, check_file, existing_file, file_name, file_stamp, output, plain, sealed
from sb3_mbmpo.space_files import space_from_dict, space_to_dict

# Widths of the hidden layers, unless told otherwise
NET_ARCH = (200, 200, 200)


class DynamicsEnsemble(nn.Module):
    """
    ``M`` networks that map (observation, action) to the change of the observation, and to the reward and the termination
    where those are to be learned too (Clavera et al. 2018, section 4.2).

    Inputs and targets are standardised with statistics of the data of the last fit. Those statistics are buffers of the
    module, so that they are saved, moved and loaded with the weights.

    :param observation_space: Box of one dimension
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param n_models: number of members
    :param net_arch: hidden layer widths
    :param activation_fn: one of "relu", "swish" (= "silu"), "tanh", "elu", "gelu"
    :param weight_norm: learn direction and length of each unit's weights apart (Salimans and Kingma 2016)
    :param probabilistic: predict a Gaussian with learned variances and sample it in the imagination, instead of a point
    :param learned_reward: add a reward head
    :param learned_termination: add a termination head
    :param learning_rate: Adam step size
    :param weight_decay: L2 penalty, as ``torch.optim.Adam`` has it
    :param seed: of the initial weights
    :param device: where the networks live
    :param precision: dtype of the matmuls in fits and imagined steps: "float32", "bfloat16", or "auto": bfloat16 on GPUs and
        on CPUs with AMX, where it is several times faster. Weights, optimiser and statistics are float32 in any case
    """

    observation_mean: th.Tensor
    # What single precision leaves of the mean, where that matters, of the lowest and of the highest observation
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
        """In which the networks are evaluated."""
        return matmul_dtype(self.precision, self.device)

    @property
    def device(self) -> th.device:
        return self.observation_mean.device

    @property
    def observation_dtype(self) -> th.dtype:
        """
        In which imagined observations are kept: float32, unless that would swallow the changes that the data has, as of map
        coordinates that the environment gives in double precision. The networks see float32 in any case.
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
        """Floating-point operations of one member's prediction of one row."""
        return sum(2 * weight[0].numel() for weight in self.weights)

    @th.no_grad()
    def reset_parameters(self, generator: th.Generator) -> None:
        """
        Draw new weights (as ``torch.nn.Linear`` does, member by member) and start a new optimiser.

        :param generator: on the CPU, so that a seed means the same weights on every device
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
        """Return parameters by name, of some members (long; None: all)."""
        return {name: x if members is None else x[members] for name, x in self.named_parameters()}

    def _layers(self, parameters: Mapping[str, th.Tensor]) -> list[Layer]:
        """
        Apply the weight norm.

        :param parameters: by name, of any members
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
    ) -> FitReport:
        """
        Recompute the statistics over the data and train every member on it, from its present weights.

        :param data: transitions in raw units
        :param max_epochs: how often a row is seen at most; early stopping may end sooner
        :param max_gradient_steps: optimiser steps at most, so that a fit of much data takes no longer than one of little
        :param batch_size: rows a member and gradient step
        :param validation_fraction: share of rows each member keeps aside, drawn anew at every fit
        :param rolling_average_persistency: of the early stop, see ``training.fit_members``
        :param generator: draws splits and batches
        :param n_new_rows: how many of the last rows no fit has seen yet: they come first, if not all can be seen
        :param on_pass: called after every pass with its number, the most there may be, and the mean best validation loss
        :param n_threads: how many threads share the members, see ``threads.worker_threads``
        :raises ValueError: if the data is empty or not finite
        """
        inputs, targets = self._standardise(data)
        terminated = data.terminated.to(self.device, th.float32)
        names = [name for name, _ in self.named_parameters()]

        def loss_fn(parameters: Sequence[th.Tensor], rows: th.Tensor) -> th.Tensor:
            named = dict(zip(names, parameters, strict=True))
            output = forward(cast(self._layers(named), self.matmul_dtype), inputs[rows], self.activation_fn)
            mean, log_var, logit = self.layout.split(output)
            error = (mean - targets[rows]).square()
            if log_var is not None:
                lower, upper = named["min_log_var"], named["max_log_var"]
                log_var = softly_bounded(log_var, lower, upper)
                error = error * th.exp(-log_var) + log_var
            loss = error[..., : self.observation_dim].mean((1, 2))
            if self.learned_reward:
                loss = loss + error[..., -1].mean(1)
            if logit is not None:
                entropy = F.binary_cross_entropy_with_logits(logit, terminated[rows], reduction="none")
                loss = loss + entropy.mean(1)
            if log_var is not None:
                loss = loss + 0.01 * (upper - lower).sum((1, 2))
            return loss

        return fit_members(
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
        )

    @th.no_grad()
    def _standardise(self, data: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """Update the statistics. :return: standardised inputs (B, O + A) and targets (B, target_dim), float32"""
        if len(data.obs) == 0:
            raise ValueError("There are no transitions to fit the dynamics ensemble to.")
        # float64: the statistics of a float32 column with a large mean would lose its spread
        obs, next_obs, reward = (x.to(self.device, th.float64) for x in (data.obs, data.next_obs, data.reward))
        action = self.codec.to_dynamics(data.action.to(self.device)).double()
        target = th.cat([next_obs - obs, reward.unsqueeze(1)], dim=1) if self.learned_reward else next_obs - obs
        columns = {"observation": obs, "action": action, "target": target}
        for name, value in columns.items():
            if not th.isfinite(value).all():
                raise ValueError(f"The transitions contain a {name} that is NaN or infinite: the dynamics cannot be fitted.")
        rounding = resolution(th.cat([data.obs, data.next_obs]))
        floors = {"observation": rounding, "action": resolution(action.float()), "target": rounding}
        if self.learned_reward:
            floors["target"] = th.cat([rounding, resolution(data.reward.unsqueeze(1))])
        standardised = []
        for name, value in columns.items():
            # Rounded as the buffers are, so that the imagination inverts exactly what the fit has seen
            exact_mean, std = value.mean(0), value.std(0, correction=0).float()
            mean = exact_mean.float()
            # An input that never changes is left unscaled: dividing by its tiny spread would only amplify rounding. A target
            # that never changes is predicted exactly: an error at unit scale would let, say, a fixed goal drift.
            constant = std <= floors[name].to(self.device)
            if name == "observation" and data.obs.dtype == th.float64:
                self.observation_tails[0] = mean_tail(exact_mean, std).masked_fill(constant, 0)
                value = value - self.observation_tails[0]
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(std.masked_fill(constant, 0 if name == "target" else 1))
            standardised.append(((value - mean) / std.masked_fill(constant, 1)).float())
        both = th.cat([obs, next_obs])
        low, high = both.amin(0), both.amax(0)
        self.observation_low.copy_(low)
        self.observation_high.copy_(high)
        self.observation_tails[1:] = th.stack([low, high]) - th.stack([self.observation_low, self.observation_high])
        return th.cat(standardised[:2], dim=1), standardised[2]

    # ---------------------------------------------------------------- use

    def step_fn(
        self,
        clip_margin: float | None = None,
        *,
        generator: th.Generator | None = None,
        members: Sequence[int] | None = None,
    ) -> StepFn:
        """
        The imagined step as a function of tensors, for the imagination and for ``ModelVecEnv``.

        The standardisation is folded into the first and the last layer, so that a step is little more than its matmuls.
        Only the mean of the observations is subtracted apart: where it is large, folding it would cancel all precision.

        :param clip_margin: clip predicted observations to the range of the data, widened on both sides by this many
            standard deviations; None: no clipping
        :param generator: draws the noise of probabilistic members; None: their mean
        :param members: which members are the ``M`` of the function, in this order; None: all
        :return: a function of (obs (M, B, O), encoded action (M, B, A)) for the present weights; a later fit does not
            change it
        """
        return self.step_fns([generator], clip_margin=clip_margin, members=members)[0]

    @th.no_grad()
    def step_fns(
        self,
        generators: Sequence[th.Generator | None],
        *,
        clip_margin: float | None = None,
        members: Sequence[int] | None = None,
        dtype: th.dtype | None = None,
    ) -> list[StepFn]:
        """
        ``step_fn`` for several threads, which share the weights.

        :param generators: one a thread
        :param dtype: of the matmuls; None: that of the ensemble's ``precision``
        :return: a function a thread
        """
        chosen = self._chosen(None if members is None else th.as_tensor(members, device=self.device))
        center = self.observation_mean.clone()
        if self.observation_dtype == th.float64:
            center = center.double() + self.observation_tails[0]
        noise_bounds = None
        if self.probabilistic:
            noise_bounds = NoiseBounds(
                lower=chosen["min_log_var"].clone(),
                upper=chosen["max_log_var"].clone(),
                log_target_var=2 * self.target_std.log(),
            )
        step = EnsembleStep(
            layers=tuple(cast(self._folded_layers(chosen), dtype or self.matmul_dtype)),
            activation_fn=self.activation_fn,
            layout=self.layout,
            center=center,
            observation_range=None if clip_margin is None else self.observation_range(clip_margin),
            noise_bounds=noise_bounds,
            generator=None,
        )
        return [replace(step, generator=generator) for generator in generators]

    def observation_range(self, margin: float) -> tuple[th.Tensor, th.Tensor]:
        """Return lowest and highest observation of the data, ``margin`` standard deviations further out (O,)."""
        spread, low, high = margin * self.observation_std, self.observation_low, self.observation_high
        if self.observation_dtype == th.float64:
            low, high = low.double() + self.observation_tails[1], high.double() + self.observation_tails[2]
        return low - spread, high + spread

    def _folded_layers(self, parameters: Mapping[str, th.Tensor]) -> list[Layer]:
        """Return layers from raw, centred observations and raw actions to raw targets: the rest is part of the weights."""
        layers = [(weight.double(), bias.double()) for weight, bias in self._layers(parameters)]
        input_std = th.cat([self.observation_std, self.action_std]).double()
        weight, bias = layers[0]
        weight = weight / input_std.unsqueeze(1)
        layers[0] = weight, bias - (self.action_mean.double() @ weight[:, self.observation_dim :]).unsqueeze(1)
        weight, bias = layers[-1]
        scale, shift = th.ones_like(bias[0, 0]), th.zeros_like(bias[0, 0])
        scale[: self.target_dim], shift[: self.target_dim] = self.target_std, self.target_mean
        layers[-1] = weight * scale, bias * scale + shift
        return cast(layers, th.float32)

    @th.no_grad()
    def predict(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """
        Every member's prediction of the next observation (the mean, for probabilistic members).

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
        # Members may differ by less than low precision tells apart
        (step,) = self.step_fns([None], dtype=th.float32)
        next_obs = step(obs_tensor.expand(expand), action_tensor.expand(expand)).next_obs
        return next_obs.cpu().numpy()

    def disagreement(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """
        How far the members are apart: the standard deviation of their predictions over the members, in units of the
        standard deviation of the observed changes, averaged over the dimensions.

        :param obs: (B, O)
        :param action: (B, ``*action_space.shape``)
        :return: (B,), 0 where all members agree
        """
        target_std = self.target_std[: self.observation_dim].cpu().numpy()
        # Nobody disagrees about what never changes
        spread = self.predict(obs, action).std(0) / np.where(target_std > 0, target_std, np.inf)
        mean_spread: np.ndarray = spread.mean(1)
        return mean_spread

    # ---------------------------------------------------------------- files

    def save(self, path: Path) -> None:
        """
        Save the ensemble alone: spaces, arguments, weights, statistics and optimiser. Nothing in the file can run code.

        :param path: a file name (".zip" is appended if it has no suffix) or a file
        :raises OSError: if it cannot be written; an older file is as it was
        """
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if hasattr(self, name)}
        del arguments["device"]
        for name in ("observation_space", "action_space"):
            arguments[name] = space_to_dict(arguments[name])
        params = plain({"dynamics": self.state_dict(), "dynamics.optimizer": self.optimizer.state_dict()})
        archive = io.BytesIO()
        save_to_zip_file(archive, {**file_stamp("ensemble"), "arguments": arguments}, params)
        with output(path, "zip") as file:
            file.write(sealed(archive.getvalue()))

    @classmethod
    def load(cls, path: Path, device: th.device | str = "auto") -> "DynamicsEnsemble":
        """
        Load what ``save`` has written. Nothing is unpickled: a file of unknown origin runs no code.

        :param path: a file name or a file
        :param device: where the networks shall live; "auto" is a GPU if there is one
        :return: the saved ensemble, ready to predict or to be fitted further
        :raises ValueError: if the file is damaged, holds something else, or is of a version whose files this one cannot read
        """
        data = check_file(path, "ensemble")
        try:
            arguments = data["arguments"]
            for name in ("observation_space", "action_space"):
                arguments[name] = space_from_dict(arguments[name])
            ensemble = cls(**arguments, device=get_device(device))
            _, saved, _ = load_from_zip_file(existing_file(path, "zip"), load_data=False, device=device)
            params: dict[str, Any] = saved  # SB3 takes them for single tensors
            ensemble.load_state_dict(params["dynamics"])
            ensemble.optimizer.load_state_dict(params["dynamics.optimizer"])
        except Exception as error:
            # PyTorch's advice is to unpickle it all the same
            is_foreign = isinstance(error, pickle.UnpicklingError)
            reason = "it has objects that are no tensors" if is_foreign else f"{type(error).__name__}: {error}"
            raise ValueError(f"{file_name(path)} holds an ensemble that cannot be built ({reason}). {TAKE_A_COPY}") from error
        return ensemble
