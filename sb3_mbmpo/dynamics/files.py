"""Files of ensembles: SB3's zip archives, with arguments as JSON and weights as tensors, which cannot run code."""

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file

from sb3_mbmpo.common.save_util import (
    TAKE_A_COPY,
    Path,
    check_file,
    existing_file,
    file_name,
    file_stamp,
    output,
    plain,
    sealed,
)
from sb3_mbmpo.common.space_files import space_from_dict, space_to_dict

SPACES = ("observation_space", "action_space")


def save_ensemble(path: Path, arguments: Mapping[str, Any], parts: Mapping[str, th.nn.Module | th.optim.Optimizer]) -> None:
    """
    Save the arguments and the state of an ensemble.

    :param path: a file name (".zip" is appended if it has no suffix) or an open file
    :param arguments: arguments of its constructor, except the device
    :param parts: what has a state, by name
    :raises OSError: if the file cannot be written; an older file is left as it was
    """
    described = {name: space_to_dict(value) if name in SPACES else value for name, value in arguments.items()}
    params = plain({name: part.state_dict() for name, part in parts.items()})
    archive = io.BytesIO()
    save_to_zip_file(archive, {**file_stamp("ensemble"), "arguments": described}, params)
    with output(path, "zip") as file:
        file.write(sealed(archive.getvalue()))


@contextmanager
def opened_ensemble(path: Path, device: th.device | str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """
    Read the file of an ensemble, which the block builds; an error in the block is one of the file.

    :param path: a file name or an open file
    :param device: where to put the tensors
    :return: a context manager that gives the arguments and the states by name
    :raises ValueError: if the file is damaged, holds something else, or is of an unsupported version
    """
    data = check_file(path, "ensemble")
    try:
        arguments = data["arguments"]
        arguments.update({name: space_from_dict(arguments[name]) for name in SPACES})
        _, saved, _ = load_from_zip_file(existing_file(path, "zip"), load_data=False, device=device)
        params: dict[str, Any] = saved  # SB3 annotates them as single tensors
        yield arguments, params
    except Exception as error:
        # PyTorch's advice is to unpickle it all the same
        is_foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it has objects that are no tensors" if is_foreign else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file_name(path)} holds an ensemble that cannot be built ({reason}). {TAKE_A_COPY}") from error
