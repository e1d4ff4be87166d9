"""Files that are whole or not there: what is written goes to a new file beside the old one, which it replaces when it is done.

A process that is killed on the way leaves the old file as it was, and a part whose name begins with a dot; the next one that
writes the same file removes it.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: parts that were left behind stay
    fcntl = None  # type: ignore[assignment]


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """
    Write a file that appears at ``path`` only when the block has ended without an error, and is on the disk then.

    :param path: of the file; its folder exists. What it links to is replaced, not the link
    :return: a context that gives the file to write to
    :raises OSError: if it cannot be written; what was there before is as it was
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # a device or a pipe cannot be replaced, and a folder must not be
        with target.open("wb") as device:
            yield device
        return
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{path} is write-protected: it is not replaced.")
    remove_abandoned_parts(target)
    part, file = _new_part(target)
    try:
        with _kept_alive(file):  # to the rename: a part that is complete but nobody's would be taken for abandoned
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        _sync_folder(target.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}: not written, what was there before is as it was", str(path)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, content: bytes | str) -> None:
    """
    Write a file whole or not at all.

    :param path: of the file; its folder exists
    :param content: all of it; text is encoded in UTF-8
    :raises OSError: if it cannot be written; what was there before is as it was
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_abandoned_parts(target: Path) -> None:
    """Remove what killed processes left of ``target``: a process that lives holds a lock on its part."""
    if fcntl is None:
        return
    for part in target.parent.glob(f".{_escaped(target.name)}.*.part"):
        # Gone by now, or in use, or on a disk that knows no locks
        with suppress(OSError), part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _new_part(target: Path) -> tuple[Path, BinaryIO]:
    """Return a new file beside ``target``, locked, with the permissions that ``target`` has or would get."""
    while True:
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        file = part.open("xb")
        try:
            if target.exists():
                os.chmod(part, target.stat().st_mode & 0o7777)
            if fcntl is not None:
                with suppress(OSError):  # a disk that knows no locks; nobody removes parts there
                    fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            part.unlink(missing_ok=True)
            raise
        if part.exists():
            return part, file
        file.close()  # taken for abandoned in the moment before it was locked


@contextmanager
def _kept_alive(file: BinaryIO) -> Iterator[None]:
    """Keep the lock when ``file`` is closed: Windows renames closed files only, and has no such locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.dup(file.fileno())
    try:
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """The name, too, shall survive a power failure; some systems cannot promise it, such as Windows."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
