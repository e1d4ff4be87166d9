"""Atomic file writes: the content goes to a temporary file in the same folder, which replaces the old file once complete.

A process that is killed while writing leaves the old file as it was, and a temporary file ("part") whose name begins with a
dot. The next process that writes the same file removes the part.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: abandoned parts are not removed
    fcntl = None  # type: ignore[assignment]

# Bytes of a file's name up to which the name of its part contains it
MAX_NAME = 200


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """
    Open a file that appears at ``path``, synced to disk, only if the block ends without an error.

    :param path: the file to write, in a folder that exists. If it is a link, the target is replaced, not the link
    :return: a context manager that gives the file to write to
    :raises OSError: if the file cannot be written; the old file is left as it was
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # a device or a pipe cannot be replaced, and a folder must not be replaced
        with target.open("wb") as device:
            yield device
        return
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{path} is write-protected, so it is not replaced: allow writing to it, or use another path.")
    remove_abandoned_parts(target)
    part, file = _new_part(target)
    try:
        with _kept_alive(file):  # locked until the rename: without a lock, a complete part would be taken for abandoned
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
    Write a whole file, or nothing.

    :param path: the file to write, in a folder that exists
    :param content: the whole content; text is encoded as UTF-8
    :raises OSError: if the file cannot be written; the old file is left as it was
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_abandoned_parts(target: Path) -> None:
    """Remove the parts of ``target`` that killed processes left behind; a living process holds a lock on its part."""
    if fcntl is None:
        return
    for part in target.parent.glob(f".{_escaped(_short_name(target))}.*.part"):
        # An OSError means: already gone, in use, or on a file system without locks
        with suppress(OSError), part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _short_name(target: Path) -> str:
    """Return the name of a file, shortened if that of its part would be longer than the 255 bytes that systems allow."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= MAX_NAME else f"{target.name[:40]}-{hashlib.sha256(name).hexdigest()[:16]}"


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _new_part(target: Path) -> tuple[Path, BinaryIO]:
    """Create and lock a new file beside ``target``, with the permissions that ``target`` has or would get."""
    while True:
        part = target.with_name(f".{_short_name(target)}.{secrets.token_hex(4)}.part")
        file = part.open("xb")
        try:
            if target.exists():
                os.chmod(part, target.stat().st_mode & 0o7777)
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks, on which no parts are removed
                    fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            part.unlink(missing_ok=True)
            raise
        if part.exists():
            return part, file
        file.close()  # another process took it for abandoned in the moment before it was locked


@contextmanager
def _kept_alive(file: BinaryIO) -> Iterator[None]:
    """Keep the lock after ``file`` is closed. It is closed before the rename because Windows renames closed files only."""
    if fcntl is None:
        yield
        return
    descriptor = os.dup(file.fileno())
    try:
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that the new name survives a power failure, too; some systems, such as Windows, cannot do this."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
