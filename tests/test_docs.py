"""
The Python blocks of README.md and docs, and the notebook, run as they are.

A page's blocks run one after the other in one empty folder, as a reader would run them: those whose first line is a comment
with a file name are saved under that name and run as a script, the others share one namespace, as in a notebook. So that
they take seconds, `MBMPO` has small defaults meanwhile, and PPO ends early; `-m slow` runs them with the real ones.
"""

import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3 import PPO

from sb3_mbmpo import MBMPO
from sb3_mbmpo.dynamics import DynamicsEnsemble

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs" / "notebooks" / "pendulum.ipynb"
# These change what is computed, but no path through the code
SMALL = dict(
    learning_starts=500, n_imagined_rollouts=1, n_meta_steps=1, n_critic_updates=1, dynamics_kwargs=dict(max_gradient_steps=5)
)
MAX_PPO_STEPS = 2_048
FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page, language="python"):
    """Return the code blocks of a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def name(page):
    return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if blocks(page)]


@contextmanager
def forgotten(folder):
    """Forget the modules in a folder, and the environments that they register."""
    registry, modules = dict(gym.registry), set(sys.modules)
    yield
    gym.registry.clear()
    gym.registry.update(registry)
    for module in set(sys.modules) - modules:
        file = getattr(sys.modules[module], "__file__", None)
        if file is not None and folder in Path(file).parents:
            del sys.modules[module]


# Pages whose blocks need more than the package and its extras
NEEDS = {"docs/guide/robotics.md": ("gymnasium_robotics", "dm_control", "shimmy")}


@pytest.fixture
def installed(page):
    """Skip the test of a page that needs a package which is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages themselves, at import
        for package in NEEDS.get(name(page), ()):
            pytest.importorskip(package, reason=f"the page needs {package}")


def run_blocks(page_blocks, folder):
    """Run blocks in a folder from which modules can be imported."""
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(page_blocks, 1):
        file = FILE.match(block)
        with forgotten(folder):
            if file is None:
                exec(compile(block, f"block {number}", "exec"), namespace)
            else:
                (folder / file[1]).write_text(block, encoding="utf-8")
                runpy.run_path(str(folder / file[1]), run_name="__main__")


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder from which modules can be imported, as the only process of ``torchrun``."""
    for variable, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def small_budgets(monkeypatch):
    """Give MBMPO and fits small defaults, and end every training of PPO after a few steps."""
    parameters = inspect.signature(MBMPO.__init__).parameters
    assert SMALL.keys() <= parameters.keys()
    defaults = tuple(SMALL.get(p.name, p.default) for p in parameters.values() if p.default is not inspect.Parameter.empty)
    monkeypatch.setattr(MBMPO.__init__, "__defaults__", defaults)
    monkeypatch.setitem(DynamicsEnsemble.fit.__kwdefaults__, "max_gradient_steps", 5)
    learn = PPO.learn
    monkeypatch.setattr(PPO, "learn", lambda self, total_timesteps: learn(self, min(total_timesteps, MAX_PPO_STEPS)))
    # The guide turns these checks off to export a policy
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", th.distributions.Distribution._validate_args)


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
@pytest.mark.usefixtures("installed")
def test_blocks_run_as_they_are(page, empty_folder, small_budgets):
    with warnings.catch_warnings():
        # SB3's checker recommends actions in [-1, 1], which MBMPO does not need
        warnings.filterwarnings("ignore", "We recommend you to use a symmetric and normalized Box action space")
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # PyTorch's own, when it exports to ONNX
        run_blocks(blocks(page), empty_folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
@pytest.mark.usefixtures("installed")
def test_blocks_run_with_the_real_budgets(page, empty_folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    files = {match[1]: block for block in blocks(page) if (match := FILE.match(block))}
    others = [block for block in blocks(page) if not FILE.match(block)]
    for file, block in (files | ({"page.py": "\n\n".join(others)} if others else {})).items():
        (empty_folder / file).write_text(block, encoding="utf-8")
        done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_pages_that_promise_code_have_some():
    promised = {
        "README.md",
        *(f"docs/guide/{p}.md" for p in ("your-environment", "robotics", "integrations", "few-shot", "learned-models")),
    }
    assert promised <= {name(page) for page in WITH_CODE}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1500


# ---------------------------------------------------------------- paths


def test_the_map_of_the_source_names_every_module_and_nothing_else():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:sb3_mbmpo|tuning|tests|docs|zoo_configs)/[^`]*)`", text))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    folders = (ROOT / "sb3_mbmpo", ROOT / "tuning")
    modules = {name(path) for folder in folders for path in folder.rglob("*.py") if path.name != "__init__.py"}
    in_named_folders = {path for path in modules if path.startswith("tuning/results/")}
    assert sorted(modules - in_named_folders - named) == []


# ---------------------------------------------------------------- commands


def commands():
    """Return page and words of every `make` and every `python -m` command of our programs."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        inline = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for line in "\n".join([*blocks(page, "bash"), *inline]).replace("\\\n", " ").splitlines():
            command = re.sub(r"'[^']*'|\"[^\"]*\"", "TEXT", line.partition(" #")[0])
            if re.match(r"make \w|(\w+=\S+ )*python -m (sb3_mbmpo|tuning)\b", command):
                yield name(page), [word for word in command.split() if word != "&"]


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = [(page, word) for page, words in commands() if words[0] == "make" for word in words[1:] if "=" not in word]
    assert len(used) > 5
    assert [(page, word) for page, word in used if word not in targets] == []


@pytest.mark.parametrize(
    "program", ["sb3_mbmpo train", "sb3_mbmpo.report", "tuning.optimize", "tuning.report", "tuning.results"]
)
def test_options_of_commands_exist(program):
    of_verbs = ["run", "page"] if program == "tuning.results" else [None]
    helps = ""
    for verb in of_verbs:
        command = [sys.executable, "-m", *program.split(), *([] if verb is None else [verb]), "--help"]
        helps += subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    uses = [(page, " ".join(words)) for page, words in commands() if f"-m {program}" in " ".join(words)]
    assert uses
    for page, command in uses:
        for option in re.findall(r"--[a-z-]+", command.partition(f"-m {program}")[2]):
            assert re.search(rf"{option}\b", helps), (page, command)


# ---------------------------------------------------------------- the notebook


def test_notebook_runs(empty_folder, small_budgets, capsys):
    pytest.importorskip("IPython")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    run_blocks(code, empty_folder)
    assert (empty_folder / "runs/pendulum/report/report.html").is_file()
    assert "return of 20 episodes: -" in capsys.readouterr().out


def test_notebook_shows_stored_figures():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


@pytest.mark.slow
def test_notebook_executes_in_jupyter_and_learns(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert int(re.search(r"return of 20 episodes: (-\d+)", text)[1]) > -700
