"""Warnings that are given once in the life of a model, even across its files."""

import warnings


class WarnsOnce:
    """A base class whose warnings are given once per subject. What has been warned of is saved with the object."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message)
