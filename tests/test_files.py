"""Files: written atomically, damaged, from other programs, of unknown origin."""

import base64
import copy
import gc
import io
import json
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny import ACTION_SPACES, SETTINGS, Drift, assert_same, parameters, push, tiny_model, vec_drift

from sb3_mbmpo import MBMPO, DynamicsEnsemble, MlpPolicy
from sb3_mbmpo.common.atomic import whole_file, write_whole
from sb3_mbmpo.common.save_util import FILE_FORMAT, plain
from sb3_mbmpo.common.space_files import space_from_dict, space_to_dict
from sb3_mbmpo.offline import load_transitions
from sb3_mbmpo.report import loading
from sb3_mbmpo.report.__main__ import main as report_main
from sb3_mbmpo.report.run_log import RunFiles, RunLogFile, find_run, read_evaluations
from sb3_mbmpo.zoo import read_config


@pytest.fixture(scope="module")
def model():
    """Return a trained model, which tests must not change."""
    return tiny_model(learn_inner_lr=True, buffer_size=64).learn(40)


WRITERS = {
    "model": lambda model, path: model.save(path),
    "ensemble": lambda model, path: model.dynamics.save(path),
    "policy": lambda model, path: model.policy.save(path),
    "buffer": lambda model, path: model.save_replay_buffer(path),
    "page": lambda model, path: write_whole(path, "x" * 10_000),
    "log": lambda model, path: RunLogFile(path).write({"key": "x" * 10_000}, {"key": ()}),
}


# -- Atomic writes --------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(kind, folder):
    """Limit the files in ``folder`` to a small size inside the block: 1 KiB each, or 8 KiB in total on a tmpfs."""
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
        if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
            pytest.skip("only root can mount a small disk; the other kind of limit is still tested")
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file(writer, kind, model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(kind, disk):
        path = disk / "file.zip"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match=r"(too large|No space).*what was there before is as it was: .*file\.zip"):
            WRITERS[writer](model, path)
        assert path.read_bytes() == b"old"
        assert list(disk.iterdir()) == [path]
    WRITERS[writer](model, tmp_path / "elsewhere.zip")
    assert (tmp_path / "elsewhere.zip").stat().st_size > 1024


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_on_the_way_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_gets_its_name_and_the_folder_afterwards(tmp_path, monkeypatch):
    """A kill cannot show this: only a power failure loses what the system has not written to the disk yet."""
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append(("sync", "folder" if stat.S_ISDIR(status.st_mode) else status.st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_whole(tmp_path / "file", b"content")
    assert events == [("sync", len(b"content")), ("rename", "file"), ("sync", "folder")]


def test_nothing_is_written_in_any_other_way():
    root = Path(__file__).parents[1]
    ways = (
        r"write_text\(",
        r"write_bytes\(",
        r"savefig\((?!png)",
        r"np\.save",
        r"th\.save\(",
        r"open\([^)]*[\"'][wax]b?\+?[\"']",
    )
    writes = re.compile("|".join(ways))
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("sb3_mbmpo", "tuning")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if writes.search(line)
    }
    assert {line.partition(":")[0] for line in found} == {"sb3_mbmpo/common/atomic.py"}, found


def test_parts_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    path = tmp_path / "run[1].zip"
    (tmp_path / ".run[1].zip.00000000.part").write_bytes(b"of a process that was killed")
    (tmp_path / ".other.zip.00000000.part").write_bytes(b"of another file")
    with whole_file(path) as slow:
        slow.write(b"slow")
        write_whole(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow", "complete, and the last one to be finished"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.zip.00000000.part", "run[1].zip"]


def test_links_permissions_and_devices_stay_what_they_are(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"new", 0o640)
    write_whole(tmp_path / "fresh", b"")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "usual").stat().st_mode
    write_whole("/dev/null", b"nowhere")
    assert Path("/dev/null").is_char_device()


