"""MBMPO, the SB3 algorithm: holds the state and the order of the stages; the maths lives in the modules it wires."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_mbmpo.advantages import BASELINES, estimate_advantages
from sb3_mbmpo.arguments import (
    ENSEMBLE_OPTIONS,
    check_arguments,
    check_before_building,
    check_choice,
    check_device,
    check_integer,
    check_number,
)
from sb3_mbmpo.dynamics import DynamicsEnsemble
from sb3_mbmpo.few_shot import adapt_to_episodes, check_adaptation
from sb3_mbmpo.files import plain
from sb3_mbmpo.finite import as_floating
from sb3_mbmpo.health import TrainingHealth
from sb3_mbmpo.imagination import ImaginedRollouts
from sb3_mbmpo.imagined_training import ImaginedTrainingAlgorithm
from sb3_mbmpo.meta import TaskBatch, split_outer
from sb3_mbmpo.policies import MetaPolicy, MlpPolicy
from sb3_mbmpo.progress import StageProgressBar, Stopwatch, dump_and_keep
from sb3_mbmpo.tasks import RewardFn, TaskFunctions, TerminationFn
from sb3_mbmpo.vec_env import ModelVecEnv

SelfMBMPO = TypeVar("SelfMBMPO", bound="MBMPO")


class MBMPO(ImaginedTrainingAlgorithm):
    """
    Model-Based Meta-Policy Optimization (MB-MPO).

    Learns an ensemble of dynamics models from few real steps, imagines rollouts in them and meta-learns a policy that one
    policy-gradient step adapts to any of the models, so that errors of the models hurt less.

    Paper: https://arxiv.org/abs/1809.05214
    Code: the authors' at https://github.com/jonasrothfuss/model_ensemble_meta_learning; the README lists the differences.

    :param policy: the policy, "MlpPolicy" or a subclass of it
    :param env: the environment to learn from (if registered in Gymnasium, can be str)
    :param learning_rate: Adam step size of the dynamics ensemble, a number or a schedule of the remaining progress (1 to 0)
    :param n_steps: real steps an iteration, over all environments together (rounded up to whole steps of all)
    :param learning_starts: uniformly random real steps before the first fit
    :param buffer_size: real transitions that are kept, first in first out
    :param n_models: members of the ensemble
    :param n_tasks: tasks of a meta-step, a multiple of ``n_models``: task ``i`` lives in model ``i // (n_tasks / n_models)``
    :param n_imagined_rollouts: imagined rollouts a task
    :param horizon: steps of an imagined rollout
    :param n_meta_steps: outer steps an iteration
    :param n_inner_steps: policy-gradient steps of an adaptation
    :param inner_lr: step size of the adaptation
    :param learn_inner_lr: learn one inner step size a parameter, starting from ``inner_lr``
    :param first_order: ignore that the inner gradient depends on the meta-parameters
    :param outer_optimizer: "trpo" or "ppo"
    :param target_kl: bound of the mean KL of the adapted policies in a TRPO step
    :param cg_max_steps: conjugate gradient iterations
    :param cg_damping: added to the diagonal of the Fisher matrix
    :param line_search_shrinking_factor: each candidate of the line search is this much shorter than the one before
    :param line_search_max_iter: candidates of the line search
    :param sub_sampling_factor: the Fisher-vector products use every k-th imagined step
    :param gamma: discount factor
    :param gae_lambda: trade-off of bias (0) and variance (1) of the advantages
    :param normalize_advantage: standardise the advantages of each task
    :param ent_coef: weight of the policy's entropy in the outer objective
    :param baseline: "critic" (the policy's value network, which also bootstraps at the end of imagined rollouts), "linear",
        "fourier" (linear and 100 random Fourier features), "time" or "zero"
    :param n_critic_updates: minibatch steps of the critic after each batch imagined under the meta-policy
    :param batch_size: rows of a critic's minibatch
    :param reward_fn: "auto" (the environment's own ``reward(obs, action, next_obs)``, else the known one of its id, else
        learned), "learned", a function of torch tensors, or its path "pkg.module:function"
    :param termination_fn: "auto", "learned", None (nothing ends), a function of ``next_obs``, or its path
    :param imagined_start: where imagined rollouts start: "initial" (real first observations) or "buffer" (any real one)
    :param recent_starts: share of the imagined rollouts that start at a step since the fit before ("buffer" only)
    :param exploration: who acts in the real environment: the "adapted" policies, one an episode, or the "meta" policy
    :param dynamics_kwargs: arguments of ``DynamicsEnsemble`` (net_arch, activation_fn, weight_norm, probabilistic,
        weight_decay, precision) and of its ``fit`` (max_epochs, max_gradient_steps, batch_size, validation_fraction,
        rolling_average_persistency), and ``reinit_every`` (draw new weights at every k-th fit; 0: never), ``clip_margin``
        (imagined observations stay within the range of the data plus this many standard deviations; None: no clipping),
        and, to study bad models, ``output_bias`` and ``output_noise`` as in ``ModelVecEnv``
    :param stats_window_size: episodes that the logged means of real episodes cover
    :param tensorboard_log: log location for TensorBoard (if None, no logging)
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of everything random
    :param device: where all networks and the imagination live; "auto" is a GPU if there is one
    :param stop_on_return_drop: end an iteration's meta-steps when the imagined return falls below its rolling average, and go
        back to the best: for tasks that are solved for good, such as balancing
    :param outer_kwargs: arguments of the PPO outer step: learning_rate, n_epochs, clip_range
    :param chunk_size: imagined steps that a thread differentiates at a time (at least a whole task): fewer need less memory,
        more suit a GPU; the result is the same but for rounding
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
        n_steps: int = 500,
        learning_starts: int = 1000,
        buffer_size: int = 100_000,
        n_models: int = 5,
        n_tasks: int = 20,
        n_imagined_rollouts: int = 40,
        horizon: int = 25,
        n_meta_steps: int = 20,
        n_inner_steps: int = 1,
        inner_lr: float = 3e-3,
        learn_inner_lr: bool = False,
        first_order: bool = False,
        outer_optimizer: str = "trpo",
        target_kl: float = 0.03,
        cg_max_steps: int = 10,
        cg_damping: float = 1e-5,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 15,
        sub_sampling_factor: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        baseline: str = "critic",
        n_critic_updates: int = 40,
        batch_size: int = 1024,
        reward_fn: str | RewardFn = "auto",
        termination_fn: str | TerminationFn | None = "auto",
        imagined_start: str = "buffer",
        recent_starts: float = 0.5,
        exploration: str = "adapted",
        dynamics_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        stop_on_return_drop: bool = False,
        outer_kwargs: Mapping[str, Any] | None = None,
        chunk_size: int = 16_384,
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
        self.outer_optimizer = outer_optimizer
        self.target_kl, self.cg_max_steps, self.cg_damping = target_kl, cg_max_steps, cg_damping
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.sub_sampling_factor = sub_sampling_factor
        self.gae_lambda, self.normalize_advantage, self.ent_coef = gae_lambda, normalize_advantage, ent_coef
        self.baseline, self.n_critic_updates = baseline, n_critic_updates
        self.reward_fn, self.termination_fn = reward_fn, termination_fn
        self.imagined_start, self.recent_starts, self.exploration = imagined_start, recent_starts, exploration
        self.stop_on_return_drop = stop_on_return_drop
        self.dynamics_kwargs = {} if dynamics_kwargs is None else dynamics_kwargs
        self.outer_kwargs = {} if outer_kwargs is None else outer_kwargs
        self.chunk_size = chunk_size

        self._init_rollouts()
        self._learned_heads: tuple[bool, bool] | None = None  # of reward and termination
        self.learned_inner_lr: th.Tensor | None = None
        self._bias_draws: np.ndarray | None = None
        self._start_sample: np.ndarray | None = None
        self._health = TrainingHealth()
        self._stopwatch = Stopwatch()
        self._progress: StageProgressBar | None = None
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        # Here, not in the constructor: `load` may have changed some
        arguments = inspect.signature(MBMPO.__init__).parameters.keys() & vars(self).keys()
        vars(self).update(plain({name: getattr(self, name) for name in arguments}))
        check_arguments({**vars(self), "stats_window_size": self._stats_window_size})
        try:
            super()._setup_model()
        except TypeError as error:
            raise ValueError(f"`policy_kwargs` {self.policy_kwargs!r} build no policy: {error}.") from error
        self._task = TaskFunctions(self.reward_fn, self.termination_fn, self.env)
        if self._learned_heads is None:
            self._learned_heads = (self._task.reward.fn is None, self._task.termination.fn is None)
        self.dynamics = DynamicsEnsemble(
            self.observation_space,
            self.action_space,
            self.n_models,
            learned_reward=self._learned_heads[0],
            learned_termination=self._learned_heads[1],
            learning_rate=self.lr_schedule(1),
            seed=self.seed,
            device=self.device,
            **{key: value for key, value in self.dynamics_kwargs.items() if key in ENSEMBLE_OPTIONS},
        )
        if self._bias_draws is None:  # else the file's: a resumed run has the models it had
            self._bias_draws = np.random.default_rng(self.seed).standard_normal((self.n_models, self.dynamics.observation_dim))
        self._output_bias()  # raises now rather than after the first real steps
        theta = self.policy.actor_vector()
        if self.learn_inner_lr:
            self.learned_inner_lr = th.full_like(theta, float(self.inner_lr))
        if self.verbose >= 1:
            n_dynamics = sum(parameter.numel() for parameter in self.dynamics.parameters())
            reward, termination = self._task.sources(*self._learned_heads)
            print(
                f"MBMPO: observations {self.observation_space}; actions {self.action_space}; "
                f"reward: {reward}; termination: {termination}; horizon: {self.horizon}; "
                f"parameters: {len(theta)} of the policy, {n_dynamics} of {self.n_models} models; device: {self.device}"
            )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See ``BaseAlgorithm``. Reward and termination functions are those of the new environment."""
        super().set_env(env, force_reset)
        self._task = TaskFunctions(self.reward_fn, self.termination_fn, self.env)

    def _excluded_save_params(self) -> list[str]:
        # A function that is a method of the environment would bring the whole environment into the file
        return [*super()._excluded_save_params(), "_task", "_stopwatch", "_progress"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "dynamics", "dynamics.optimizer"], ["learned_inner_lr", "_adapted"]

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._progress = StageProgressBar() if progress_bar else None
        if self._progress is not None:
            if isinstance(callback, list):
                callback = CallbackList(callback)
            elif not isinstance(callback, BaseCallback):
                callback = ConvertCallback(callback)
            callback = CallbackList([callback, self._progress])
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
        self._task.require(self.dynamics.learned_reward, self.dynamics.learned_termination)
        # Another number of rows than any size of the task: a function that mixes up its axes shows
        rows = 1 + self.dynamics.observation_dim + self.dynamics.action_dim
        obs = th.as_tensor(as_floating(self._raw_last_obs()[:1]), device=self.device).expand(rows, -1)
        columns = th.zeros((rows, *(self.action_space.shape or (1,))))
        action = self._codec.from_numpy(self._codec.to_numpy(columns), self.device)
        self._task.try_out(obs, self._codec.to_reward(action))
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
        check_number("total_timesteps", total_timesteps, 0)
        if log_interval is not None:
            check_integer("log_interval", log_interval, 1)
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
            if self._random_steps_left() > 0:  # fewer steps were asked for than the first fit waits for
                continue
            self.train()
            iteration += 1
            if log_interval is not None and iteration % log_interval == 0:
                self.logger.record("time/iterations", iteration, exclude="tensorboard")
                dump_and_keep(self)
        callback.on_training_end()
        return self

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
        Few-shot adaptation: the meta-policy after its policy-gradient step(s) on real episodes, or on one of the models.

        :param env: real environment to collect episodes in with the meta-policy; by default the training one. It is reset.
        :param n_episodes: real episodes, shared out among the inner steps
        :param model_index: adapt to this member of the ensemble in imagination instead; no real step is made
        :param inner_lr: step size; by default that of the training, learned or not. An environment that differs more than the
            models do wants larger steps than they do
        :param n_inner_steps: number of policy-gradient steps; by default that of the training
        :param baseline: of the advantages; by default that of the training. "fourier" is often the better one here
        :return: an independent policy with ``predict`` and ``save``; the model is unchanged, down to its random numbers
        """
        n_inner_steps = self.n_inner_steps if n_inner_steps is None else n_inner_steps
        check_integer("n_inner_steps", n_inner_steps, 1)
        phi, fixed_inner_lr = self._outer_variable(), self._fixed_inner_lr
        if inner_lr is not None:
            check_number("inner_lr", inner_lr, 0)
            phi, fixed_inner_lr = self.policy.actor_vector(), float(inner_lr)
        baseline = self.baseline if baseline is None else baseline
        check_choice("baseline", baseline, BASELINES)
        generators = {name: g.clone_state() for name, g in self._generators.items()}
        if model_index is not None:
            if env is not None:
                raise ValueError("Pass either `env` or `model_index`: adapt to real episodes or to a model, not to both.")
            check_integer("model_index", model_index, 0, self.n_models - 1)
            trainer = self._meta_trainer(generators, n_threads=1)
            settings = trainer.settings._replace(inner_lr=fixed_inner_lr, n_inner_steps=n_inner_steps, baseline=baseline)
            adaptation = trainer._replace(settings=settings).adapt(phi, n_tasks=self.n_models)
            check_adaptation(not adaptation.failed[model_index])
            return self.policy.with_actor_vector(adaptation.parameters[model_index])

        check_integer("n_episodes", n_episodes, n_inner_steps)
        vec_env = self.env if env is None else self._wrap_env(env, self.verbose)
        if vec_env is None:
            raise ValueError("There is no environment to adapt to: pass `env`, or `model_index` to adapt to a learned model.")
        check_for_correct_spaces(vec_env, self.observation_space, self.action_space)
        if self._vec_normalize_env is not None and unwrap_vec_normalize(vec_env) is None:
            raise ValueError(
                "The model was trained on what VecNormalize shows it: wrap `env` in VecNormalize too, with the statistics of "
                "the training environment (`stable_baselines3.common.vec_env.sync_envs_normalization`)."
            )
        if vec_env is self.env:
            self._last_obs = None  # the training episode is cut: the next `learn` must not go on with it

        def to_batch(episodes: ImaginedRollouts) -> TaskBatch:
            critic = self._critic(generators["critic"])
            estimate = estimate_advantages(episodes, self.gamma, self.gae_lambda, baseline, self.normalize_advantage, critic)
            return TaskBatch.from_rollouts(episodes, estimate.advantages)

        theta, step_size = split_outer(phi, fixed_inner_lr)
        shares = [(n_episodes + step) // n_inner_steps for step in range(n_inner_steps)]
        adapted = adapt_to_episodes(vec_env, self.policy, theta, step_size, shares, to_batch, generators["exploration"])
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
        The learned model as an environment for any SB3 algorithm, with the same step function as the imagination.

        :param n_envs: number of parallel imagined environments
        :param model_index: a member of the ensemble; None: a random one each episode or step
        :param horizon: time limit of an episode; by default that of the imagined rollouts
        :param seed: of members, first observations and noise
        :param resample_model: draw another random member every "episode" or every "step"
        :return: a VecEnv in raw units
        """
        self._task.require(self.dynamics.learned_reward, self.dynamics.learned_termination)
        return ModelVecEnv(
            self.dynamics,
            self._start_pool().cpu().numpy(),
            self._task.reward.fn,
            self._task.termination.fn,
            n_envs,
            self.horizon if horizon is None else horizon,
            model_index,
            self._clip_margin,
            seed,
            resample_model,
            self._output_bias(),
            self._output_noise,
        )
