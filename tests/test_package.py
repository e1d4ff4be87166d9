"""The package as a whole: the cost of importing it and the names that it offers."""

import subprocess
import sys

import pytest

import sb3_mbmpo

PUBLIC_NAMES = ["MBMPO", "DiagnosticsCallback", "DynamicsEnsemble", "MlpPolicy", "ModelVecEnv"]


@pytest.mark.parametrize("heavy", ["torch", "numpy", "gymnasium", "stable_baselines3"])
def test_import_leaves_heavy_packages_alone(heavy):
    # In a fresh interpreter, because conftest.py has already imported PyTorch in this one.
    code = f"import sys, sb3_mbmpo; dir(sb3_mbmpo); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves(name):
    value = getattr(sb3_mbmpo, name)
    assert value.__module__.split(".")[0] == "sb3_mbmpo"
    assert vars(sb3_mbmpo)[name] is value, "the second access should not search again"


def test_dir_and_all_list_the_public_names():
    assert set(PUBLIC_NAMES) <= set(dir(sb3_mbmpo))
    assert set(sb3_mbmpo.__all__) == {*PUBLIC_NAMES, "__version__"}


def test_unknown_attribute_says_which_names_there_are():
    with pytest.raises(AttributeError, match=r"'MBPO'.*MBMPO.*ModelVecEnv"):
        _ = sb3_mbmpo.MBPO
    with pytest.raises(ImportError, match="MBPO"):
        from sb3_mbmpo import MBPO  # noqa: F401