def test_folders_of_the_name_are_not_in_the_way(model, tmp_path):
    (tmp_path / "plain").mkdir()
    for save, load, suffix in (
        (model.save, MBMPO.load, "zip"),
        (model.dynamics.save, DynamicsEnsemble.load, "zip"),
        (model.save, tiny_model(learn_inner_lr=True).set_parameters, "zip"),
        (model.save_replay_buffer, tiny_model().load_replay_buffer, "pkl"),
    ):
        save(tmp_path / "plain")
        assert (tmp_path / f"plain.{suffix}").is_file()
        load(tmp_path / "plain")
        load(str(tmp_path / "plain"))


# -- Damaged files --------------------------------------------------------------------------------------------------------

READERS = {
    "model": lambda path: parameters(MBMPO.load(path)),
    "ensemble": lambda path: DynamicsEnsemble.load(path).state_dict(),
    "policy": lambda path: MlpPolicy.load(path).state_dict(),
    "buffer": lambda path: vars(loaded_buffer(path)),
    "transitions": lambda path: load_transitions(path).transitions._asdict(),
    "evaluations": lambda path: dict(enumerate(read_evaluations(path))),
}


def loaded_buffer(path):
    model = tiny_model(buffer_size=64)
    model.load_replay_buffer(path)
    return model.replay_buffer


