"""Files of unknown origin: what they cannot run, import or call before the user says so."""

import base64
import json
import pickle
import sys
import zipfile
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from file_kinds import rewritten, tensors_of
from tiny import SETTINGS, Drift, assert_same, tiny_model

from sb3_mbmpo import MBMPO, DynamicsEnsemble
from sb3_mbmpo.offline import load_transitions
from sb3_mbmpo.report import loading
from sb3_mbmpo.report.__main__ import main as report_main
from sb3_mbmpo.report.run_log import RunFiles, find_run, read_evaluations
from sb3_mbmpo.zoo import read_config


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_ensemble_file_runs_no_code(model, tmp_path):
    path, mark = tmp_path / "ensemble.zip", tmp_path / "mark"
    model.dynamics.save(path)
    bomb = {":type:": "x", ":serialized:": base64.b64encode(cloudpickle.dumps(Bomb(mark))).decode()}
    arguments = json.loads(zipfile.ZipFile(path).read("data"))["arguments"]
    rewritten(path, anything=bomb)
    assert_same(DynamicsEnsemble.load(path).state_dict(), model.dynamics.state_dict())
    for changes in ({"arguments": bomb}, {"arguments": {**arguments, "observation_space": bomb}}, {"arguments": []}):
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=r"ensemble\.zip"):
            DynamicsEnsemble.load(path)
    for content in (pickle.dumps(Bomb(mark), protocol=2), tensors_of(Bomb(mark))):
        model.dynamics.save(path)
        rewritten(path, {"another.pth": content})
        with pytest.raises(ValueError, match=r"ensemble\.zip .*objects that are no tensors"):
            DynamicsEnsemble.load(path)
    assert not mark.exists()


