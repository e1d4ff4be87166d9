"""The kinds of files: how each is written, read and changed."""

import io
import json
import zipfile

import torch as th
from tiny import tiny_model

from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.report.run_log import RunLogFile

WRITERS = {
    "model": lambda model, path: model.save(path),
    "ensemble": lambda model, path: model.dynamics.save(path),
    "policy": lambda model, path: model.policy.save(path),
    "buffer": lambda model, path: model.save_replay_buffer(path),
    "page": lambda model, path: write_whole(path, "x" * 10_000),
    "log": lambda model, path: RunLogFile(path).write({"key": "x" * 10_000}, {"key": ()}),
}


def loaded_buffer(path):
    model = tiny_model(buffer_size=64)
    model.load_replay_buffer(path)
    return model.replay_buffer


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
