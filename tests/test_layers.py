"""The order of the package: what is computed knows nothing of who asks for it. Imports go down only, never in a circle."""

import ast
from pathlib import Path

import pytest

import sb3_mbmpo

PACKAGE = Path(sb3_mbmpo.__file__).parent

# Rooms from the ground up, and which others each may import from. A room is a folder, or a file beside the folders
ROOMS = {
    "envs": (),
    "common": (),
    "rewards": ("common",),
    "dynamics": ("common",),
    "offline": ("common", "dynamics"),
    "policies": ("common",),
    "real": ("common", "rewards", "dynamics", "policies"),
    "imagination": ("common", "rewards", "dynamics"),
    "meta": ("common", "dynamics", "policies", "imagination"),
    "memory": ("common", "dynamics", "policies"),
    "arguments": ("common", "rewards", "dynamics", "policies", "meta", "memory"),
    "mbmpo": ("common", "rewards", "dynamics", "policies", "real", "imagination", "meta", "arguments"),
    "report": ("envs", "common", "rewards", "dynamics", "imagination", "mbmpo"),
    "zoo": ("common", "real", "mbmpo"),
    "cli": ("envs", "common", "mbmpo", "report", "zoo"),
    "__main__": ("cli",),
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    return module.partition(".")[0]


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def imported(module):
    """:return: modules of the package that a module imports anywhere, in functions too"""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("sb3_mbmpo.") for name in found if name.startswith("sb3_mbmpo.")}
    # `from a.b import c` imports the module a.b.c, or c from the module a.b
    modules = {name if name in FILES else name.rpartition(".")[0] for name in names}
    return modules - {module, ""}


def test_every_module_has_a_room():
    assert {room(module) for module in FILES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down_only(module):
    below = {room(module), *ROOMS[room(module)]}
    wrong = {name for name in imported(module) if room(name) not in below}
    assert not wrong, f"{module} must not know {wrong}"


def test_rooms_lie_in_order():
    seen = set()
    for name, below in ROOMS.items():
        assert seen >= set(below)
        seen.add(name)


def test_no_module_imports_itself_in_a_circle():
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a circle: {' -> '.join([*open_, module])}"
        if module in done:
            return
        open_.append(module)
        # A package's own modules are imported with it
        for name in imported(module) - ({room(module)} if "." in module else set()):
            visit(name)
        done.add(open_.pop())

    for module in FILES:
        visit(module)
