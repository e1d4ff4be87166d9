"""The meta-policy: an SB3 actor that can be evaluated with explicit parameter sets, many at once.

Legend of shapes: ``T`` parameter sets (tasks), ``P`` actor parameters, ``B`` rows, ``O`` observation size.
"""

import copy
import io
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_mbmpo.common.actions import ActionCodec, check_spaces
from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.common.finite import in_float32, mean_tail, resolution
from sb3_mbmpo.common.observations import Standardization
from sb3_mbmpo.common.save_util import file_name, read_sealed, sealed
from sb3_mbmpo.common.stacked_actor import Layer, StackedActor, StackedLayers, StackedModule, is_plain

SelfPolicy = TypeVar("SelfPolicy", bound="MetaPolicy")

# The actor's parameters in SB3's actor-critic policy, which are adapted; the others are the critic's, trained by regression
ACTOR_MODULES = ("features_extractor.", "pi_features_extractor.", "mlp_extractor.policy_net.", "action_net.", "log_std")
# Default widths of the hidden layers
NET_ARCH = {"pi": [64, 64], "vf": [128, 128]}
# For actions in [-1, 1]. With less noise, real steps would bring little new data, and likelihoods would be too peaked
LOG_STD_MIN = -1.2
NO_FINITE_ACTION = "The policy's parameters, or the outputs of its features extractor, are NaN or infinite: it has no action"


class ValueHead(nn.Linear):
    """
    The last layer of a critic, which standardises its targets, whatever their scale (PopArt, van Hasselt et al. 2016).

    :param linear: the layer whose weights it takes over
    """

    mean: th.Tensor
    std: th.Tensor
    is_trained: th.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
        self.load_state_dict(linear.state_dict())
        self.register_buffer("mean", th.zeros(()))
        self.register_buffer("std", th.ones(()))
        self.register_buffer("is_trained", th.zeros((), dtype=th.bool))

    def forward(self, latent: th.Tensor) -> th.Tensor:
        """Return values in units of the targets (B, 1)."""
        return self.in_units(super().forward(latent))

    def in_units(self, scaled: th.Tensor) -> th.Tensor:
        """Convert the output of the linear layer to units of the targets."""
        return scaled * self.std + self.mean

    @th.no_grad()
    def rescale(self, mean: th.Tensor, std: th.Tensor) -> None:
        """
        Set new statistics of the targets, but preserve the predicted values (PopArt, van Hasselt et al. 2016).

        The values of an untrained layer are not preserved, because they are meaningless: they take the scale of the targets.

        :param mean: mean of the targets ()
        :param std: standard deviation of the targets (), greater than 0
        """
        if self.is_trained:
            self.weight.mul_(self.std / std)
            self.bias.mul_(self.std).add_(self.mean - mean).div_(std)
        self.is_trained.fill_(True)
        self.mean.copy_(mean)
        self.std.copy_(std)


