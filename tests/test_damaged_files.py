"""Files that are damaged, or hold something else, are named, with what to do."""

import json
import zipfile

import numpy as np
import pytest
import torch as th
from file_kinds import WRITERS, loaded_buffer, rewritten, tensors_of
from tiny import parameters

from sb3_mbmpo import MBMPO, DynamicsEnsemble, MlpPolicy
from sb3_mbmpo.common.save_util import FILE_FORMAT
from sb3_mbmpo.offline import load_transitions
from sb3_mbmpo.report.run_log import read_evaluations
from sb3_mbmpo.zoo import read_config

READERS = {
    "model": lambda path: parameters(MBMPO.load(path)),
    "ensemble": lambda path: DynamicsEnsemble.load(path).state_dict(),
    "policy": lambda path: MlpPolicy.load(path).state_dict(),
    "buffer": lambda path: vars(loaded_buffer(path)),
    "transitions": lambda path: load_transitions(path).transitions._asdict(),
    "evaluations": lambda path: dict(enumerate(read_evaluations(path))),
}


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
        (dict(timesteps=np.ones((2, 1)), results=np.ones((2, 3))), r"\(2, 1\) and `results` \(2, 3\)"),
        (dict(timesteps=np.arange(2), results=np.array([["a"], ["b"]])), "of int64 and `results` of <U1: no numbers"),
    ],
)
def test_evaluations_that_make_no_sense_are_named(arrays, named, tmp_path):
    np.savez(tmp_path / "evaluations.npz", **arrays)
    with pytest.raises(ValueError, match=rf"evaluations\.npz.*{named}"):
        read_evaluations(tmp_path / "evaluations.npz")


def test_a_damaged_configuration_is_named(tmp_path, monkeypatch):
    path = tmp_path / "mbmpo.yml"
    monkeypatch.setattr("sb3_mbmpo.zoo.config.config_file", lambda: path)
    for content in (b"a: [1", b"\xff", b"- list", b"Pendulum-v1: 3"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mbmpo\.yml"):
            read_config("Pendulum-v1")


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
