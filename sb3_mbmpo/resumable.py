"""An off-policy algorithm that goes on, from its file, as if it had never stopped.

SB3 pickles attributes; a random generator of another device, or a tensor on it, would not unpickle everywhere. So generators
travel as their states and tensors as SB3's "pytorch variables".
"""

import zlib
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbmpo.env_reading import ask, env_spec_json
from sb3_mbmpo.files import Path, check_file, file_stamp

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")

# One generator a purpose: a change of one stage does not shift the random numbers of the others
RANDOM_PURPOSES = ("exploration", "imagination", "starts", "dynamics")
BUFFER_ARRAYS = ("observations", "actions", "next_observations", "rewards", "dones", "timeouts")


class ResumableAlgorithm(OffPolicyAlgorithm):
    """
    An off-policy algorithm whose files resume to the last bit.
    """

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.env is not None:
            self._read_env(self.env)
        # SB3 seeds everything anew at every load
        if hasattr(self, "_random_states"):
            self.action_space.np_random.bit_generator.state = self._random_states["action_space"]
            self._restore_generators()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See ``BaseAlgorithm``."""
        super().set_env(env, force_reset)
        assert self.env is not None
        self._read_env(self.env)

    def _read_env(self, env: VecEnv) -> None:
        """Keep what files say of the environment: it may be closed when the model is saved."""
        self.env_spec = ask(env, env_spec_json)

    def set_random_seed(self, seed: int | None = None) -> None:
        """See ``BaseAlgorithm``. Training draws from generators of its own, not from the global ones."""
        super().set_random_seed(seed)
        if seed is not None or not hasattr(self, "_generators"):
            seeds = np.random.SeedSequence(seed).generate_state(len(RANDOM_PURPOSES))
            self._generators = {
                purpose: th.Generator(self.device).manual_seed(int(number))
                for purpose, number in zip(RANDOM_PURPOSES, seeds, strict=True)
            }

    def _restore_generators(self) -> None:
        """Continue the saved streams. Those of another device's kind have no meaning here: begin new ones then."""
        for purpose, generator in self._generators.items():
            state: th.Tensor = self._random_states[purpose]
            if state.shape == generator.get_state().shape:
                generator.set_state(state)
            else:
                generator.manual_seed(zlib.crc32(state.numpy().tobytes()))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_generators"]

    def save(self, path: Path, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """See ``BaseAlgorithm``. The file also says which version of this package and which environment it is from."""
        vars(self).update(file_stamp("algorithm"))
        self._random_states: dict[str, Any] = {purpose: g.get_state() for purpose, g in self._generators.items()}
        self._random_states["action_space"] = self.action_space.np_random.bit_generator.state
        super().save(path, exclude, include)

    @classmethod
    def load(
        cls: type[SelfResumable],
        path: Path,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfResumable:
        """
        See ``BaseAlgorithm``.

        :raises ValueError: if the file is of another class, or of a version whose files this one cannot read
        """
        check_file(path, "algorithm")
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def load_replay_buffer(self, path: Path, truncate_last_traj: bool = True) -> None:
        """
        See ``OffPolicyAlgorithm``. A buffer of another number of environments is rearranged: real steps are dear.

        :raises ValueError: if the buffer is of other spaces
        """
        super().load_replay_buffer(path, truncate_last_traj)
        buffer = self.replay_buffer
        assert buffer is not None
        for name in ("observation_space", "action_space"):
            theirs, ours = getattr(buffer, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(f"The replay buffer is of another task: its {name} is {theirs}, the model's is {ours}.")
        if buffer.n_envs != self.n_envs:
            self.replay_buffer = self._rearranged(buffer)

    def _rearranged(self, buffer: ReplayBuffer) -> ReplayBuffer:
        """:return: the newest transitions of ``buffer``, for as many environments as there are now"""
        result = ReplayBuffer(self.buffer_size, self.observation_space, self.action_space, self.device, self.n_envs)
        oldest = buffer.pos if buffer.full else 0
        order = (oldest + np.arange(buffer.size())) % buffer.buffer_size
        rows = min(buffer.size() * buffer.n_envs // self.n_envs, result.buffer_size)
        for name in BUFFER_ARRAYS:
            values, target = getattr(buffer, name)[order], getattr(result, name)
            values = values.reshape(-1, *values.shape[2:])
            target[:rows] = values[len(values) - rows * self.n_envs :].reshape(rows, *target.shape[1:])
        result.pos, result.full = rows % result.buffer_size, rows == result.buffer_size
        return result
