"""The format of this package's files: SB3's zip archives, stamped with a version."""

import io
import json
import pathlib
import zipfile
from typing import Any

from stable_baselines3.common.save_util import open_path

import sb3_mbmpo

Path = str | pathlib.Path | io.BufferedIOBase

# Raised with every change after which files of earlier versions no longer load; the changelog says why
FILE_FORMAT = 1


def file_stamp(kind: str) -> dict[str, Any]:
    """
    :param kind: what the file holds
    :return: what every file says of itself
    """
    return {"file_kind": kind, "file_format": FILE_FORMAT, "package_version": sb3_mbmpo.__version__}


def check_file(path: Path, kind: str) -> None:
    """
    Before anything is unpickled: the objects of another format may not even have their classes any more.

    :param path: a zip file of SB3's
    :param kind: what it should hold
    :raises ValueError: if this version cannot read it
    """
    file = open_path(path, "r", suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a zip file, so it holds no {kind}.") from error
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()
        else:
            file.seek(start)
    if data.get("file_kind") != kind:
        raise ValueError(f"{path} holds no {kind} of sb3_mbmpo: load it with the class that saved it.")
    if data.get("file_format") != FILE_FORMAT:
        raise ValueError(
            f"{path} was saved by sb3_mbmpo {data.get('package_version')} in file format {data.get('file_format')}; "
            f"version {sb3_mbmpo.__version__} reads format {FILE_FORMAT}: load it with the version that saved it."
        )
