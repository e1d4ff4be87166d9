"""Names and units of observations, compared with the environments' documentation."""

import re

import gymnasium as gym
import pytest

from sb3_mbmpo.report.observation_names import LAYOUTS, quantities


def documented(env):
    """Return description and unit of each row of the table in an environment's docstring."""
    rows = []
    text = type(env.unwrapped).__doc__
    for line in text[text.index("Observation Space") :].splitlines():
        number, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        if number == str(len(rows)):
            unit = re.search(r"\((m|rad|m/s|rad/s|N)\)", f"{cells[-1]} {cells[0]}", re.IGNORECASE)
            rows.append((re.findall(r"[a-z0-9]+", " ".join(cells).lower().replace("_", " ")), unit[1] if unit else ""))
    return rows


@pytest.mark.parametrize("env_id", LAYOUTS)
def test_names_are_those_of_the_documentation(env_id):
    env = gym.make(env_id)
    names = quantities(env)
    assert len(names) == env.observation_space.shape[0]
    assert len({quantity.name for quantity in names}) == len(names)
    rows = documented(env)
    assert len(rows) == (len(names) if len(names) < 100 else {"Ant-v5": 27}.get(env_id, 45))
    for quantity, (words, unit) in zip(names, rows, strict=False):
        assert set(re.findall(r"[a-z0-9]+", quantity.name.lower())) <= set(words), quantity
        if unit and "orientation" not in quantity.name:  # a quaternion, although the documentation has rad
            is_misprint = env_id == "Ant-v5" and "angular velocity" in quantity.name  # rad there
            assert quantity.unit == ("rad/s" if is_misprint else unit), quantity


@pytest.mark.parametrize(
    ("env_id", "kwargs", "expected"),
    [
        ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}, {0: "front tip x", 1: "front tip z"}),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False}, {0: "torso z", 26: "back right ankle angular velocity"}),
        ("Ant-v5", {}, {27: "torso cfrc_ext[0]", 104: "ankle_4 cfrc_ext[5]"}),
        ("Humanoid-v5", {"include_cinert_in_observation": False}, {45: "torso cvel[0]"}),
        ("HalfCheetah-v4", {}, {0: "obs[0]", 16: "obs[16]"}),
        ("sb3_mbmpo.envs:Point2D-v0", {}, {0: "x", 1: "y"}),
    ],
)
def test_names_follow_the_environments_arguments(env_id, kwargs, expected):
    names = quantities(gym.make(env_id, **kwargs))
    assert {i: names[i].name for i in expected} == expected


@pytest.mark.parametrize(
    "wrap",
    [
        gym.wrappers.TimeAwareObservation,  # another size
        lambda env: gym.wrappers.TransformObservation(env, lambda obs: obs[::-1], env.observation_space),
    ],
)
def test_observations_that_a_wrapper_changes_have_numbers_only(wrap):
    names = quantities(wrap(gym.make("Pendulum-v1")))
    assert [quantity.name for quantity in names] == [f"obs[{i}]" for i in range(len(names))]
