"""The format of this package's files: SB3's zip archives, stamped with a version and sealed with a checksum."""

import hashlib
import io
import json
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

# Raised with every change after which files of earlier versions no longer load; the changelog says why
FILE_FORMAT = 4
# What to do about a file that is not as it was written
TAKE_A_COPY = "It was damaged after it was written, or is incomplete: take an earlier copy of it."

# The comment at the end of a zip archive: SB3 and all tools pass over it
_SEAL = b"sha256:"
_SEAL_LENGTH = len(_SEAL) + 2 * hashlib.sha256().digest_size


def file_stamp(kind: str) -> dict[str, Any]:
    """
    Say what a file is and which version wrote it.

    :param kind: what the file holds
    :return: what every file says of itself
    """
    return {"file_kind": kind, "file_format": FILE_FORMAT, "package_version": sb3_mbmpo.__version__}


def file_name(path: object) -> str:
    """Return what to call a path or an open file in a message."""
    return str(path) if isinstance(path, (str, pathlib.Path)) else str(getattr(path, "name", "the open file"))


def plain(value: Any) -> Any:
    """
    Replace NumPy's numbers in nested containers.

    :param value: a number, or any nest of dictionaries, lists and tuples
    :return: the same with Python's numbers for NumPy's, which PyTorch refuses to load from a file
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


# ---------------------------------------------------------------- where files are


def existing_file(path: Path, suffix: str) -> Path:
    """
    Find the file that a name means.

    :param path: a file name, with or without its suffix, or an open file
    :param suffix: without the dot
    :return: the file that is meant, also where a folder has the name without the suffix
    """
    if not isinstance(path, (str, pathlib.Path)):
        return path
    given, with_suffix = pathlib.Path(path), pathlib.Path(f"{path}.{suffix}")
    return given if given.is_file() or not with_suffix.is_file() else with_suffix


@contextmanager
def opened(path: Path, suffix: str) -> Iterator[BinaryIO]:
    """
    Open a file to read it. An open one is where it was afterwards.

    :param path: a file name, with or without its suffix, or an open file
    :param suffix: without the dot
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
    Where SB3 would save: with a suffix, in a folder that is made, and beside a folder of that very name.

    :param path: a file name, to which the suffix is appended if it has none, or an open file
    :param suffix: without the dot
    :return: a context that gives the file to write to. A name has the whole file once the context has ended, or the old one
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
    Add a checksum to an archive.

    :param archive: a zip archive without a comment
    :return: the archive whose comment is the checksum of all of it
    """
    assert archive.endswith(b"\0\0")  # the length of its comment
    seal = _SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


def _is_intact(content: bytes) -> bool:
    """Tell whether a file is as it was sealed; True for one without a seal, which another program has written."""
    if not content[-_SEAL_LENGTH:].startswith(_SEAL):
        return True
    return sealed(content[: -_SEAL_LENGTH - 2] + b"\0\0") == content


def read_sealed(path: Path) -> bytes:
    """
    :param path: of an existing file, or an open one
    :return: all of it
    :raises ValueError: if it has a checksum that says otherwise
    """
    with opened(path, "zip") as file:
        content = file.read()
    if not _is_intact(content):
        raise ValueError(f"{file_name(path)} is not what its checksum says. {TAKE_A_COPY}")
    return content


def check_file(path: Path, kind: str) -> dict[str, Any]:
    """
    Before anything is unpickled: the objects of another format may not even have their classes any more.

    :param path: a zip file of SB3's
    :param kind: what it should hold
    :return: its attributes as JSON has them: nothing in them has been unpickled
    :raises ValueError: if this version cannot read it
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
        raise ValueError(f"{name} cannot be read: its part {damaged!r} is damaged. {TAKE_A_COPY}")
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
    Read arrays without unpickling: a data file shall not be able to run code.

    :param path: of a file that ``numpy.savez`` wrote
    :return: its arrays by name
    :raises ValueError: if it is another kind of file, or damaged
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not a file that `numpy.savez` wrote.")
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}). {TAKE_A_COPY}") from error
    if damaged is not None:
        raise ValueError(f"{path} cannot be read: its part {damaged!r} is damaged. {TAKE_A_COPY}")
    return arrays
