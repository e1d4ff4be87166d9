"""Several processes of ``torchrun`` learn what one process learns; if one ends, all do, with a message."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from killed_runs import TINY
from test_workers import CASES
from tiny import assert_same

from sb3_mbmpo import MBMPO
from sb3_mbmpo.__main__ import main
from sb3_mbmpo.cli import workers
from sb3_mbmpo.common.world import World
from sb3_mbmpo.dynamics.groups import member_groups, merged, shares_of_processes, stacks

TESTS = Path(__file__).parent


def launched(*program, processes=2, options=("--standalone",)):
    """Start ``torchrun``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}"]
    command += ["-m", "learning_together", *map(str, program)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(*program, **options):
    """Run ``torchrun``, and return its exit code and output."""
    process = launched(*program, **options)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


@pytest.fixture(scope="module")
def learned_by(tmp_path_factory):
    """Return what some processes learn, by their number and the largest number of them that learns the same digits."""
    folder, found = tmp_path_factory.mktemp("processes"), {}
    for n, same_digits_up_to in [(1, 3), (2, 3), (3, 3), (1, 1), (2, 1)]:
        path = folder / f"{n}-{same_digits_up_to}.pt"
        code, output = run("equal", path, same_digits_up_to, processes=n)
        assert code == 0, output
        found[n, same_digits_up_to] = th.load(path)
    return found


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", [*CASES, "VecNormalize"])
def test_any_number_of_processes_with_the_same_groups_learns_the_same(case, processes, learned_by):
    assert_same(learned_by[processes, 3][case], learned_by[1, 3][case])


@pytest.mark.parametrize("case", [*CASES, "VecNormalize"])
def test_other_groups_only_round_differently(case, learned_by):
    alone, together = learned_by[1, 1][case], learned_by[2, 1][case]
    for name in alone:
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_callback_that_stops_ends_all_processes():
    code, output = run("stopped")
    assert code == 0, output
    assert "0 ended after 50" in output
    assert "1 ended after 40" in output  # the steps of its last iteration


def test_nobody_waits_for_a_process_that_caught_an_error():
    code, output = run("caught")
    assert code == 0, output
    assert "1 says: Another process has ended" in output


def test_an_error_of_another_process_ends_the_first():
    code, output = run("worker_fails")
    assert code != 0
    assert "`reward_fn`" in output
    assert "nan" in output
    assert "0 says: Another process has ended" in output


def test_different_arguments_are_refused():
    code, output = run("different")
    assert code != 0
    assert "The processes have different arguments, and must have the same: inner_lr." in output


def test_more_processes_than_models_are_refused():
    code, output = run("too_many", processes=3)
    assert code != 0
    assert "3 processes cannot share 2 models" in output


def test_a_killed_process_ends_the_run_and_its_state_resumes(tmp_path):
    start = time.perf_counter()
    code, output = run("command_line", tmp_path / "killed.zip", 3)
    assert code != 0
    assert time.perf_counter() - start < 120
    assert "killed.zip has the run up to 40 real steps: the same command with --resume continues from there" in output
    assert MBMPO.load(tmp_path / "killed.zip").num_timesteps == 40
    code, output = run("command_line", tmp_path / "killed.zip")
    assert code == 0, output
    assert "goes on from 40 real steps" in output
    code, output = run("command_line", tmp_path / "whole.zip", processes=1)
    assert code == 0, output
    resumed, whole = (MBMPO.load(tmp_path / f"{name}.zip") for name in ("killed", "whole"))
    assert resumed.num_timesteps == whole.num_timesteps == 100
    assert_same(resumed.policy.state_dict(), whole.policy.state_dict())
    assert_same(resumed.dynamics.state_dict(), whole.dynamics.state_dict())


def test_two_machines(tmp_path):
    """Two groups of processes, as on two machines, which meet at an address."""
    port = 29_700 + os.getpid() % 1_000
    where = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    machines = [
        launched("command_line", tmp_path / str(rank) / "run.zip", processes=1, options=[*where, f"--node-rank={rank}"])
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert MBMPO.load(tmp_path / "0" / "run.zip").num_timesteps == 100
    assert not (tmp_path / "1").exists(), "only process 0 has files"


# -- One command --------------------------------------------------------------------------------------------------------------

SMALL = (
    "{n_models: 2, n_tasks: 2, n_imagined_rollouts: 3, horizon: 4, n_meta_steps: 1, n_steps: 20, learning_starts: 20, "
    "n_critic_updates: 2, batch_size: 16, dynamics_kwargs: {net_arch: [8], max_epochs: 2}}"
)


def trained(path, *options, launcher=()):
    """Train by the command line in another program, and return its exit code, its output and the model, if there is one."""
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "sb3_mbmpo", "train", "--env", "Pendulum-v1", "--set", SMALL]
    command += ["--save", str(path), "--eval-episodes", "1", "--no-progress-bar", "--total-timesteps", "60", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    program = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, timeout=300)
    return program.returncode, program.stdout + program.stderr, MBMPO.load(path) if path.exists() else None


def test_workers_are_processes_of_torchrun(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, output, theirs = trained(tmp_path / "torchrun.zip", launcher=launcher)
    assert code == 0, output
    code, output, ours = trained(tmp_path / "workers.zip", "--workers", "2")
    assert code == 0, output
    assert_same(ours.policy.state_dict(), theirs.policy.state_dict())
    assert_same(ours.dynamics.state_dict(), theirs.dynamics.state_dict())
    code, output, _ = trained(tmp_path / "workers.zip", "--workers", "2")
    assert code == 1
    assert "is there already" in output
    code, output, _ = trained(tmp_path / "nested.zip", "--workers", "2", launcher=launcher)
    assert code == 1
    assert "--workers starts the processes by itself: leave it out with torchrun" in output


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_other_numbers_of_workers_are_refused(number, capsys):
    with pytest.raises(SystemExit):
        main(["train", f"--workers={number}"])
    assert f"must be a number of processes, at least 1, or auto, not '{number}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "number"),
    [
        ({}, 4),
        ({"n_models": 3}, 3),
        ({"dynamics_kwargs": {"net_arch": [1024, 1024]}}, 1),
        ({"dynamics_kwargs": {"net_arch": []}}, 4),
    ],
    ids=str,
)
def test_small_networks_get_processes_and_large_ones_threads(config, number, monkeypatch):
    monkeypatch.setattr(workers, "worker_threads", lambda device: 4)
    assert workers.chosen_number(config, "cpu") == number


# -- Sharing out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_models", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("flops", [10, 164_000, 565_000])
def test_groups_are_all_members_once_and_do_not_depend_on_few_processes(n_models, flops):
    groups = member_groups(n_models, flops, at_least=3)
    assert [member for group in groups for member in range(n_models)[group]] == list(range(n_models))
    assert len(groups) >= min(n_models, 3)
    sizes = [group.stop - group.start for group in groups]
    assert sizes == sizes[::-1]
    for n_processes in range(1, len(groups) + 1):
        shares = shares_of_processes(groups, n_processes)
        assert [group for share in shares for group in share] == groups
        assert len(shares) == n_processes
        assert all(shares)


def test_a_single_process_computes_small_models_together_and_large_ones_apart():
    assert member_groups(5, 164_000) == [slice(0, 5)]
    assert len(member_groups(5, 2_000_000)) == 5


def test_five_models_on_two_processes_are_two_and_three():
    shares = shares_of_processes(member_groups(5, 164_000, at_least=2), 2)
    assert [sum(group.stop - group.start for group in share) for share in shares] == [2, 3]


def test_a_process_computes_all_its_small_models_together():
    assert merged([slice(2, 3), slice(3, 5)], 164_000) == [slice(2, 5)]
    assert merged([slice(2, 3), slice(3, 5)], 2_000_000) == [slice(2, 3), slice(3, 4), slice(4, 5)]


@pytest.mark.parametrize(
    ("processes", "tasks_of_model", "flops", "expected"),
    [
        (1, 4, 164_000, [[0, 1, 2, 3, 4]]),
        (2, 4, 164_000, [[0, 0, 1, 1, 2], [2, 3, 3, 4, 4]]),
        (2, 3, 164_000, [[0, 1], [2, 3, 4]]),
        (3, 4, 164_000, [[0, 1], [2], [3, 4]]),
        (2, 4, 2_000_000, [[0], [1], [2], [3], [4]]),
    ],
)
def test_a_process_imagines_all_tasks_of_its_small_models_together(processes, tasks_of_model, flops, expected):
    shares = shares_of_processes(member_groups(5, flops, processes), processes)
    assert stacks(shares, tasks_of_model, flops) == expected


def test_the_mean_over_tasks_keeps_what_single_precision_loses():
    rows = th.tensor([[1e8], [1.0], [-1e8], [0.5]])
    assert World().mean(rows, 4).tolist() == [0.375]


def test_a_single_process_communicates_with_nobody():
    world, rows = World.current(), th.arange(3)
    assert world == World(0, 1)
    assert world.gather(rows, [3]) is rows
    assert (world.broadcast("message"), world.largest(7)) == ("message", 7)
    world.leave()


def test_the_settings_of_the_command_line_are_shared_by_all_processes():
    assert TINY["n_models"] == 2, "test_two_machines needs a model for each"
