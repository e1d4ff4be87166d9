"""Checkpoints of a run, saved atomically: model, replay buffer and normalisation statistics."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_mbmpo.common.atomic import write_whole

MODEL, BUFFER, STATISTICS, STATE = "model.zip", "replay_buffer.pkl", "vec_normalize.pkl", "state.json"


def save_checkpoint(folder: Path, model: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """
    Replace the run's checkpoint by a new one.

    If the process is killed at any moment, either the old or the new checkpoint is complete.

    :param folder: folder of the run's checkpoints
    :param model: model with its environment
    :param state: other data to save, serialisable as JSON
    """
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save(unfinished / MODEL)
    if isinstance(model, OffPolicyAlgorithm):
        model.save_replay_buffer(unfinished / BUFFER)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        normalizer.save(str(unfinished / STATISTICS))
    write_whole(unfinished / STATE, json.dumps(dict(state)))
    older = list(folder.glob("steps-*"))
    target = folder / f"steps-{model.num_timesteps:09}"
    if target in older:
        return  # no step since the last checkpoint; the next call removes `unfinished`
    os.replace(unfinished, target)
    for path in older:
        shutil.rmtree(path)


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """
    Find the newest checkpoint of a run.

    :param folder: folder of the run's checkpoints
    :return: the newest checkpoint and the state it was saved with, or None if there is none
    """
    found = sorted(folder.glob("steps-*"))
    return (found[-1], json.loads((found[-1] / STATE).read_text())) if found else None


def load_statistics(checkpoint: Path, env: VecEnv) -> VecNormalize:
    """Return the environment, normalised with the statistics of the checkpoint."""
    return VecNormalize.load(str(checkpoint / STATISTICS), env)


def load_model(checkpoint: Path, algorithm: type[BaseAlgorithm], env: VecEnv) -> BaseAlgorithm:
    """Return the model of the checkpoint, in an environment that starts with a reset."""
    model = algorithm.load(checkpoint / MODEL, env=env, device="cpu")
    if isinstance(model, OffPolicyAlgorithm):
        model.load_replay_buffer(checkpoint / BUFFER)
    return model
