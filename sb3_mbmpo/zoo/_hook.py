"""Tells rl_zoo3 about MBMPO when it is imported, so that ``rl_zoo3 train --algo mbmpo`` works as it stands.

rl_zoo3 lists its algorithms before it imports anything of ours and has no entry points for others. `sb3_mbmpo_zoo.pth` in
site-packages therefore imports this module whenever Python starts: standard library only, no imports that cost time, and
nothing happens unless a program imports rl_zoo3.

The wheel has it beside the package, as `_sb3_mbmpo_zoo_hook.py`: at that time `sys.path` is not complete, and an import of the
package would hide a source tree that comes before the installed one.
"""

import sys

TYPE_CHECKING = False  # importing it from `typing` would cost every start of Python milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# The modules of rl_zoo3 that know which algorithms there are, and their package, which may have lost them in a later version
ZOO_MODULES = ("rl_zoo3", "rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


class ZooFinder:
    """Lets the other finders find a module, and extends those of rl_zoo3 once they are loaded."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return what the other finders say, with the loader of a module of the zoo's list extended."""
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
    The loader stays what it is, only one of its methods does more: tools that ask it for the source still get it.

    :param spec: of a module of the zoo's list
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
    """Put the finder before the others; a second call changes nothing."""
    if not any(isinstance(finder, ZooFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooFinder())


install()
