"""The format of this package's files: SB3's zip archives, stamped with a version and sealed with a checksum."""

import hashlib
import io
import json
import operator
import pathlib
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np

import sb3_mbmpo
from sb3_mbmpo.common.atomic import whole_file

Path = str | pathlib.Path | io.BufferedIOBase

# Increased with every change after which older files no longer load; the changelog says why
FILE_FORMAT = 4
# The remedy for a damaged file
TAKE_A_COPY = "It was damaged after it was written, or is incomplete: take an earlier copy."

# The comment at the end of a zip archive, which SB3 and other tools ignore
_SEAL = b"sha256:"
_SEAL_LENGTH = len(_SEAL) + 2 * hashlib.sha256().digest_size


def file_stamp(kind: str) -> dict[str, Any]:
    """
    Return the attributes that tell what a file holds and which version wrote it.

    :param kind: what the file holds
    :return: attributes to save in the file
    """
    return {"file_kind": kind, "file_format": FILE_FORMAT, "package_version": sb3_mbmpo.__version__}


def file_name(path: object) -> str:
    """Return the name of a path or an open file for messages."""
    return str(path) if isinstance(path, (str, pathlib.Path)) else str(getattr(path, "name", "the open file"))


def plain(value: Any) -> Any:
    """
    Convert NumPy's numbers in nested containers to Python's, because PyTorch refuses to load NumPy's from a file.

    :param value: a number, or nested dictionaries, lists and tuples
    :return: the same structure with Python's numbers
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        items = {plain(key): plain(item) for key, item in value.items()}
        # PyTorch's state dictionaries carry more than their items, so they are returned as they are
        unchanged = all(map(operator.is_, items.values(), value.values()))
        return value if unchanged and type(value) is not dict else items
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


# ---------------------------------------------------------------- where files are


def existing_file(path: Path, suffix: str) -> Path:
    """
    Find the file that a name stands for.

    :param path: a file name, with or without its suffix, or an open file
    :param suffix: without the dot
    :return: the path with the suffix if only that is a file, even if a folder has the name without it; else ``path``
    """
    if not isinstance(path, (str, pathlib.Path)):
        return path
    given, with_suffix = pathlib.Path(path), pathlib.Path(f"{path}.{suffix}")
    return given if given.is_file() or not with_suffix.is_file() else with_suffix


@contextmanager
def opened(path: Path, suffix: str) -> Iterator[BinaryIO]:
    """
    Open a file for reading; if it was open already, its position is restored afterwards.

    :param path: a file name, with or without its suffix, or an open file
    :param suffix: without the dot
    :return: a context manager that gives the file
    """
    found = existing_file(path, suffix)
    if isinstance(found, (str, pathlib.Path)):
        with open(found, "rb") as file:
            yield file
        return
    start = found.tell()
    try:
        yield cast(BinaryIO, found)
    finally:
        found.seek(start)


@contextmanager
def output(path: Path, suffix: str) -> Iterator[BinaryIO]:
    """
    Open a file for writing where SB3 would save.

    As in SB3, a missing suffix is appended, a missing folder is created, and "_2" is appended to the name of a folder.

    :param path: a file name, to which the suffix is appended if it has none, or an open file
    :param suffix: without the dot
    :return: a context manager that gives the file. The old file stays until the new one is complete
    """
    if not isinstance(path, (str, pathlib.Path)):
        yield cast(BinaryIO, path)
        return
    target = pathlib.Path(path)
    if target.suffix == "":
        target = pathlib.Path(f"{target}.{suffix}")
    if target.is_dir():
        warnings.warn(f"Path '{target}' is a folder. Will save instead to {target}_2")
        target = pathlib.Path(f"{target}_2")
    if not target.parent.exists():
        warnings.warn(f"Path '{target.parent}' does not exist. Will create it.")
        target.parent.mkdir(exist_ok=True, parents=True)
    with whole_file(target) as file:
        yield file


# ---------------------------------------------------------------- zip archives


def sealed(archive: bytes) -> bytes:
    """
    Add a checksum to a zip archive.

    :param archive: a zip archive without a comment
    :return: the same archive, with its checksum as the comment
    """
    assert archive.endswith(b"\0\0")  # the length of its comment
    seal = _SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


def _is_intact(content: bytes) -> bool:
    """Tell whether a file matches its checksum; True for a file without one, which another program has written."""
    if not content[-_SEAL_LENGTH:].startswith(_SEAL):
        return True
    return sealed(content[: -_SEAL_LENGTH - 2] + b"\0\0") == content


def read_sealed(path: Path) -> bytes:
    """
    Read a file and verify its checksum, if it has one.

    :param path: an existing file, or an open one
    :return: its whole content
    :raises ValueError: if the content does not match the checksum
    """
    with opened(path, "zip") as file:
        content = file.read()
    if not _is_intact(content):
        raise ValueError(f"{file_name(path)} does not match its checksum. {TAKE_A_COPY}")
    return content


def check_file(path: Path, kind: str) -> dict[str, Any]:
    """
    Check that this version can read a file, before anything is unpickled.

    The objects in a file of another format may be of classes that no longer exist.

    :param path: a zip file of SB3's
    :param kind: what it should hold
    :return: its attributes as JSON has them, nothing unpickled
    :raises ValueError: if this version cannot read the file
    """
    name = file_name(path)
    content = read_sealed(path)
    if not content.startswith(b"PK") and b"PK\5\6" not in content[-_SEAL_LENGTH - 22 :]:
        raise ValueError(f"{name} is not a zip file, so it holds no {kind}. {TAKE_A_COPY}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
            data = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    except Exception as error:
        raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error}). {TAKE_A_COPY}") from error
    if damaged is not None:
        raise ValueError(f"{name} cannot be read: its entry {damaged!r} is damaged. {TAKE_A_COPY}")
    if not isinstance(data, dict) or data.get("file_kind") != kind:
        raise ValueError(f"{name} holds no {kind} of sb3_mbmpo: load it with the class that saved it.")
    if data.get("file_format") != FILE_FORMAT:
        raise ValueError(
            f"{name} was saved by sb3_mbmpo {data.get('package_version')} in file format {data.get('file_format')}; "
            f"version {sb3_mbmpo.__version__} reads format {FILE_FORMAT}: load it with the version that saved it."
        )
    return data


def read_npz(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """
    Read arrays without unpickling, so that a data file cannot run code.

    :param path: a file that ``numpy.savez`` wrote
    :return: its arrays by name
    :raises ValueError: if it is another kind of file, or damaged
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not a file written by `numpy.savez`: write the arrays with it.")
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}). {TAKE_A_COPY}") from error
    if damaged is not None:
        raise ValueError(f"{path} cannot be read: its entry {damaged!r} is damaged. {TAKE_A_COPY}")
    return arrays
