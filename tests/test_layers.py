"""The order of the package: what is computed knows nothing of who asks for it. Imports go down only, never in a circle."""

import ast
from pathlib import Path

import pytest

import sb3_mbmpo

PACKAGE = Path(sb3_mbmpo.__file__).parent

# Room: (rooms that it may import from, besides itself; its modules)
ROOMS = {
    "common": (
        (),
        "actions atomic checks distributions env_reading envs finite health observations progress save_util space_files "
        "stacked_actor linalg threads",
    ),
    "rewards": (("common",), "rewards rewards.known rewards.resolve"),
    "dynamics": (
        ("common",),
        "dynamics dynamics.ensemble dynamics.networks dynamics.options dynamics.parallel dynamics.perturbation dynamics.step "
        "dynamics.training dynamics.types offline",
    ),
    "policies": (("common",), "policies"),
    "real": (
        ("common", "rewards", "dynamics", "policies"),
        "env_faults real_returns real_rollouts replay_files resumable",
    ),
    "imagination": (("common", "rewards", "dynamics"), "imagination model_env starts vec_env"),
    "meta": (
        ("common", "dynamics", "policies", "imagination"),
        "adaptation advantages critic few_shot meta meta_training",
    ),
    "algorithm": (
        ("common", "rewards", "dynamics", "policies", "real", "imagination", "meta"),
        "arguments mbmpo sizes",
    ),
    "report": (
        ("common", "dynamics", "imagination", "algorithm"),
        "diagnostics diagnostics_callback plots real_episodes report run_log video",
    ),
    "zoo": (("real", "algorithm"), "_zoo_hook search_space zoo"),
    "command line": (("algorithm", "report", "zoo"), "__main__ interrupts repeatable training_run"),
}
ROOM_OF = {module: room for room, (_, modules) in ROOMS.items() for module in modules.split()}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py"}


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
    assert set(ROOM_OF) == set(FILES)
    assert len(ROOM_OF) == sum(len(modules.split()) for _, modules in ROOMS.values()), "a module in two rooms"


@pytest.mark.parametrize("module", sorted(ROOM_OF))
def test_imports_go_down_only(module):
    room = ROOM_OF[module]
    below = {room, *ROOMS[room][0]}
    wrong = {name for name in imported(module) if ROOM_OF[name] not in below}
    assert not wrong, f"{module} ({room}) must not know {wrong}"


def test_rooms_lie_in_order():
    seen = set()
    for room, (below, _) in ROOMS.items():
        assert seen >= set(below)
        seen.add(room)


def test_no_module_imports_itself_in_a_circle():
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a circle: {' -> '.join([*open_, module])}"
        if module in done:
            return
        open_.append(module)
        # A package's own modules are imported with it
        for name in imported(module) - ({module.partition(".")[0]} if "." in module else set()):
            visit(name)
        done.add(open_.pop())

    for module in FILES:
        visit(module)