def test_arrays_and_configurations_run_no_code(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    names = ("observations", "actions", "next_observations", "rewards", "terminations", "timesteps", "results")
    np.savez(tmp_path / "arrays.npz", **dict.fromkeys(names, np.array([Bomb(mark)], dtype=object)))
    for read in (load_transitions, read_evaluations):
        with pytest.raises(ValueError, match=r"arrays\.npz cannot be read"):
            read(tmp_path / "arrays.npz")
    config = tmp_path / "mbmpo.yml"
    config.write_text(f"default: !!python/object/apply:os.mkdir [{mark}]")
    monkeypatch.setattr("sb3_mbmpo.zoo.config.config_file", lambda: config)
    with pytest.raises(ValueError, match=r"mbmpo\.yml is not a (valid )?YAML file"):
        read_config("default")
    assert not mark.exists()


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Yield the name of a module, and a file that exists once the module has been imported."""
    mark = tmp_path / "imported"
    (tmp_path / "a_stranger.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from tiny import Drift\nreward, done = Drift.reward, Drift.done\n"
        "class Env(Drift):\n    reward = done = None\n    metadata = {'render_modes': []}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_stranger", raising=False)
    yield "a_stranger", mark
    sys.modules.pop("a_stranger", None)


@pytest.mark.parametrize("says_so", [dict(env=Drift()), dict(reward_fn="a_stranger:reward", termination_fn=None)])
def test_functions_that_a_file_names_are_imported_when_the_user_says_so(says_so, stranger, tmp_path):
    module, mark = stranger
    tiny_model(reward_fn=f"{module}:reward", termination_fn=f"{module}:done").save(tmp_path / "model")
    sys.modules.pop(module)
    mark.unlink()
    loaded = MBMPO.load(tmp_path / "model")
    loaded.save(tmp_path / "again")
    with pytest.raises(ValueError, match="No reward function is known"):
        loaded.imagined_env()
    assert not mark.exists()
    MBMPO.load(tmp_path / "again", **says_so)
    assert mark.exists()


def test_the_report_makes_only_what_is_registered_or_trusted(stranger, tmp_path):
    module, mark = stranger
    gym.register("Stranger-v0", f"{module}:Env", disable_env_checker=True)
    try:
        tiny_model(gym.make("Stranger-v0")).save(tmp_path / "model")
    finally:
        del gym.registry["Stranger-v0"]
    sys.modules.pop(module)
    mark.unlink()
    with pytest.raises(SystemExit, match=rf"Stranger-v0 \({module}:Env\), which is not registered.*--env.*--trust"):
        report_main([str(tmp_path / "model.zip")])
    assert not mark.exists()
    files = RunFiles(tmp_path / "model.zip", None, None, None)
    loading.load_run(files, None, trust=True)
    assert mark.exists()


def test_the_report_calls_no_function_that_only_the_file_names(stranger, tmp_path):
    module, mark = stranger
    model = MBMPO("MlpPolicy", "Pendulum-v1", **{**SETTINGS, "reward_fn": f"{module}:reward"})
    model.save(tmp_path / "model")
    sys.modules.pop(module)
    mark.unlink()
    files = find_run(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=f"{module}:reward as its reward_fn.*--trust"):
        loading.load_run(files, None)
    assert not mark.exists()
    loading.load_run(files, "Pendulum-v1")
    assert mark.exists()


def test_a_wrapper_that_only_the_file_names_is_not_called(tmp_path):
    env = gym.make("Pendulum-v1")
    model = MBMPO("MlpPolicy", env, **SETTINGS)
    model.save(tmp_path / "model")
    spec = json.loads(MBMPO.load(tmp_path / "model").env_spec)
    spec["additional_wrappers"] = [{"name": "Evil", "entry_point": "os:system", "kwargs": {}}]
    rewritten(tmp_path / "model.zip", env_spec=json.dumps(spec))
    with pytest.raises(SystemExit, match="names the wrapper os:system"):
        report_main([str(tmp_path / "model.zip")])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"entry_point": "os:system"}, r"names the environment Pendulum-v1 \(os:system\), which is not registered.*--trust"),
        ({"id": "os:X-v0"}, "names the environment os:X-v0 .*not registered here.*--trust"),
        ({"id": "GymV26Environment-v0", "entry_point": "shimmy.openai_gym_compatibility:GymV26CompatibilityV0"}, "--trust"),
        ({"kwargs": {"evil": 1}}, "cannot be made .*'evil'.*--env ID"),
        ({"kwargs": "x"}, "makes no sense .*--env ID"),
        ({"kwargs": None}, "makes no sense .*--env ID"),
        ({"max_episode_steps": "x"}, "cannot be made .*max_episode_steps.*--env ID"),
        ({"additional_wrappers": "x"}, "makes no sense .*--env ID"),
        *(
            ({"additional_wrappers": [{"name": "A", "entry_point": entry_point, "kwargs": {}}]}, "names the wrapper .*--trust")
            for entry_point in ("gymnasium.wrappers.common:deepcopy", "os:TimeLimit", None)
        ),
        (3, "makes no sense .*--env ID"),
        ("x", "makes no sense .*--env ID"),
        ("null", "makes no sense .*--env ID"),
        ("{}", "makes no sense .*--env ID"),
    ],
    ids=str,
)
def test_what_a_file_says_of_its_environment_is_made_as_it_is_registered_or_named(changes, named, tmp_path, monkeypatch):
    MBMPO("MlpPolicy", gym.make("Pendulum-v1"), **SETTINGS).save(tmp_path / "model")
    if isinstance(changes, dict):
        changes = json.dumps({**json.loads(MBMPO.load(tmp_path / "model").env_spec), **changes})
    rewritten(tmp_path / "model.zip", env_spec=changes)
    with pytest.raises(SystemExit, match=f"ValueError: .*{named}"):
        report_main([str(tmp_path / "model.zip")])


def test_the_guide_says_what_loading_a_file_can_do():
    text = (Path(__file__).parents[1] / "docs" / "guide" / "files.md").read_text()
    unsafe, safe = text.partition("## What loading a file can do")[2].partition("\n## ")[0].split("Safe, whoever wrote them")
    for name in ("model", "policy", "replay buffer", "VecNormalize"):
        assert name in unsafe
    for name in ("DynamicsEnsemble.load", "load_transitions", "reward_fn", "set_env", "--env ID", "--trust", "redis://"):
        assert name in safe
