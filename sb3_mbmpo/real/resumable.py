"""An off-policy algorithm that resumes from its file as if it had never stopped.

SB3 pickles attributes, but a random generator or a tensor on another device cannot be unpickled everywhere. So generators are
saved as their states, and tensors as SB3's "pytorch variables".
"""

import inspect
import io
import warnings
import zlib
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import data_to_json
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbmpo.common.checks import check_keywords
from sb3_mbmpo.common.env_reading import ask, env_spec_json
from sb3_mbmpo.common.save_util import Path, check_file, existing_file, file_name, file_stamp, output, plain, sealed
from sb3_mbmpo.real.replay_files import load_buffer, save_buffer
from sb3_mbmpo.rewards.resolve import PathInFile

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")

# One generator per purpose, so that a change of one stage does not shift the random numbers of the others
RANDOM_PURPOSES = ("exploration", "imagination", "starts", "dynamics", "critic")


class ResumableAlgorithm(OffPolicyAlgorithm):
    """
    An off-policy algorithm that resumes from its file with bit-identical results.
    """

    # Argument -> name of the tensor in the file that does not exist while the argument is turned off
    _optional_tensors: ClassVar[dict[str, str]] = {"learn_inner_lr": "learned_inner_lr"}
    # States from the loaded file; None: the generators are seeded
    _random_states: dict[str, Any] | None = None

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.env is not None:
            self._read_env(self.env)
        # SB3 seeds everything again at every load
        if self._random_states is not None:
            self.action_space.np_random.bit_generator.state = self._random_states["action_space"]
            self._restore_generators()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See ``BaseAlgorithm``."""
        super().set_env(env, force_reset)
        assert self.env is not None
        self._read_env(self.env)

    def _read_env(self, env: VecEnv) -> None:
        """Store what files record about the environment, which may be closed when the model is saved."""
        self.env_spec = ask(env, env_spec_json)

    def set_random_seed(self, seed: int | None = None) -> None:
        """See ``BaseAlgorithm``. Training draws from its own generators, not from the global ones."""
        super().set_random_seed(seed)
        if seed is not None or not hasattr(self, "_generators"):
            seeds = np.random.SeedSequence(seed).generate_state(len(RANDOM_PURPOSES))
            self._generators = {
                purpose: th.Generator(self.device).manual_seed(int(number))
                for purpose, number in zip(RANDOM_PURPOSES, seeds, strict=True)
            }

    def _restore_generators(self) -> None:
        """Continue the saved random streams, or start new ones if the states are of another kind of device."""
        assert self._random_states is not None
        for purpose, generator in self._generators.items():
            state: th.Tensor = self._random_states[purpose]
            if state.shape == generator.get_state().shape:
                generator.set_state(state)
            else:
                generator.manual_seed(zlib.crc32(state.numpy().tobytes()))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_generators"]

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """See ``BaseAlgorithm``. NumPy's numbers, as in an optimiser's options, become Python's, which PyTorch can load."""
        parameters: dict[str, dict[str, Any]] = plain(super().get_parameters())
        return parameters

    def save(self, path: Path, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        See ``BaseAlgorithm``. The file also records the version of this package and the environment. It replaces an older file
        only when it is complete. A warning names the attributes that cannot be pickled, which it then lacks.

        :raises OSError: if the file cannot be written; an older file is left as it was
        """
        vars(self).update(file_stamp("algorithm"))
        self._random_states = {purpose: generator.get_state() for purpose, generator in self._generators.items()}
        self._random_states["action_space"] = self.action_space.np_random.bit_generator.state
        archive = io.BytesIO()
        try:
            super().save(archive, exclude, include)
        except Exception as error:
            left_out = self._unpicklable()
            if not left_out:
                raise
            warnings.warn(
                f"{file_name(path)} lacks {left_out}, which cannot be pickled ({type(error).__name__}: {error}): pass the "
                "arguments among them to `load` again. Functions of a module can always be saved, as can paths of them."
            )
            archive = io.BytesIO()
            included = [name for name in include or () if name not in left_out]
            super().save(archive, [*(exclude or ()), *left_out], included)
        with output(path, "zip") as file:
            file.write(sealed(archive.getvalue()))

    def _unpicklable(self) -> list[str]:
        """Return names of attributes that a file cannot hold, such as functions that refer to a lock or a window."""

        def fails(value: Any) -> bool:
            try:
                data_to_json({"": value})
            except Exception:  # noqa: BLE001 - foreign code may raise anything
                return True
            return False

        state_dicts, tensors = self._get_torch_save_params()
        not_pickled = {*self._excluded_save_params(), *(name.split(".")[0] for name in [*state_dicts, *tensors])}
        return sorted(name for name, value in vars(self).items() if name not in not_pickled and fails(value))

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
        See ``BaseAlgorithm``. Random numbers continue where the file left off, or start again from a given ``seed``.

        The functions that the file's ``reward_fn`` and ``termination_fn`` name are imported only if ``env``, or the argument
        itself, is given. But SB3 unpickles the file, which can run code, too.

        :raises ValueError: if the file is damaged, of another class or of an unsupported version, or does not fit the
            arguments
        :raises TypeError: if ``kwargs`` has a name that is neither an argument of the constructor nor in the file
        """
        data = check_file(path, "algorithm")
        # Given as custom objects, these mean the same as given as arguments
        custom_objects = dict(custom_objects or {})
        for name in custom_objects.keys() & {"seed", *cls._optional_tensors}:
            kwargs.setdefault(name, custom_objects.pop(name))
        check_keywords("load", kwargs, {*inspect.signature(cls.__init__).parameters, *data, "replay_buffer"})
        if kwargs.get("seed") is not None:
            kwargs["_random_states"] = None
        if env is None:
            for name in {"reward_fn", "termination_fn"} - {*kwargs, *custom_objects}:
                if isinstance(data.get(name), str):
                    kwargs[name] = PathInFile(data[name])
        turned_off = [name for name in cls._optional_tensors if not kwargs.get(name, True)]
        for name in turned_off:
            del kwargs[name]
        try:
            model = super().load(
                existing_file(path, "zip"), env, device, custom_objects, print_system_info, force_reset, **kwargs
            )
        except RuntimeError as error:  # raised by PyTorch for parameters of other shapes
            given = {name: value for name, value in kwargs.items() if not name.startswith("_")}
            raise ValueError(f"{file_name(path)} does not fit the arguments {given}: {error}") from error
        for name in turned_off:
            setattr(model, name, False)
            setattr(model, cls._optional_tensors[name], None)
        return model

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        """
        See ``BaseAlgorithm``.

        :raises ValueError: if the parameters do not match, or the file is damaged or of another class
        """
        if not isinstance(load_path_or_dict, dict):
            check_file(load_path_or_dict, "algorithm")
            try:
                super().set_parameters(existing_file(load_path_or_dict, "zip"), exact_match, device)  # type: ignore[arg-type]
            except RuntimeError as error:  # raised by PyTorch for parameters of other shapes
                raise ValueError(f"{file_name(load_path_or_dict)} does not fit this model: {error}") from error
            return
        super().set_parameters(load_path_or_dict, exact_match, device)

    def save_replay_buffer(self, path: Path) -> None:
        """
        See ``OffPolicyAlgorithm``. The file holds actions scaled to [-1, 1], as SB3's algorithms do, which can load it.

        :raises OSError: if the file cannot be written; an older file is left as it was
        """
        assert self.replay_buffer is not None
        save_buffer(path, self.replay_buffer)

    def load_replay_buffer(self, path: Path, truncate_last_traj: bool = True) -> None:
        """
        See ``OffPolicyAlgorithm``. Files of SB3's algorithms can be loaded, too. A buffer with another number of environments
        or of another size is rearranged rather than rejected, because real steps are expensive.

        :raises ValueError: if the file is damaged, or its steps do not fit this model
        """
        empty = ReplayBuffer(self.buffer_size, self.observation_space, self.action_space, self.device, self.n_envs)
        self.replay_buffer = load_buffer(path, empty)