def written(kind, model, path):
    if kind in WRITERS:
        WRITERS[kind](model, path)
    elif kind == "transitions":
        names = ("observations", "actions", "next_observations", "rewards", "terminations")
        arrays = [np.random.default_rng(0).random((9, 2)) for _ in range(3)] + [np.zeros(9), np.zeros(9, bool)]
        np.savez(path, **dict(zip(names, arrays, strict=True)))
    else:
        np.savez(path, timesteps=np.arange(3), results=np.ones((3, 2)))
    return path.read_bytes()


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_named_or_means_the_same(kind, model, tmp_path):
    path = tmp_path / "the_file.npz"
    content = written(kind, model, path)
    whole = READERS[kind](path)
    rng = np.random.default_rng(0)
    messages = []
    for place in [*range(0, 40, 8), *range(len(content) - 120, len(content), 12), *rng.integers(len(content), size=12), None]:
        damaged = content[: len(content) // 2] if place is None else bytearray(content)
        if place is not None:
            damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            found = READERS[kind](path)
        except ValueError as error:
            messages.append(str(error))
            continue
        for name in whole:  # not every bit matters
            if isinstance(whole[name], (np.ndarray, th.Tensor)):
                np.testing.assert_array_equal(found[name], whole[name], err_msg=f"bit in byte {place}")
    assert len(messages) > 10
    assert all("the_file.npz" in message for message in messages), messages


@pytest.mark.parametrize("kind", ["model", "ensemble"])
def test_a_part_that_is_damaged_is_named_though_the_seal_is_lost(kind, model, tmp_path):
    path = tmp_path / "the_file.zip"
    WRITERS[kind](model, path)
    rewritten(path)
    READERS[kind](path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        part = archive.getinfo("dynamics.pth" if kind == "ensemble" else "policy.pth")
    content[part.header_offset + part.compress_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"the_file\.zip cannot be read: its entry '{part.filename}' is damaged"):
        READERS[kind](path)


def test_arrays_whose_shapes_are_damaged_are_named(tmp_path):
    path = tmp_path / "the_file.npz"
    names = ("observations", "actions", "next_observations", "rewards", "terminations")
    arrays = [np.ones((9000, 2)) for _ in range(3)] + [np.ones(9000), np.ones(9000, bool)]  # more than is read at once
    np.savez(path, **dict(zip(names, arrays, strict=True)))
    path.write_bytes(path.read_bytes().replace(b"(9000,", b"(1000,"))
    with pytest.raises(ValueError, match=r"the_file\.npz cannot be read: its entry '.*\.npy' is damaged"):
        load_transitions(path)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (dict(steps=np.arange(2)), "lacks `timesteps` or `results`"),
        (dict(timesteps=np.arange(2), results=np.ones((3, 2))), r"\(2,\) and `results` \(3, 2\)"),
        (dict(timesteps=np.arange(2), results=np.ones(2)), r"\(2,\) and `results` \(2,\)"),
        (dict(timesteps=np.arange(2), results=np.array([["a"], ["b"]])), "of int64 and `results` of <U1: no numbers"),
    ],
)
def test_evaluations_that_make_no_sense_are_named(arrays, named, tmp_path):
    np.savez(tmp_path / "evaluations.npz", **arrays)
    with pytest.raises(ValueError, match=rf"evaluations\.npz.*{named}"):
        read_evaluations(tmp_path / "evaluations.npz")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: setattr(b, "pos", 10**6), "`pos`=1000000.*is not a position in its 64 rows"),
        (lambda b: setattr(b, "pos", -1), "`pos` must be an integer of at least 0, not -1"),
        (lambda b: setattr(b, "full", None), "`full`=None"),
        (lambda b: setattr(b, "n_envs", 2), r"`observations` must be an array of shape \(64, 2, 2\)"),
        (lambda b: setattr(b, "rewards", b.rewards[:5]), r"`rewards` must be an array of shape \(64, 1\)"),
        (lambda b: setattr(b, "actions", b.actions.tolist()), "`actions` must be an array .*a list"),
        (lambda b: setattr(b, "rewards", b.rewards.astype(str)), "`rewards` must hold numbers"),
        (
            lambda b: b.observations.__setitem__((3, 0, 1), np.nan),
            "`observations` has NaN or infinite numbers, first in row 3",
        ),
        (lambda b: setattr(b, "rewards", np.full((64, 1), 1e39)), "`rewards` has NaN or infinite numbers, first in row 0"),
        (lambda b: b.dones.__setitem__(2, 0.5), "`dones` must be 0 or 1"),
        (lambda b: b.timeouts.__setitem__(0, 1.0), "`timeouts` mark steps that did not end an episode"),
        (lambda b: b.actions.__setitem__(1, 1.5), r"actions should be in \[-1, 1\].*up to 1.5"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused_by_name(change, match, model, tmp_path):
    buffer = copy.deepcopy(model.replay_buffer)
    buffer.actions = np.clip(buffer.actions, -1, 1)  # as SB3's algorithms store them
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    tiny_model(buffer_size=64).load_replay_buffer(tmp_path / "buffer.pkl")
    change(buffer)
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    with pytest.raises(ValueError, match=rf"buffer\.pkl cannot be used.*{match}"):
        tiny_model(buffer_size=64).load_replay_buffer(tmp_path / "buffer.pkl")


def test_a_buffer_changed_behind_our_back_is_refused(model, tmp_path):
    path = tmp_path / "buffer.pkl"
    model.save_replay_buffer(path)
    stored = load_from_pkl(path)
    save_to_pkl(path, stored)
    with pytest.raises(ValueError, match=r"buffer\.pkl has lost its checksum"):
        loaded_buffer(path)
    path.write_bytes(pickle.dumps({"no": "buffer"}))
    with pytest.raises(ValueError, match=r"buffer\.pkl holds no replay buffer, but a dict"):
        loaded_buffer(path)


def test_a_damaged_configuration_is_named(tmp_path, monkeypatch):
    path = tmp_path / "mbmpo.yml"
    monkeypatch.setattr("sb3_mbmpo.zoo.config.config_file", lambda: path)
    for content in (b"a: [1", b"\xff", b"- list", b"Pendulum-v1: 3"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mbmpo\.yml"):
            read_config("Pendulum-v1")


# -- Buffers of SB3's algorithms --------------------------------------------------------------------------------------------


class Noting(gym.Wrapper):
    """A wrapper that records the actions that the environment receives."""

    def __init__(self, env):
        super().__init__(env)
        self.received = []

    def step(self, action):
        self.received.append(np.copy(action))
        return self.env.step(action)


def off_policy(algorithm, env, **kwargs):
    return algorithm("MlpPolicy", env, buffer_size=64, learning_starts=100, policy_kwargs=dict(net_arch=[4]), **kwargs)


@pytest.mark.parametrize(
    ("algorithm", "action_space"), [(SAC, "box"), (TD3, "box"), (DQN, "discrete")], ids=["SAC", "TD3", "DQN"]
)
def test_real_steps_of_other_algorithms_mean_the_same_here(algorithm, action_space, tmp_path):
    env = Noting(Drift(ACTION_SPACES[action_space]))  # a Box of [-1, 2], unlike that of the buffer
    off_policy(algorithm, env, seed=0).learn(40).save_replay_buffer(tmp_path / "buffer")
    ours = tiny_model(Drift(ACTION_SPACES[action_space]), buffer_size=64)
    ours.load_replay_buffer(tmp_path / "buffer")
    data = ours._transitions()
    np.testing.assert_allclose(data.action.reshape(40, -1), np.reshape(env.received, (40, -1)), atol=1e-6)
    for obs, action, next_obs in zip(data.obs.numpy(), data.action.numpy(), data.next_obs.numpy(), strict=True):
        np.testing.assert_allclose(push(obs, action), next_obs, atol=1e-5)
    # And back: they can load what we save, and we read the original actions from it
    ours.save_replay_buffer(tmp_path / "ours")
    theirs = off_policy(algorithm, Drift(ACTION_SPACES[action_space]))
    theirs.load_replay_buffer(tmp_path / "ours")
    first = load_from_pkl(tmp_path / "buffer.pkl")
    np.testing.assert_allclose(theirs.replay_buffer.actions[:40], first.actions[:40], atol=1e-6)
    again = tiny_model(Drift(ACTION_SPACES[action_space]), buffer_size=64)
    again.load_replay_buffer(tmp_path / "ours")
    np.testing.assert_array_equal(again.replay_buffer.actions, ours.replay_buffer.actions)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
            "optimize_memory_usage",
        ),
        (dict(replay_buffer_kwargs=dict(handle_timeout_termination=False)), "handle_timeout_termination"),
    ],
)
def test_buffers_that_lack_something_are_refused(options, match, tmp_path):
    off_policy(SAC, Drift(), **options).learn(20).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=rf"buffer.* cannot be used.*{match}"):
        tiny_model().load_replay_buffer(tmp_path / "buffer")


