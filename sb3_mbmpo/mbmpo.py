"""MBMPO, the SB3 algorithm. It holds the state and the order of the stages; the other modules do the computations."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq, TrainFrequencyUnit

from sb3_mbmpo.arguments import check_arguments, check_before_building, check_device
from sb3_mbmpo.common.checks import check_choice, check_integer, check_number
from sb3_mbmpo.common.finite import as_floating
from sb3_mbmpo.common.health import TrainingHealth
from sb3_mbmpo.common.observations import PolicyInput
from sb3_mbmpo.common.progress import StageProgressBar, Stopwatch, dump_and_keep
from sb3_mbmpo.common.save_util import plain
from sb3_mbmpo.common.threads import single_threaded_operations, worker_threads
from sb3_mbmpo.common.world import ALONE, World
from sb3_mbmpo.dynamics import (
    DisagreementPenalty,
    DynamicsEnsemble,
    DynamicsOptions,
    FitReport,
    Transitions,
    groups,
    output_bias_array,
)
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.imagination.starts import StartSampler
from sb3_mbmpo.imagination.vec_env import ModelVecEnv
from sb3_mbmpo.meta.advantages import BASELINES
from sb3_mbmpo.meta.critic import Critic
from sb3_mbmpo.meta.few_shot import adapt_to_episodes, check_adaptation, check_env
from sb3_mbmpo.meta.outer_step import trust_region_step
from sb3_mbmpo.meta.problem import MetaParameters
from sb3_mbmpo.meta.results import MetaStep, MetaTraining
from sb3_mbmpo.meta.settings import MetaSettings
from sb3_mbmpo.meta.training import MetaTrainer
from sb3_mbmpo.policies import MetaPolicy, MlpPolicy
from sb3_mbmpo.real.rollouts import RealRolloutAlgorithm
from sb3_mbmpo.real.shared_state import adopt_state, sent_state, shared_arguments
from sb3_mbmpo.rewards.resolve import CheckedEnvFunctions, RewardFn, TerminationFn

SelfMBMPO = TypeVar("SelfMBMPO", bound="MBMPO")

# The arguments of TRPO's step
TRPO_OPTIONS = inspect.getfullargspec(trust_region_step).kwonlyargs
# Number of real observations that are saved with the model as starts of imagined rollouts
START_SAMPLE_SIZE = 1_000
# A critic that explains a smaller share of the imagined returns' variance cannot be compared with real returns
TRUSTED_EXPLAINED_VARIANCE = 0.5


class MBMPO(RealRolloutAlgorithm):
    """
    Model-Based Meta-Policy Optimization (MB-MPO).

    It learns an ensemble of dynamics models from few real steps, imagines rollouts in them, and meta-learns a policy that one
    policy-gradient step adapts to any of the models, so that model errors do less harm.

    Paper: https://arxiv.org/abs/1809.05214
    Code: https://github.com/jonasrothfuss/model_ensemble_meta_learning (the authors'; the guide lists the differences)

    :param policy: the policy, "MlpPolicy" or a subclass of it
    :param env: the environment to learn from (if registered in Gymnasium, can be str)
    :param learning_rate: Adam step size of the dynamics ensemble, a number or a schedule of the remaining progress (1 to 0)
    :param n_steps: real steps per iteration, summed over the environments (rounded up to the same number in each)
    :param learning_starts: uniformly random real steps before the first fit
    :param buffer_size: number of real transitions that are kept, first in first out
    :param exploration: which policy acts in the real environment: the "adapted" ones, one per episode, or the "meta" policy
    :param n_models: members of the ensemble
    :param dynamics_kwargs: arguments of ``DynamicsEnsemble`` (net_arch, activation_fn, weight_norm, weight_decay, precision,
        and probabilistic, which is True here by default) and of its ``fit`` (max_epochs, max_gradient_steps, batch_size,
        validation_fraction, rolling_average_persistency), and ``reinit_every`` (draw new weights at every k-th fit; 0: never),
        ``clip_margin`` (imagined observations stay within the range of the data plus this many standard deviations; None: no
        clipping), and, to study wrong models, ``output_bias`` and ``output_noise`` as in ``ModelVecEnv``
    :param reward_fn: "auto" (the environment's own ``reward(obs, action, next_obs)``, else the known one of its id, else
        learned), "learned", a function of torch tensors, or its path "pkg.module:function"
    :param termination_fn: "auto", "learned", None (episodes never terminate), a function of ``next_obs``, or its path
    :param n_tasks: tasks of a meta-step, a multiple of ``n_models``: task ``i`` uses model ``i // (n_tasks / n_models)``
    :param n_imagined_rollouts: imagined rollouts per task
    :param horizon: steps of an imagined rollout
    :param imagined_start: where imagined rollouts start: "initial" (real first observations) or "buffer" (any real one)
    :param recent_starts: share of the imagined rollouts that start at a step since the previous fit ("buffer" only)
    :param disagreement_penalty: weight of a penalty for imagined steps about which the models disagree more than about real
        ones, in standard deviations of the real rewards; 0: none, as in the paper
    :param n_inner_steps: policy-gradient steps of an adaptation
    :param inner_lr: step size of the adaptation
    :param learn_inner_lr: learn one inner step size per parameter, starting from ``inner_lr`` (Meta-SGD)
    :param first_order: ignore that the inner gradient depends on the meta-parameters (FOMAML, Finn et al. 2017)
    :param unadapted_share: share of the tasks of a meta-step whose policy does not adapt, so that the meta-policy, which
        ``predict`` uses, is good by itself; the others are judged after their adaptation. 0: as in the paper
    :param n_meta_steps: outer steps per iteration
    :param outer_optimizer: "trpo" or "ppo"
    :param target_kl: bound of the mean KL divergence of the adapted policies in a TRPO step, in nats
    :param momentum: a TRPO step follows a sum of this iteration's natural gradients, in which each meta-step back counts this
        factor less; 0: only that of its own batch, as in the paper
    :param cg_max_steps: maximum number of conjugate gradient iterations
    :param cg_damping: added to the diagonal of the Fisher matrix
    :param line_search_shrinking_factor: each step of the line search is the previous one times this factor
    :param line_search_max_iter: maximum number of steps that the line search tries
    :param sub_sampling_factor: the Fisher-vector products use every k-th imagined step
    :param outer_kwargs: arguments of the PPO outer step: learning_rate, n_epochs, clip_range
    :param ent_coef: weight of the policy's entropy in the outer objective
    :param stop_on_return_drop: end an iteration's meta-steps when the imagined return falls below its rolling average, and
        return to the best meta-policy: for tasks that can be solved completely, such as balancing
    :param chunk_size: imagined steps that a thread differentiates at a time (at least a whole task): fewer need less memory,
        more suit a GPU; except for rounding, the result is the same
    :param gamma: discount factor
    :param gae_lambda: trade-off of bias (0) and variance (1) of the advantages
    :param normalize_advantage: standardise the advantages of each task
    :param baseline: "critic" (the policy's value network, which also bootstraps at the end of imagined rollouts), "linear",
        "fourier" (linear and 100 random Fourier features), "time" or "zero"
    :param n_critic_updates: minibatch steps of the critic after each batch imagined under the meta-policy
    :param batch_size: rows of a critic's minibatch
    :param stats_window_size: number of episodes over which the logged metrics of real episodes are averaged
    :param tensorboard_log: log location for TensorBoard (if None, no logging)
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of all random numbers
    :param device: where all networks and imagined rollouts are; "auto" is a GPU if there is one
    :param _init_setup_model: whether to build the networks at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: MetaPolicy
    dynamics: DynamicsEnsemble

    def __init__(
        self,
        policy: str | type[MetaPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-3,
        # Real steps
        n_steps: int = 500,
        learning_starts: int = 1000,
        buffer_size: int = 100_000,
        exploration: str = "adapted",
        # The learned environment
        n_models: int = 5,
        dynamics_kwargs: Mapping[str, Any] | None = None,
        reward_fn: str | RewardFn = "auto",
        termination_fn: str | TerminationFn | None = "auto",
        # Imagined rollouts
        n_tasks: int = 20,
        n_imagined_rollouts: int = 40,
        horizon: int = 25,
        imagined_start: str = "buffer",
        recent_starts: float = 0.5,
        disagreement_penalty: float = 0.5,
        # Adaptation: the inner step
        n_inner_steps: int = 1,
        inner_lr: float = 3e-3,
        learn_inner_lr: bool = False,
        first_order: bool = False,
        unadapted_share: float = 0.25,
        # Meta-steps: the outer step
        n_meta_steps: int = 20,
        outer_optimizer: str = "trpo",
        target_kl: float = 0.02,
        momentum: float = 0.8,
        cg_max_steps: int = 10,
        cg_damping: float = 0.01,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 15,
        sub_sampling_factor: int = 10,
        outer_kwargs: Mapping[str, Any] | None = None,
        ent_coef: float = 0.0,
        stop_on_return_drop: bool = False,
        chunk_size: int = 4_096,
        # Advantages and their critic
        gamma: float = 0.99,
        gae_lambda: float = 0.6,
        normalize_advantage: bool = True,
        baseline: str = "critic",
        n_critic_updates: int = 40,
        batch_size: int = 512,
        # As in every algorithm of SB3
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_device(device)
        env = check_before_building(policy, env, verbose, self.policy_aliases)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            train_freq=1,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
        )
        self.n_steps = n_steps
        self.n_models, self.n_tasks = n_models, n_tasks
        self.n_imagined_rollouts, self.horizon = n_imagined_rollouts, horizon
        self.n_meta_steps, self.n_inner_steps = n_meta_steps, n_inner_steps
        self.inner_lr, self.learn_inner_lr, self.first_order = inner_lr, learn_inner_lr, first_order
        self.unadapted_share = unadapted_share
        self.outer_optimizer = outer_optimizer
        self.target_kl, self.momentum = target_kl, momentum
        self.cg_max_steps, self.cg_damping = cg_max_steps, cg_damping
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.sub_sampling_factor = sub_sampling_factor
        self.gae_lambda, self.normalize_advantage, self.ent_coef = gae_lambda, normalize_advantage, ent_coef
        self.baseline, self.n_critic_updates = baseline, n_critic_updates
        self.reward_fn, self.termination_fn = reward_fn, termination_fn
        self.imagined_start, self.recent_starts, self.exploration = imagined_start, recent_starts, exploration
        self.disagreement_penalty, self.stop_on_return_drop = disagreement_penalty, stop_on_return_drop
        self.dynamics_kwargs = {} if dynamics_kwargs is None else dynamics_kwargs
        self.outer_kwargs = {} if outer_kwargs is None else outer_kwargs
        self.chunk_size = chunk_size

        self._init_rollouts()
        self._learned_heads: tuple[bool, bool] | None = None  # of reward and termination
        self.learned_inner_lr: th.Tensor | None = None
        self._bias_draws: np.ndarray | None = None
        self._start_sample: np.ndarray | None = None
        self._typical_disagreement = self._reward_std = 0.0
        self._health = TrainingHealth()
        self._stopwatch = Stopwatch()
        self._progress: StageProgressBar | None = None
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        # Here, not in the constructor, because `load` may have changed some arguments
        arguments = inspect.signature(MBMPO.__init__).parameters.keys() & vars(self).keys()
        vars(self).update(plain({name: getattr(self, name) for name in (*arguments, "_stats_window_size")}))
        self._dynamics_options = DynamicsOptions.parse(self.dynamics_kwargs)
        check_arguments({**vars(self), "stats_window_size": self._stats_window_size})
        try:
            # The last digits of an orthogonal matrix depend on the number of PyTorch's threads
            with single_threaded_operations():
                super()._setup_model()
        except TypeError as error:
            raise ValueError(f"`policy_kwargs` {self.policy_kwargs!r} cannot build a policy: {error}.") from error
        self._functions = CheckedEnvFunctions(self.reward_fn, self.termination_fn, self.env)
        if self._learned_heads is None:
            self._learned_heads = (self._functions.reward.fn is None, self._functions.termination.fn is None)
        self.dynamics = DynamicsEnsemble(
            self.observation_space,
            self.action_space,
            self.n_models,
            learned_reward=self._learned_heads[0],
            learned_termination=self._learned_heads[1],
            learning_rate=self.lr_schedule(1),
            seed=self.seed,
            device=self.device,
            **self._dynamics_options.ensemble,
        )
        if self._bias_draws is None:  # else loaded from the file, so that a resumed run has the same biases
            self._bias_draws = np.random.default_rng(self.seed).standard_normal((self.n_models, self.dynamics.observation_dim))
        self._output_bias()  # raises an error now rather than after the first real steps
        theta = self.policy.actor_vector()
        if self.learn_inner_lr:
            self.learned_inner_lr = th.full_like(theta, float(self.inner_lr))
        if self.verbose >= 1:
            n_dynamics = sum(parameter.numel() for parameter in self.dynamics.parameters())
            reward, termination = self._functions.sources(*self._learned_heads)
            print(
                f"MBMPO: observations {self.observation_space}; actions {self.action_space}; "
                f"reward: {reward}; termination: {termination}; horizon: {self.horizon}; "
                f"parameters: {len(theta)} of the policy, {n_dynamics} of {self.n_models} models; device: {self.device}"
            )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See ``BaseAlgorithm``. Reward and termination functions are found again for the new environment."""
        super().set_env(env, force_reset)
        self._functions = CheckedEnvFunctions(self.reward_fn, self.termination_fn, self.env)

    def _excluded_save_params(self) -> list[str]:
        # A function that is a method of the environment would put the whole environment into the file
        return [*super()._excluded_save_params(), "_functions", "_dynamics_options", "_stopwatch", "_progress"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "dynamics", "dynamics.optimizer"], ["learned_inner_lr", "_adapted"]

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._progress = StageProgressBar() if progress_bar else None
        if self._progress is not None:
            callback = self._progress.after(callback)
        return super()._init_callback(callback)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._functions.require(self.dynamics.learned_reward, self.dynamics.learned_termination)
        action = self._codec.from_numpy(self._codec.to_numpy(th.zeros((1, *(self.action_space.shape or (1,))))), self.device)
        first_obs = th.as_tensor(as_floating(self._raw_last_obs()[:1]), device=self.device)
        self._functions.try_out(first_obs, self._codec.to_reward(action))
        return result

    # ---------------------------------------------------------------- real rollouts

    def learn(
        self: SelfMBMPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "MBMPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMBMPO:
        """See ``BaseAlgorithm``. Each iteration collects real steps, then calls ``train``."""
        check_number("total_timesteps", total_timesteps, 0)
        if log_interval is not None:
            check_integer("log_interval", log_interval, 1)
        world = World.current()
        self.dynamics.shares(world)  # raises an error now rather than after the first real steps
        with world.left_on_error():
            if world.rank > 0:
                self._follow(world)
            else:
                self._lead(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
                world.broadcast(None)
        return self

    def _lead(
        self,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> None:
        """Learn as the process that has the real environment; the arguments are those of ``learn``."""
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        n_steps = -(-(total_timesteps - self.num_timesteps) // self.n_envs) * self.n_envs
        self._health.learning_begins(n_steps, self._random_steps_left(), self.learning_starts)
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        assert self.replay_buffer is not None
        iteration = 0
        while self.num_timesteps < total_timesteps:
            self._stopwatch = Stopwatch()
            with self._stopwatch("real_rollout"):
                rollout = self.collect_rollouts(
                    self.env,
                    callback,
                    TrainFreq(self._steps_to_collect(total_timesteps), TrainFrequencyUnit.STEP),
                    self.replay_buffer,
                    learning_starts=self.learning_starts,
                )
            if not rollout.continue_training:
                break
            if self._random_steps_left() > 0:  # `learn` ends before there are enough random steps for the first fit
                continue
            self.train()
            iteration += 1
            if log_interval is not None and iteration % log_interval == 0:
                self.logger.record("time/iterations", iteration, exclude="tensorboard")
                dump_and_keep(self)
        callback.on_training_end()

    def _follow(self, world: World) -> None:
        """Do this process's share of every iteration until process 0 ends its ``learn``; it has all else."""
        self.policy.set_training_mode(False)
        self._progress, self._logger = None, Logger(None, [])
        while (state := world.broadcast()) is not None:
            self._improve(adopt_state(self, self.shared_arguments(), state), world)

    # ---------------------------------------------------------------- what an iteration learns

    def train(self, gradient_steps: int = 1, batch_size: int = 0) -> None:
        """
        Learn from the real steps so far: fit the models, adapt, and update the meta-policy.

        These are the lines of algorithm 1 in Clavera et al. 2018 that follow the real rollouts. The arguments belong to SB3's
        interface and have no effect; MB-MPO has ``n_meta_steps`` and ``dynamics_kwargs`` instead.
        """
        # Dropout and batch statistics would change the policy at every forward pass, but likelihood ratios need the same one
        self.policy.set_training_mode(False)
        self._judge_real_returns()
        data = self._transitions()
        self._judge_functions(data)
        world = World.current()
        if world.size > 1:
            world.broadcast(sent_state(self, self.shared_arguments(), data))
        fit, training = self._improve(data, world)
        with single_threaded_operations():
            self._record_fit(fit, data)
            self._record_meta_training(training)
        self._n_new_steps = 0
        # For a model that is loaded without its buffer
        self._start_sample = data.obs[:: 1 + len(data.obs) // START_SAMPLE_SIZE].cpu().numpy().copy()
        # The imagination runs inside the meta-update
        seconds = self._stopwatch.seconds
        seconds["meta_update"] -= seconds["imagination"]
        self._record({f"time/{stage}": seconds[stage] for stage in seconds})

    def _improve(self, data: Transitions, world: World) -> tuple[FitReport, MetaTraining]:
        """Learn from real steps, in all processes alike, each of which computes its share of the members and tasks."""
        n_threads = worker_threads(self.device)
        with single_threaded_operations():
            # Fit the ensemble to all real steps
            with self._stopwatch("dynamics_fit"):
                fit = self._fit_dynamics(data, n_threads, world)
                self._measure_typical(data)
            self.policy.set_observation_statistics(self._to_policy_units(data.obs))
            # Meta-train the policy in the models, and adapt it to each of them
            with self._stopwatch("meta_update"):
                training = self._meta_trainer(self._generators, n_threads, data=data, world=world).train(
                    self._meta_parameters(),
                    n_meta_steps=self.n_meta_steps,
                    stop_on_return_drop=self.stop_on_return_drop,
                    on_step=self._show_meta_step,
                )
                # The adapted policies collect the next real steps
                self._adapted = training.adapted
        return fit, training

    def shared_arguments(self) -> dict[str, Any]:
        """Return the arguments on which all processes must agree."""
        return shared_arguments(self, inspect.signature(MBMPO.__init__).parameters)

    # ---------------------------------------------------------------- metrics and parts of an iteration

    def _judge_functions(self, data: Transitions) -> None:
        """Compare the reward and termination functions with the real steps, and log the error."""
        self.logger.record("rollout/rew_mean_step", float(data.reward[-self._n_new_steps :].mean()))
        reward_error = self._functions.compare(
            obs=data.obs,
            action=self._codec.to_reward(data.action),
            next_obs=data.next_obs,
            reward=data.reward,
            terminated=data.terminated,
        )
        if reward_error is not None:
            self.logger.record("dynamics/reward_error", reward_error)

    def _fit_dynamics(self, data: Transitions, n_threads: int, world: World) -> FitReport:
        reinit_every = self._dynamics_options.reinit_every
        if reinit_every and self._n_fits > 0 and self._n_fits % reinit_every == 0:
            seed = th.randint(2**31, (), generator=self._generators["dynamics"], device=self.device)
            self.dynamics.reset_parameters(th.Generator().manual_seed(int(seed)))
        self._update_learning_rate([self.dynamics.optimizer, self.policy.optimizer])

        def on_pass(number: int, at_most: int, val_loss: float) -> None:
            if self._progress is not None:
                self._progress.show("dynamics fit, passes", number, at_most, {"val_loss": val_loss})

        report = self.dynamics.fit(
            data,
            generator=self._generators["dynamics"],
            n_new_rows=self._n_new_steps,
            on_pass=on_pass,
            n_threads=n_threads,
            world=world,
            **self._dynamics_options.fit,
        )
        self._n_fits += 1
        return report

    def _measure_typical(self, data: Transitions) -> None:
        """Measure, at some of the real steps, the units of the disagreement penalty."""
        some = slice(None, None, 1 + len(data.obs) // 1000)
        obs, action = data.obs[some].to(self.dynamics.observation_dtype), self._codec.to_dynamics(data.action[some])
        self._typical_disagreement = float(self.dynamics.disagreement_fn()(obs, action).median())
        self._reward_std = float(data.reward.double().std(correction=0))

    def _record(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.logger.record(key, value)

    def _record_fit(self, report: FitReport, data: Transitions) -> None:
        self._record(report.metrics())
        if self._functions.reward.fn is None:  # the error of a function has been logged
            self.logger.record("dynamics/reward_error", float(report.val_error.mean()))
        self._health.dynamics_fitted(float(report.val_loss.mean()), self.dynamics.probabilistic)
        some = slice(None, None, 1 + len(data.obs) // 1000)
        action = self._codec.to_numpy(data.action[some])
        disagreement = self.dynamics.disagreement(data.obs[some].cpu().numpy(), action)
        self.logger.record("dynamics/disagreement", float(disagreement.mean()))

    def _meta_trainer(
        self,
        generators: Mapping[str, th.Generator],
        n_threads: int,
        *,
        data: Transitions | None = None,
        world: World = ALONE,
    ) -> MetaTrainer:
        """
        Build the meta-training.

        :param generators: for imagined actions ("imagination"), first observations ("starts") and minibatches ("critic")
        :param n_threads: how many threads imagine and differentiate
        :param data: the real steps so far; None: those of the replay buffer
        :param world: the processes that share the tasks
        :return: meta-training in the current ensemble
        """
        self._functions.require(self.dynamics.learned_reward, self.dynamics.learned_termination)
        pool, penalty = self._start_pool(data), self._penalty()
        stacks = groups.stacks(self.dynamics.shares(world), self.n_tasks // self.n_models, self.dynamics.flops)
        # Observations since the previous fit come last
        n_recent = min(self._n_new_steps, len(pool)) if self.imagined_start == "buffer" else 0
        return MetaTrainer(
            model_envs=[self._model_env(members, with_errors=True, penalty=penalty) for members in stacks],
            to_policy_input=PolicyInput(self._policy_units(pool.dtype), self.policy.standardization()),
            actor=self.policy.actor,
            sample_starts=StartSampler(pool, n_recent, self.recent_starts, generators["starts"]),
            settings=self._meta_settings(),
            generator=generators["imagination"],
            stopwatch=self._stopwatch,
            adopt=self._adopt,
            critic=self._critic(generators["critic"]) if self.baseline == "critic" else None,
            n_threads=n_threads,
            world=world,
        )

    def _meta_settings(self) -> MetaSettings:
        settings = MetaSettings(**{name: getattr(self, name) for name in MetaSettings._fields})
        if self.outer_optimizer == "trpo":
            settings = settings._replace(outer_kwargs={name: getattr(self, name) for name in TRPO_OPTIONS})
        return settings

    def _model_env(
        self, members: Sequence[int] | None, with_errors: bool = False, penalty: DisagreementPenalty | None = None
    ) -> ModelEnv:
        """
        Build the learned environment of some of the current models, which predicts the means of probabilistic members unless
        it is given noise.

        :param members: numbers of the members; None: all
        :param with_errors: whether it has the deliberate errors of ``dynamics_kwargs``
        :param penalty: see ``ModelEnv``
        """
        options = self._dynamics_options
        return ModelEnv.of(
            self.dynamics,
            reward_fn=self._functions.reward.fn,
            termination_fn=self._functions.termination.fn,
            clip_margin=options.clip_margin,
            members=members,
            output_bias=self._output_bias() if with_errors else None,
            output_noise=options.output_noise if with_errors else 0.0,
            penalty=penalty,
        )

    def _penalty(self) -> DisagreementPenalty | None:
        """Return the penalty of the current models; None if there is nothing to subtract."""
        # Rewards of any size must not overflow single precision with it
        weight = min(self.disagreement_penalty * self._reward_std, th.finfo(th.float32).max / 100)
        if not (weight > 0 and self._typical_disagreement > 0):  # constant rewards, or members that are equal
            return None
        return DisagreementPenalty(self.dynamics.disagreement_fn(), self._typical_disagreement, weight)

    def _critic(self, generator: th.Generator) -> Critic:
        return Critic(self.policy, generator, n_updates=self.n_critic_updates, batch_size=self.batch_size)

    def _start_pool(self, data: Transitions | None = None) -> th.Tensor:
        """Return the raw observations at which imagined rollouts may start (B, O), in ``data`` or in the replay buffer."""
        if self.imagined_start == "buffer":
            if data is not None:
                return data.obs.to(self.dynamics.observation_dtype)
            assert self.replay_buffer is not None
            if self.replay_buffer.size() > 0:
                return self._transitions().obs.to(self.dynamics.observation_dtype)
            if self._start_sample is None:
                raise ValueError("The replay buffer, to imagine from, is empty: `load_replay_buffer`, or call `learn` first.")
            return th.as_tensor(self._start_sample, device=self.device, dtype=self.dynamics.observation_dtype)
        self._join_new_starts()
        if self._initial_obs is None:
            raise ValueError("There is no real first observation to imagine from yet: call `learn` first.")
        return th.as_tensor(self._initial_obs, device=self.device, dtype=self.dynamics.observation_dtype)

    def _show_meta_step(self, number: int, step: MetaStep) -> None:
        self._n_updates += 1
        if self._progress is not None:
            means = {"return": float(step.pre.returns().mean()), "adapted": float(step.post.returns().mean())}
            self._progress.show("meta-steps", number, self.n_meta_steps, means)

    def _record_meta_training(self, training: MetaTraining) -> None:
        self._health.adapted(int(training.failed.sum()), self.n_tasks)
        self._record(training.metrics())
        imagined: float | None = float(training.outcome.returns().mean())
        if self.baseline == "critic":
            self._join_new_starts()
            assert self._initial_obs is not None
            initial_value = float(self._values(self._initial_obs).mean())
            self.logger.record("imagined/initial_value", initial_value)
            imagined = initial_value if training.explained_variance() > TRUSTED_EXPLAINED_VARIANCE else None
        failed = sum(not np.isfinite(report.value_loss) for report in training.critic)
        self._health.critic_trained(failed, len(training.critic))
        self._health.meta_trained(imagined, [bool(report.accepted) for report in training.steps])
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", float(self.policy.log_std.detach().exp().mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _meta_parameters(self) -> MetaParameters:
        """Return the policy's parameters and the inner step size(s)."""
        return MetaParameters(
            theta=self.policy.actor_vector(),
            inner_lr=float(self.inner_lr) if self.learned_inner_lr is None else self.learned_inner_lr,
        )

    def _adopt(self, meta: MetaParameters) -> MetaParameters:
        """
        Set the policy's meta-parameters.

        :param meta: the new meta-parameters
        :return: the meta-parameters as the policy stores them: standard deviations have a lower bound
        """
        if self.learned_inner_lr is not None:
            assert isinstance(meta.inner_lr, th.Tensor)
            self.learned_inner_lr = meta.inner_lr.clone()
        self.policy.set_actor_vector(meta.theta)
        return self._meta_parameters()

    def _output_bias(self) -> np.ndarray:
        """Return the deliberate error of each member, in standard deviations of the observed changes (M, O)."""
        assert self._bias_draws is not None
        return output_bias_array(self._dynamics_options.output_bias, self._bias_draws)

    # ---------------------------------------------------------------- use

    def adapt(
        self,
        env: GymEnv | None = None,
        n_episodes: int = 10,
        model_index: int | None = None,
        inner_lr: float | None = None,
        n_inner_steps: int | None = None,
        baseline: str | None = None,
    ) -> MetaPolicy:
        """
        Adapt the meta-policy by few-shot learning from real episodes, or to one of the models.

        :param env: real environment in which the meta-policy collects episodes; by default the training one. It is reset
        :param n_episodes: number of real episodes, divided among the inner steps
        :param model_index: adapt to this member of the ensemble in imagination instead, without real steps
        :param inner_lr: step size; by default that of the training, learned or not. An environment that differs more than the
            models do needs larger steps
        :param n_inner_steps: number of policy-gradient steps; by default that of the training
        :param baseline: baseline of the advantages; by default that of the training. Here "fourier" is often better
        :return: an independent policy with ``predict`` and ``save``; the model is unchanged, including its random numbers
        :raises ValueError: if an argument is invalid, or the adapted policy is not finite
        """
        n_inner_steps = self.n_inner_steps if n_inner_steps is None else n_inner_steps
        check_integer("n_inner_steps", n_inner_steps, 1)
        meta = self._meta_parameters()
        if inner_lr is not None:
            check_number("inner_lr", inner_lr, 0)
            meta = meta._replace(inner_lr=float(inner_lr))
        baseline = self.baseline if baseline is None else baseline
        check_choice("baseline", baseline, BASELINES)
        settings = self._meta_settings()._replace(n_inner_steps=n_inner_steps, baseline=baseline)
        generators = {name: g.clone_state() for name, g in self._generators.items()}
        if model_index is not None:
            if env is not None:
                raise ValueError("Pass either `env` or `model_index`: adapt to real episodes or to a model, not to both.")
            check_integer("model_index", model_index, 0, self.n_models - 1)
            trainer = self._meta_trainer(generators, n_threads=1)
            adaptation = trainer._replace(settings=settings._replace(n_tasks=self.n_models)).adapt(meta)
            check_adaptation(not adaptation.failed[model_index])
            return self.policy.with_actor_vector(adaptation.parameters[model_index])

        check_integer("n_episodes", n_episodes, n_inner_steps)
        vec_env = check_env(
            self.env if env is None else self._wrap_env(env, self.verbose),
            observation_space=self.observation_space,
            action_space=self.action_space,
            is_normalized=self._vec_normalize_env is not None,
        )
        if vec_env is self.env:
            self._last_obs = None  # the training episode is interrupted: the next `learn` must not continue it

        adapted = adapt_to_episodes(
            vec_env,
            self.policy,
            meta=meta,
            settings=settings,
            critic=self._critic(generators["critic"]),
            n_episodes=n_episodes,
            generator=generators["exploration"],
        )
        return self.policy.with_actor_vector(adapted)

    def imagined_env(
        self,
        n_envs: int = 64,
        model_index: int | None = None,
        horizon: int | None = None,
        seed: int | None = None,
        resample_model: str = "episode",
    ) -> ModelVecEnv:
        """
        Return the learned models as an environment for any SB3 algorithm, with the same step function as the imagination.

        :param n_envs: number of parallel imagined environments
        :param model_index: a member of the ensemble; None: a random one each episode or step
        :param horizon: time limit of an episode; by default that of the imagined rollouts
        :param seed: seed of the choice of members and first observations, and of the noise
        :param resample_model: draw another random member every "episode" or every "step"
        :return: a VecEnv in raw units
        """
        self._functions.require(self.dynamics.learned_reward, self.dynamics.learned_termination)
        return ModelVecEnv(
            self.dynamics,
            start_obs=self._start_pool().cpu().numpy(),
            reward_fn=self._functions.reward.fn,
            termination_fn=self._functions.termination.fn,
            n_envs=n_envs,
            horizon=self.horizon if horizon is None else horizon,
            model_index=model_index,
            clip_margin=self._dynamics_options.clip_margin,
            seed=seed,
            resample_model=resample_model,
            output_bias=self._output_bias(),
            output_noise=self._dynamics_options.output_noise,
        )
