"""Spaces as JSON, so that a file can describe its spaces without pickled objects, which can run code."""

from typing import Any

import numpy as np
from gymnasium import spaces


def space_to_dict(space: spaces.Space[Any]) -> dict[str, Any]:
    """
    Describe a space by plain values.

    :param space: Box, Discrete, MultiDiscrete or MultiBinary
    :return: lists, numbers and strings, from which ``space_from_dict`` makes an equal space
    :raises ValueError: if the space is of another kind
    """
    if isinstance(space, spaces.Box):
        return {"type": "Box", "low": space.low.tolist(), "high": space.high.tolist(), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": [int(size) for size in space.shape]}
    raise ValueError(f"A file can hold a Box, Discrete, MultiDiscrete or MultiBinary space, not {space}.")


def space_from_dict(entry: dict[str, Any]) -> spaces.Space[Any]:
    """
    Make a space from its description.

    :param entry: what ``space_to_dict`` returned
    :return: the space
    :raises ValueError: if the kind of space is unknown
    """
    kind = entry["type"]
    dtype: Any
    if kind == "Box":
        dtype = np.dtype(entry["dtype"])
        low, high = (np.array(entry[name], dtype=dtype) for name in ("low", "high"))
        return spaces.Box(low, high, dtype=dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(entry["n"], start=entry["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(
            np.array(entry["nvec"]), dtype=np.dtype(entry["dtype"]).type, start=np.array(entry["start"])
        )
    if kind == "MultiBinary":
        return spaces.MultiBinary(entry["n"][0] if len(entry["n"]) == 1 else entry["n"])
    raise ValueError(f"There is no space of the kind {kind!r}.")