@pytest.mark.parametrize(("capacity", "expected"), [(16, 16), (64, 40), (1000, 40)])
def test_a_buffer_of_another_size_gives_its_newest_steps(capacity, expected, model, tmp_path):
    model.save_replay_buffer(tmp_path / "buffer")
    smaller = tiny_model(buffer_size=max(capacity, 20), learning_starts=20)
    smaller.buffer_size = capacity
    smaller.load_replay_buffer(tmp_path / "buffer")
    assert smaller.replay_buffer.size() == expected
    np.testing.assert_array_equal(smaller._transitions().obs, model._transitions().obs[-expected:])


# -- Files of unknown origin ------------------------------------------------------------------------------------------------


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def tensors_of(value):
    """Return what PyTorch saves of a value."""
    content = io.BytesIO()
    th.save(value, content)
    return content.getvalue()


def rewritten(path, parts=None, **changes):
    """Change attributes in a file, or whole parts of it, as an attacker would, without updating its checksum."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    entries["data"] = json.dumps({**json.loads(entries["data"]), **changes}).encode()
    entries |= parts or {}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)


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


@pytest.mark.parametrize("action", [-1, 3, 0.5])
def test_choices_that_a_space_lacks_are_refused(action, tmp_path):
    model = tiny_model(Drift(ACTION_SPACES["discrete"]), buffer_size=64).learn(20)
    buffer = copy.deepcopy(model.replay_buffer)
    buffer.actions = buffer.actions.astype(np.float32)
    buffer.actions[3] = action
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    with pytest.raises(ValueError, match=r"buffer\.pkl cannot be used.*must be choices of Discrete\(3\)"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")


@pytest.mark.parametrize(
    "parts",
    [
        {"dynamics.pth": b""},
        {"dynamics.optimizer.pth": None},
        {"dynamics.pth": [1]},
        {"dynamics.pth": {"no": th.zeros(1)}},
        {"../../outside.pth": b"no tensors"},
        {"data": json.dumps({"file_kind": "ensemble", "file_format": FILE_FORMAT}).encode()},
        {"data": b"[" * 100_000},
    ],
    ids=lambda parts: f"{next(iter(parts))}={str(next(iter(parts.values())))[:20]}",
)
def test_an_ensemble_file_of_nonsense_is_named(parts, model, tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    model.dynamics.save(folder / "ensemble.zip")
    contents = {name: value if isinstance(value, bytes) else tensors_of(value) for name, value in parts.items()}
    rewritten(folder / "ensemble.zip", contents)
    with pytest.raises(ValueError, match=r"(?s)ensemble\.zip .*earlier copy"):
        DynamicsEnsemble.load(folder / "ensemble.zip")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ensemble.zip"]


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        spaces.Box(np.array([-1.0, 0.1]), np.array([1 / 3, 7.0]), dtype=np.float64),
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
    ],
    ids=str,
)
def test_spaces_come_back_from_json(space):
    back = space_from_dict(json.loads(json.dumps(space_to_dict(space))))
    assert back == space
    assert back.dtype == space.dtype


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


def test_the_readme_says_what_loading_a_file_can_do():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    unsafe, safe = text.partition("## What loading a file can do")[2].partition("\n## ")[0].split("Safe, whoever wrote them")
    for name in ("model", "policy", "replay buffer", "VecNormalize"):
        assert name in unsafe
    for name in ("DynamicsEnsemble.load", "load_transitions", "reward_fn", "set_env", "--env ID", "--trust", "redis://"):
        assert name in safe


# -- NumPy numbers, other arguments -------------------------------------------------------------------------------------------


def test_numbers_of_numpy_in_arguments_make_files_that_load(tmp_path):
    model = tiny_model(
        learning_rate=lambda progress: np.float64(1e-3) * np.float32(progress),
        inner_lr=np.float32(0.1),
        seed=np.int64(3),
        horizon=np.int32(4),
        stats_window_size=np.int64(5),
        learn_inner_lr=np.bool_(True),
        dynamics_kwargs=dict(net_arch=[np.int64(8)], weight_decay=np.float64(1e-4), max_epochs=np.int64(2)),
        policy_kwargs=dict(net_arch=[np.int64(8)], log_std_init=np.float64(-0.5)),
    ).learn(20)
    model.save(tmp_path / "model")
    model.dynamics.optimizer.param_groups[0]["lr"] = np.float64(0.5)
    model.save(tmp_path / "changed")
    for name in ("model", "changed"):
        loaded = MBMPO.load(tmp_path / name)
        assert_same(parameters(loaded), parameters(model))
        assert (type(loaded.seed), type(loaded.inner_lr), loaded.learn_inner_lr) == (int, float, True)
        assert loaded.dynamics.weight_decay == 1e-4
    model.policy.save(tmp_path / "policy")
    MlpPolicy.load(tmp_path / "policy")
    numbers = dict(
        learning_rate=np.float64(1e-3), weight_decay=np.float32(0.1), net_arch=np.array([3, 4]), n_models=np.int8(2)
    )
    flags = dict.fromkeys(("weight_norm", "probabilistic", "learned_reward", "learned_termination"), np.bool_(True))
    ensemble = DynamicsEnsemble(Drift().observation_space, Drift().action_space, **numbers, **flags, seed=np.int64(0))
    ensemble.optimizer.param_groups[0]["lr"] = np.float64(0.5)
    ensemble.save(tmp_path / "ensemble")
    loaded = DynamicsEnsemble.load(tmp_path / "ensemble")
    assert_same(loaded.state_dict(), ensemble.state_dict())
    assert loaded.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["reward_fn", "termination_fn", "learning_rate", "mine"])
def test_what_cannot_be_pickled_costs_no_model(name, tmp_path):
    lock = threading.Lock()
    functions = {
        "reward_fn": lambda obs, action, next_obs: -next_obs.square().sum(1) * (not lock.locked()),
        "termination_fn": lambda next_obs: next_obs.abs().amax(1) > 2 + lock.locked(),
        "learning_rate": lambda progress: 1e-3 * (not lock.locked()),
    }
    given = {name: functions[name]} if name in functions else {}
    model = tiny_model(**given).learn(20)
    model.mine = lock if name == "mine" else None
    with pytest.warns(UserWarning, match=rf"the_model lacks \['{name}'.*cannot pickle.*to `load` again"):
        model.save(tmp_path / "the_model")
    loaded = MBMPO.load(tmp_path / "the_model", env=Drift(), **given)
    assert_same(parameters(loaded), parameters(model))
    loaded.learn(20)
    model.save(tmp_path / "excluded", exclude=[name, "lr_schedule"])


def test_numbers_of_numpy_in_other_dictionaries_are_converted_too(tmp_path):
    dynamics_kwargs = OrderedDict(net_arch=(np.int64(8),), probabilistic=np.bool_(False), max_epochs=np.int64(2))
    policy_kwargs = OrderedDict(net_arch=[8], optimizer_kwargs=OrderedDict(eps=np.float64(1e-5)))
    model = tiny_model(dynamics_kwargs=dynamics_kwargs, policy_kwargs=policy_kwargs).learn(20)
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model")
    assert_same(parameters(loaded), parameters(model))
    assert type(loaded.policy.optimizer.defaults["eps"]) is float
    state = model.policy.state_dict()
    assert plain(state) is state


def test_a_seed_begins_new_random_numbers_and_none_goes_on(model, tmp_path):
    model.save(tmp_path / "model")

    def trained(**kwargs):
        loaded = MBMPO.load(tmp_path / "model", env=DummyVecEnv([lambda: Drift(random_start=False)]), **kwargs)
        return parameters(loaded.learn(20))

    one, again, as_object, two, goes_on, none = (
        trained(**kwargs)
        for kwargs in ({"seed": 1}, {"seed": 1}, {"custom_objects": {"seed": 1}}, {"seed": 2}, {}, {"seed": None})
    )
    assert_same(one, again)
    assert_same(one, as_object)
    assert_same(goes_on, none)
    for other in (two, goes_on):
        assert not th.equal(one["policy.action_net.weight"], other["policy.action_net.weight"])


@pytest.mark.parametrize("how", [dict(learn_inner_lr=False), dict(custom_objects=dict(learn_inner_lr=False))], ids=str)
def test_step_sizes_that_were_learned_can_be_left_behind(how, model, tmp_path):
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model", env=Drift(), inner_lr=0.2, **how)
    assert loaded.learned_inner_lr is None
    loaded.learn(20).save(tmp_path / "fixed")
    learns = MBMPO.load(tmp_path / "fixed", env=Drift(), learn_inner_lr=True)
    assert th.equal(learns.learned_inner_lr, th.full_like(learns.learned_inner_lr, 0.2))
    learns.learn(20)


@pytest.mark.parametrize("content", [b"", b"no policy", "half", "model"])
def test_what_is_no_policy_is_named_with_what_to_do(content, model, tmp_path):
    path = tmp_path / "the_policy"
    model.policy.save(path)
    if content == "model":
        model.save(path)
        path.with_suffix(".zip").replace(path)
    else:
        path.write_bytes(path.read_bytes()[:5000] if content == "half" else content)
    with pytest.raises(ValueError, match=r"the_policy holds no policy .*take an earlier copy"):
        MlpPolicy.load(path)


@pytest.mark.parametrize("env", [None, Drift()])
@pytest.mark.parametrize(
    "changed",
    [dict(n_models=1), dict(n_models=1, n_tasks=1), dict(dynamics_kwargs=dict(net_arch=[9])), dict(dynamics_kwargs={})],
)
def test_arguments_that_the_file_does_not_fit_are_named(changed, env, model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model does not fit the arguments .*{next(iter(changed))}"):
        MBMPO.load(tmp_path / "model", env, **changed)


def test_a_file_that_does_not_fit_the_model_is_named(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model does not fit this model: .*\n.*size mismatch"):
        tiny_model(policy_kwargs=dict(net_arch=[9])).set_parameters(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "meant"), [("horzion", "'horizon'"), ("n_meta_step", "'n_meta_steps'"), ("custom_object", ""), ("_xyz", "")]
)
def test_names_that_mean_nothing_are_refused(name, meant, model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(TypeError, match=rf"load\(\) has no argument '{name}'.*{meant}"):
        MBMPO.load(tmp_path / "model", **{name: 3})
    # SB3 and rl_zoo3 pass these to any algorithm
    kwargs = dict(horizon=3, learning_rate=1e-4, action_noise=None, n_envs=1, tensorboard_log=None)
    loaded = MBMPO.load(tmp_path / "model", custom_objects=dict(lr_schedule=lambda _: 0.0, clip_range=0.1), **kwargs)
    assert loaded.horizon == 3


def test_going_on_without_the_real_steps_is_warned_of(model, tmp_path):
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = MBMPO.load(tmp_path / "model", env=Drift())
    with pytest.warns(UserWarning, match="replay buffer is empty.*load_replay_buffer"):
        loaded.learn(20, reset_num_timesteps=False)
    loaded = MBMPO.load(tmp_path / "model", env=Drift())
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(20, reset_num_timesteps=False)


class SaveBetween(BaseCallback):
    """A callback that saves the model between two iterations."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def _on_rollout_start(self):
        self.model.save(self.path)

    def _on_step(self):
        return True


