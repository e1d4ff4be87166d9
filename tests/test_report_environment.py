"""The environment of a report, where `--env` names it: the one of the training, with its arguments and wrappers."""

import contextlib
import html
import io
import json
from types import SimpleNamespace

import gymnasium as gym
import pytest
import yaml
from stable_baselines3.common.env_util import make_vec_env
from tiny import ENTRY, tiny_model

from sb3_mbmpo import MBMPO
from sb3_mbmpo.__main__ import main
from sb3_mbmpo.report import loading
from sb3_mbmpo.report.__main__ import main as report_main
from sb3_mbmpo.report.run_log import find_run

KWARGS = {"g": 5.0, "max_episode_steps": 30}


def same_as_in_training(env):
    return (env.unwrapped.g, env.spec.max_episode_steps) == (5.0, 30)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train with the command line in a changed Pendulum, and return the folder of the run."""
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    settings = yaml.safe_dump({**ENTRY, "env_kwargs": KWARGS}, default_flow_style=True)
    options = ["--total-timesteps", "60", "--eval-episodes", "1", "--no-progress-bar", "--set", settings]
    with contextlib.redirect_stdout(io.StringIO()):
        main(["train", "--env", "Pendulum-v1", "--save", str(folder), *options])
    return folder


@pytest.mark.parametrize("name", [None, "Pendulum-v1", "Pendulum", "gymnasium:Pendulum-v1"])
def test_the_environment_of_the_training_has_its_arguments_even_if_it_is_named(name, run):
    model, make_env = loading.load_run(find_run(run), name)
    assert same_as_in_training(make_env())
    assert same_as_in_training(model.get_env().envs[0])
    assert make_env(render_mode="rgb_array").render_mode == "rgb_array"


def test_the_report_shows_these_arguments(run, tmp_path):
    pytest.importorskip("matplotlib")
    report_main([str(run), "--env", "Pendulum-v1", "--output", str(tmp_path), "--episodes", "1"])
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "g=5.0" in page or "'g': 5.0" in page or "g: 5.0" in page


def test_folders_of_rl_zoo3(tmp_path):
    """Its folder is named after the environment, and the model lies inside."""
    folder = tmp_path / "Pendulum-v1_1"
    folder.mkdir()
    tiny_model(make_vec_env("Pendulum-v1", env_kwargs=KWARGS)).save(folder / "Pendulum-v1")
    _, make_env = loading.load_run(find_run(folder), "Pendulum-v1")
    assert same_as_in_training(make_env())


def test_another_environment_is_made_as_it_is_registered(run):
    gym.register("OtherPendulum-v1", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=7)
    try:
        _, make_env = loading.load_run(find_run(run), "OtherPendulum-v1")
        assert (make_env().unwrapped.g, make_env().spec.max_episode_steps) == (10.0, 7)
    finally:
        del gym.registry["OtherPendulum-v1"]


def test_the_module_that_is_named_registers_the_environment(tmp_path, monkeypatch):
    (tmp_path / "planets.py").write_text(
        "import gymnasium as gym\ngym.register('Planet-v0', 'gymnasium.envs.classic_control:PendulumEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    gym.register("Planet-v0", "gymnasium.envs.classic_control:PendulumEnv")
    tiny_model(gym.make("Planet-v0", **KWARGS)).save(tmp_path / "model")
    del gym.registry["Planet-v0"]  # as in a new process
    try:
        _, make_env = loading.load_run(find_run(tmp_path / "model.zip"), "planets:Planet-v0")
        assert same_as_in_training(make_env())
    finally:
        gym.registry.pop("Planet-v0", None)


def test_wrappers_of_the_training_are_there_too(tmp_path):
    tiny_model(gym.wrappers.TimeAwareObservation(gym.make("Pendulum-v1", **KWARGS))).save(tmp_path / "model")
    _, make_env = loading.load_run(find_run(tmp_path / "model.zip"), "Pendulum-v1")
    assert same_as_in_training(make_env())
    assert make_env().observation_space.shape == (4,)


@pytest.mark.parametrize("damaged", ["x", "3", "{}", "null", None])
def test_a_damaged_description_does_not_matter_where_the_environment_is_named(damaged):
    make_env = loading.env_maker("Pendulum-v1", SimpleNamespace(env_spec=damaged))
    assert make_env().unwrapped.g == 10.0


def test_naming_the_environment_does_not_confirm_a_foreign_wrapper(tmp_path):
    tiny_model(gym.make("Pendulum-v1")).save(tmp_path / "model")
    model = MBMPO.load(tmp_path / "model")
    wrapper = {"name": "Evil", "entry_point": "os:system", "kwargs": {}}
    model.env_spec = json.dumps({**json.loads(model.env_spec), "additional_wrappers": [wrapper]})
    with pytest.raises(ValueError, match=r"names the wrapper os:system.*--trust"):
        loading.env_maker("Pendulum-v1", model)


@pytest.mark.parametrize(("kwargs", "is_refused"), [({}, False), ({"env_id": "a_stranger:Evil-v0"}, True)])
def test_naming_an_environment_of_shimmy_does_not_confirm_the_environment_that_its_arguments_name(
    kwargs, is_refused, tmp_path, monkeypatch
):
    tiny_model(gym.make("Pendulum-v1")).save(tmp_path / "model")
    model = MBMPO.load(tmp_path / "model")
    known = gym.envs.registration.EnvSpec("AnyGym-v0", "shimmy.openai_gym_compatibility:GymV26CompatibilityV0")
    monkeypatch.setitem(gym.registry, known.id, known)  # as `import shimmy` does it
    changes = {"id": known.id, "entry_point": known.entry_point, "kwargs": kwargs, "additional_wrappers": []}
    model.env_spec = json.dumps({**json.loads(model.env_spec), **changes})
    refusal = pytest.raises(ValueError, match="--trust") if is_refused else contextlib.nullcontext()
    with refusal:
        assert loading.env_maker(known.id, model).args[0].kwargs == kwargs