class MetaPolicy(ActorCriticPolicy):
    """
    SB3's ``MlpPolicy`` for MB-MPO.

    It differs in three ways. Observations are standardised by statistics that are buffers of the policy
    (``observation_mean``, ``observation_std``: saved and loaded with it), which MBMPO sets from its real data. The networks
    and ``log_std`` of a Box space work in [-1, 1], which is mapped to the environment's bounds, as in the authors' code. And
    ``optimizer`` trains the critic only, whose last layer (``value_net``) scales its outputs by the statistics of its targets;
    the meta-learner trains the actor.

    Actions are in the environment's units wherever SB3 passes them: in ``forward``, ``evaluate_actions``,
    ``get_distribution`` (including densities) and ``predict``. That is what ``squash_output=False`` means in SB3: code that
    clones recorded actions with ``evaluate_actions``, or exports ``forward`` and clips its actions to the bounds, as SB3's
    recipe for ONNX does, need not know about the scaling. Only ``actor``, which MBMPO itself uses, works in [-1, 1].

    :param observation_space: Box of one dimension
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param lr_schedule: step size of the critic's optimiser
    :param net_arch: hidden layers: a list for both actor and critic, or ``dict(pi=[...], vf=[...])``
    :param normalize_observation: standardise observations with statistics of the real data
    :param log_std_min: the log standard deviation of the meta-policy is never below this (authors: log 1e-6); None: -1.2, or
        ``log_std_init`` if that is lower
    :param kwargs: other arguments of SB3's ``ActorCriticPolicy``, except those of gSDE
    """

    observation_mean: th.Tensor
    observation_mean_tail: th.Tensor
    observation_std: th.Tensor
    value_net: ValueHead

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *,
        normalize_observation: bool = True,
        log_std_min: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_spaces(observation_space, action_space)
        if kwargs.get("use_sde") or kwargs.get("squash_output"):
            raise ValueError("MBMPO does not support gSDE (`use_sde`, `squash_output`): its actions are clipped Gaussians.")
        if net_arch is None:
            net_arch = copy.deepcopy(NET_ARCH)
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **kwargs)
        assert isinstance(observation_space, spaces.Box)
        self.normalize_observation = normalize_observation
        self.log_std_min = min(LOG_STD_MIN, self.log_std_init) if log_std_min is None else log_std_min
        self.register_buffer("observation_mean", th.zeros(observation_space.shape))
        self.register_buffer("observation_mean_tail", th.zeros(observation_space.shape))
        self.register_buffer("observation_std", th.ones(observation_space.shape))
        self._codec = ActionCodec(action_space)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for unsupported in ("use_sde", "squash_output", "full_std", "use_expln"):
            data.pop(unsupported)
        data.update(normalize_observation=self.normalize_observation, log_std_min=self.log_std_min)
        return data

    def __getstate__(self) -> dict[str, Any]:
        # SB3 keeps the last distribution of actions, with its graph of gradients, which cannot be copied
        action_dist = copy.copy(self.action_dist)
        action_dist.distribution = None  # type: ignore[assignment]
        return {**vars(self), "action_dist": action_dist}

    def save(self, path: str) -> None:
        """
        See ``BasePolicy``.

        :raises OSError: if the file cannot be written; an older file is left as it was
        """
        archive = io.BytesIO()
        super().save(archive)  # type: ignore[arg-type]
        content = sealed(archive.getvalue())
        if isinstance(path, (str, Path)):
            write_whole(path, content)
        else:
            path.write(content)

    @classmethod
    def load(cls: type[SelfPolicy], path: str, device: th.device | str = "auto") -> SelfPolicy:
        """
        See ``BasePolicy``.

        :raises ValueError: if the file is damaged, or holds no policy of this class
        """
        content = read_sealed(path)
        try:
            return super().load(io.BytesIO(content), device)  # type: ignore[arg-type]
        except Exception as error:
            raise ValueError(
                f"{file_name(path)} holds no policy that `{cls.__name__}.load` can read ({type(error).__name__}: {error}). It "
                "is another kind of file, to be loaded with the class that saved it, or damaged: take an earlier copy."
            ) from error

    # ---------------------------------------------------------------- observations and actions, through SB3's interface

    def standardize(self, obs: th.Tensor) -> th.Tensor:
        """
        Standardise observations by the statistics of the real data.

        :param obs: observations as the (possibly VecNormalize-d) environment gives them (..., O)
        :return: input of the networks (..., O), in the dtype of the policy
        """
        return self.standardization()(obs)

    def standardization(self) -> Standardization:
        """Return ``standardize`` as a value that can be pickled; it shares the buffers of the statistics."""
        return Standardization(self.observation_mean, self.observation_mean_tail, self.observation_std)

    @th.no_grad()
    def set_observation_statistics(self, obs: th.Tensor) -> None:
        """
        Set the statistics for standardisation to those of the given observations.

        :param obs: observations as the policy receives them (B, O), floating; a constant dimension is not scaled
        """
        if not self.normalize_observation:
            return
        mean, std = obs.mean(0), obs.std(0, correction=0)
        self.observation_mean.copy_(mean)
        self.observation_mean_tail.copy_(mean_tail(mean.double(), std).masked_fill(std <= resolution(obs), 0))
        self.observation_std.copy_(th.where(std > resolution(obs), std, th.ones_like(std)))

    def extract_features(self, obs: PyTorchObs, features_extractor: Any = None) -> Any:
        """See ``ActorCriticPolicy``. Observations are standardised first."""
        assert isinstance(obs, th.Tensor)
        return super().extract_features(self.standardize(obs), features_extractor)

    def get_distribution(self, obs: PyTorchObs) -> Any:
        """See ``ActorCriticPolicy``. Observations are standardised first."""
        # SB3 bypasses an overridden ``extract_features`` here
        assert isinstance(obs, th.Tensor)
        return super().get_distribution(self.standardize(obs))

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        Estimate the values of observations.

        :param obs: observations as the (possibly VecNormalize-d) environment gives them (B, O)
        :return: values in units of the reward (B, 1)
        """
        assert isinstance(obs, th.Tensor)
        return self.values(self.standardize(obs)).unsqueeze(-1)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        if not isinstance(self.action_dist, DiagGaussianDistribution):
            return super()._get_action_dist_from_latent(latent_pi)
        return self.action_dist.proba_distribution(*self._codec.gaussian_to_env(self.action_net(latent_pi), self.log_std))

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        See ``BasePolicy``.

        :raises ValueError: if an observation is NaN, or infinite in single precision, or has no finite action
        """
        if not isinstance(observation, dict):
            observation = np.asarray(observation)
            if not in_float32(observation).all():
                raise ValueError(f"There is no action for an observation that is NaN or infinite: {observation}.")
        return super().predict(observation, state, episode_start, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        try:
            actions = super()._predict(observation, deterministic)
        except ValueError as error:
            if "constraint" not in str(error):
                raise
            # PyTorch checks the parameters of distributions, though not with `python -O`
            raise ValueError(f"{NO_FINITE_ACTION} for one of the observations {observation}: {error}") from error
        if not th.isfinite(actions).all():
            raise ValueError(f"{NO_FINITE_ACTION} for one of the observations {observation}.")
        return actions

    # ---------------------------------------------------------------- the critic

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.value_net = ValueHead(self.value_net)
        # On so small a network, the unfused optimiser takes as long as the gradients
        kwargs = {"fused": True} if self.optimizer_class is th.optim.Adam else {}
        # The meta-learner sets the actor's parameters, so this optimiser's momentum must not move them
        self.optimizer = self.optimizer_class(
            self.critic_parameters().values(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **{**kwargs, **self.optimizer_kwargs},
        )

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """Return the critic's parameters by name, in a fixed order."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith(ACTOR_MODULES)}

    def values(self, policy_input: th.Tensor) -> th.Tensor:
        """
        Estimate the values of standardised observations.

        :param policy_input: standardised observations (..., O)
        :return: values in units of the reward (...)
        """
        rows = policy_input.flatten(0, -2)
        network = self.mlp_extractor.value_net
        # Of a minibatch, it is the calls that take time, and SB3's modules need fewer
        if not th.is_grad_enabled() and type(self.vf_features_extractor) is FlattenExtractor and is_plain(network):
            layers: list[Layer] = [
                (module.weight.T.unsqueeze(0), module.bias) if isinstance(module, nn.Linear) else module
                for module in [*network, self.value_net]
            ]
            value = self.value_net.in_units(StackedLayers.of(layers)(rows.unsqueeze(0)))
        else:
            value = self.value_net(self.mlp_extractor.forward_critic(self.vf_features_extractor(rows)))
        return value.view(policy_input.shape[:-1])

    # ---------------------------------------------------------------- explicit parameter sets

    def actor_parameters(self) -> dict[str, nn.Parameter]:
        """Return the actor's parameters, which are adapted, by name, in a fixed order."""
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(ACTOR_MODULES)}

    def actor_vector(self) -> th.Tensor:
        """Return a copy of the actor's parameters as one vector (P,)."""
        return nn.utils.parameters_to_vector(self.actor_parameters().values()).detach().clone()

    @th.no_grad()
    def set_actor_vector(self, vector: th.Tensor) -> None:
        """
        Set the actor's parameters.

        :param vector: the actor's parameters (P,), in the order of ``actor_vector``
        :raises ValueError: if one of them is NaN or infinite, because all actions would be, too
        """
        if not th.isfinite(vector).all():
            raise ValueError("The new parameters of the policy are not all finite numbers, so it keeps the old ones.")
        parameters = self.actor_parameters()
        # A copy: the parameters share the memory of the vector, and the projection below would write into it
        nn.utils.vector_to_parameters(vector.clone(), parameters.values())
        if "log_std" in parameters:
            parameters["log_std"].clamp_(min=self.log_std_min)

    def with_actor_vector(self, vector: th.Tensor) -> "MetaPolicy":
        """
        Copy the policy, and set the actor's parameters of the copy.

        :param vector: parameters (P,), for instance adapted ones
        :return: an independent policy with these parameters
        """
        policy = copy.deepcopy(self)
        policy.set_actor_vector(vector)
        return policy

    def actor(self, parameters: th.Tensor) -> StackedActor:
        """
        Return the actor as a differentiable function of its parameters.

        :param parameters: one set per task (T, P)
        :return: a function from standardised observations (T, B, O) to action distributions
        """
        named = self._unflatten(parameters)
        log_std = named.pop("log_std").unsqueeze(1) if "log_std" in named else None
        network = self._stacked_mlp(named) if self._is_plain_mlp() else self._stacked_any(named)
        return StackedActor(self.action_space, network, log_std)

    def _unflatten(self, parameters: th.Tensor) -> dict[str, th.Tensor]:
        """Return views of the columns of (T, P) as stacked parameters (T, *shape), by name."""
        shapes = {name: parameter.shape for name, parameter in self.actor_parameters().items()}
        columns = parameters.split([shape.numel() for shape in shapes.values()], dim=1)
        return {
            name: column.reshape(len(parameters), *shape)
            for (name, shape), column in zip(shapes.items(), columns, strict=True)
        }

    def _is_plain_mlp(self) -> bool:
        return type(self.pi_features_extractor) is FlattenExtractor and is_plain(self.mlp_extractor.policy_net)

    def _stacked_mlp(self, named: dict[str, th.Tensor]) -> StackedLayers:
        # Several times faster than vmap over SB3's modules
        modules = [(f"mlp_extractor.policy_net.{i}", module) for i, module in enumerate(self.mlp_extractor.policy_net)]
        layers: list[Layer] = []
        for name, module in [*modules, ("action_net", self.action_net)]:
            if isinstance(module, nn.Linear):
                layers.append((named[f"{name}.weight"].transpose(1, 2), named[f"{name}.bias"].unsqueeze(1)))
            else:
                layers.append(module)
        return StackedLayers.of(layers)

    def _stacked_any(self, named: dict[str, th.Tensor]) -> StackedModule:
        return StackedModule(_ActorOutput(self), {f"policy.{name}": parameter for name, parameter in named.items()})


class _ActorOutput(nn.Module):
    """The actor as a module whose ``forward`` returns means or logits; ``functional_call`` needs that, but SB3's samples."""

    def __init__(self, policy: MetaPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, policy_input: th.Tensor) -> th.Tensor:
        """Return the means or logits of standardised observations, (B, O) -> (B, .)."""
        policy = self.policy
        latent = policy.mlp_extractor.forward_actor(policy.pi_features_extractor(policy_input))
        output: th.Tensor = policy.action_net(latent)
        return output


MlpPolicy = MetaPolicy