def test_what_a_callback_saves_when_a_rollout_starts_is_the_state_between_two_iterations(tmp_path):
    model = tiny_model(n_tasks=4).learn(40)
    turn, acting = model._task_turn, model._acting_tasks.copy()
    model.learn(20, callback=SaveBetween(tmp_path / "between"), reset_num_timesteps=False)
    between = MBMPO.load(tmp_path / "between")
    assert (between.num_timesteps, between._task_turn) == (40, turn)
    np.testing.assert_array_equal(between._acting_tasks, acting)
    assert model._task_turn != turn


# -- Repetition -------------------------------------------------------------------------------------------------------------


def test_iterations_adaptations_and_saves_leave_nothing_behind(tmp_path):
    model = tiny_model(vec_drift(random_start=False), stats_window_size=2).learn(60)

    def everything(n_times):
        """Do everything ``n_times``, and return the bytes of traced Python objects and the number of tensors."""
        for _ in range(n_times):
            model.learn(20, reset_num_timesteps=False)
            model.adapt(model_index=1)
            model.save(tmp_path / "model")
            model.save_replay_buffer(tmp_path / "buffer")
            model.dynamics.save(tmp_path / "ensemble")
        gc.collect()
        # These grow by design: by a row per episode, and by a sample of the buffer
        model._initial_obs, model._start_sample = model._initial_obs[:2], model._start_sample[:2]
        return tracemalloc.get_traced_memory()[0], sum(issubclass(type(each), th.Tensor) for each in gc.get_objects())

    everything(1)  # before tracing, which would slow down imports at first use
    tracemalloc.start()
    try:
        everything(1)
        size, tensors = everything(2)
        size_later, tensors_later = everything(6)
    finally:
        tracemalloc.stop()
    assert tensors_later == tensors
    # For an iteration, an adaptation and three saves; the smallest possible leak, a copy of the policy, is larger
    assert (size_later - size) / 6 < 5 * 1024, "bytes that each repetition leaks"
