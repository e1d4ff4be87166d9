"""Checks of single values. The messages say which value is wrong, what it is and what it has to be."""

import difflib
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

# Training uses single precision, in which larger numbers are infinite
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# With larger integers, products overflow PyTorch's 64-bit integers
LARGEST_INTEGER = 2**53


def is_number(value: Any) -> bool:
    """Tell whether the value is a real number that is finite in single precision; True and False do not count."""
    # NumPy's number types are registered with Python's abstract ones
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        # False for NaN; the limit of integers keeps them within PyTorch's range
        return abs(float(value)) <= (LARGEST_INTEGER if isinstance(value, Integral) else LARGEST_NUMBER)
    except OverflowError:  # an integer too large for a float
        return False


def check_integer(name: str, value: Any, at_least: int, at_most: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer in [at_least, at_most]."""
    at_most = min(at_most, LARGEST_INTEGER)
    if isinstance(value, bool) or not isinstance(value, Integral) or not at_least <= int(value) <= at_most:
        interval = f"at least {at_least}" + ("" if at_most == LARGEST_INTEGER else f" and at most {at_most}")
        raise ValueError(f"`{name}` must be an integer of {interval}, not {value!r}.")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number in [low, high], or in (low, high]."""
    if not is_number(value) or not (low < value if open_low else low <= value) or value > high:
        interval = f"{'greater than' if open_low else 'at least'} {low}" + ("" if high == math.inf else f" and at most {high}")
        raise ValueError(f"`{name}` must be a finite number {interval}, not {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, not {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, not {value!r}.")


def check_mapping(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be a dictionary, not {value!r}.")


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """Return the known name that ``name`` may be a typing error of, or None."""
    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), None)


def check_keywords(function: str, kwargs: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ``TypeError``, as Python does, if ``kwargs`` has a name that is not ``known``; suggest the nearest known name."""
    for name in sorted(set(kwargs) - set(known)):
        nearest = nearest_name(name, known)
        raise TypeError(f"{function}() has no argument {name!r}" + (f": did you mean {nearest!r}?" if nearest else "."))


def check_known(name: str, kwargs: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ``ValueError`` if ``kwargs`` has a key that is not ``known``."""
    unknown = sorted(set(kwargs) - set(known), key=repr)
    if unknown:
        raise ValueError(f"`{name}` has unknown entries {unknown}; known are {sorted(known)}.")


def check_net_arch(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a list of layer widths."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"`{name}` must be a list of layer widths, not {value!r}.")
    for width in value:
        check_integer(name, width, 1)


def keyword_names(function: Any, skip: Collection[str]) -> set[str]:
    """Return the names of the function's parameters except those in ``skip``."""
    return set(inspect.signature(function).parameters) - set(skip)
