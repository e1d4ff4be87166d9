"""A hook that adds MBMPO to rl_zoo3 when it is imported, so that ``rl_zoo3 train --algo mbmpo`` works without further steps.

rl_zoo3 lists its algorithms before it imports any of our code, and has no entry points for others. Therefore
`sb3_mbmpo_zoo.pth` in site-packages imports this module whenever Python starts. It uses the standard library only, without
slow imports, and does nothing unless a program imports rl_zoo3.

In the wheel it is beside the package, as `_sb3_mbmpo_zoo_hook.py`: when it runs, `sys.path` is not complete yet, and importing
the package would hide a source tree that comes before the installed one.
"""

import sys

TYPE_CHECKING = False  # importing it from `typing` would slow every start of Python by milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# The package rl_zoo3 and its modules that list the algorithms, which a later version may no longer have
ZOO_MODULES = ("rl_zoo3", "rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


class ZooFinder:
    """A finder that lets the other finders find a module, and extends those of rl_zoo3 once they are loaded."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders find, and extend its loader if it is one of ``ZOO_MODULES``."""
        if name not in ZOO_MODULES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                extend_loader(spec)
                return spec
        return None


def extend_loader(spec: "ModuleSpec") -> None:
    """
    Make a loader extend its module after executing it.

    Only this method of the loader is replaced, so that tools can still ask it for the source.

    :param spec: spec of one of ``ZOO_MODULES``
    """
    loader = spec.loader
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def execute_and_extend(module: "ModuleType") -> None:
        execute(module)
        from sb3_mbmpo.zoo.extension import extend_or_warn

        extend_or_warn(module)

    loader.exec_module = execute_and_extend  # type: ignore[union-attr, method-assign]


def install() -> None:
    """Put the finder before the others, unless that has been done already."""
    if not any(isinstance(finder, ZooFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooFinder())


install()
