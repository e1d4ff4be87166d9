"""Training on a device other than the CPU: a pretended one (``pretend_device.py``), and a GPU if there is one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th

# Cases of pretend_device.py; a test checks that none is missing
CASES = [
    "box",
    "discrete",
    "multi_discrete",
    "multi_binary",
    "vec_normalize",
    "learned_heads",
    "every_option_of_the_ensemble",
    "bfloat16",
    "starts_from_the_buffer",
    "learned_inner_steps",
    "ppo",
    "several_chunks",
    "new_ensemble",
    "any_activation",
]
pytestmark = pytest.mark.skipif(
    not hasattr(th.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="pretended devices need PyTorch 2.9",
)


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, "-W", "ignore", "-m", "pretend_device"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_all_cases_are_looked_at(results):
    assert list(results) == CASES


@pytest.mark.parametrize("case", CASES)
def test_nothing_mixes_devices(results, case):
    assert set(results[case]) == {"cpu", "pretend", *["cuda"] * th.cuda.is_available()}
    for result in results[case].values():
        assert result["error"] is None, result["error"]


@pytest.mark.parametrize("case", CASES)
def test_the_hot_loop_waits_for_the_cpu_only_to_see_whether_anything_is_alive(results, case):
    # In ALIVE_CHECK_INTERVAL steps; whether rewards and probabilities are finite; the actions' bounds are copied there once
    looks, checks, constants = 1, 2, 1
    assert results[case]["pretend"]["waits_in_the_loop"] <= looks + checks + constants


@pytest.mark.parametrize("case", [case for case in CASES if case != "learned_inner_steps"])
def test_the_numbers_are_those_of_the_cpu(results, case):
    ours, theirs = (results[case][device]["numbers"] for device in ("pretend", "cpu"))
    assert ours.keys() == theirs.keys()
    assert "Fisher product" in ours
    for name in theirs:
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-3 * scale, err_msg=name)
        assert scale > 0, name
