"""Check that the benchmark still runs. Its results at these tiny sizes, on a busy machine, mean nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = {"n_imagined_rollouts": 4, "horizon": 5, "n_tasks": 5}


def numbers(value):
    for item in value.values():
        yield from numbers(item) if isinstance(item, dict) else [item] if isinstance(item, int | float) else []


def test_the_benchmark_measures_every_stage(tmp_path):
    options = "--sizes pendulum --threads 1 2 --devices cpu --precisions float32 --repeat 1 --rows 300 --epochs 1"
    command = [sys.executable, "-m", "tests.benchmarks.engine", *options.split(), "--meta-steps", "1"]
    command += [
        "--stages",
        "iteration",
        "fit",
        "imagination",
        "meta_step",
        "--override",
        json.dumps(TINY),
        "--output",
        str(tmp_path / "engine.json"),
    ]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    results = json.loads((tmp_path / "engine.json").read_text())
    assert [(result["threads"], result["dtype"]) for result in results] == [(1, "float32"), (2, "float32")]
    for result in results:
        assert all(math.isfinite(number) and number >= 0 for number in numbers(result))
        assert result["iteration"]["imagined_steps"] == 3 * 5 * 4 * 5
        assert set(result["iteration"]["seconds"]) == {"dynamics_fit", "imagination", "meta_update", "whole"}
        assert ("times_one_thread" in result["imagination"]) == (result["threads"] == 2)
        assert 0 < result["meta_step"]["critic_share"] < 1
    assert run.stdout.count("for the bare matmuls of the dynamics") == 2
    assert "pendulum, one core, float32: the critic takes" in run.stdout


def test_low_precision_alternates_with_single_precision(tmp_path):
    options = "--sizes pendulum --threads 1 --devices cpu --precisions bfloat16 --repeat 1 --rows 300 --stages fit imagination"
    command = [sys.executable, "-m", "tests.benchmarks.engine", *options.split(), "--override", json.dumps(TINY)]
    run = subprocess.run(
        [*command, "--output", str(tmp_path / "engine.json")], cwd=ROOT, check=True, capture_output=True, text=True
    )
    (result,) = json.loads((tmp_path / "engine.json").read_text())
    assert result["dtype"] == "bfloat16"
    assert not {"iteration", "meta_step"} & set(result)
    assert all(result[stage]["times_float32"] > 0 for stage in ("fit", "imagination"))
    assert "pendulum, one core, bfloat16: fit " in run.stdout
