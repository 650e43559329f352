"""Files that appear whole or not at all: written beside their names, flushed to disk, renamed."""

import contextlib
import errno
import hashlib
import os
import shutil
import socket
from pathlib import Path

from safetensors import SafetensorError

TEMPORARY = ".tmp-"  # how the names of unfinished files and folders begin
# A process id is of one machine, or container.
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


class OutputError(Exception):
    """A file could not be written."""

    exit_code = 1


def file_sha256(path):
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def output_errors(path):
    """Turn the errors of a full or read-only disk into an `OutputError` that names the path."""
    try:
        yield
    except BrokenPipeError:  # of standard output: nobody reads on
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        free = ""
        with contextlib.suppress(OSError):
            place = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
            free = f" ({shutil.disk_usage(place).free:,} bytes free)"
        raise OutputError(f"{path}: not written: {reason}{free}") from error


def flush_to_disk(path):
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):  # as of some mounted folders
            raise
    finally:
        os.close(descriptor)


def remove(places):
    """Remove files and folders. A folder is renamed first, and is never seen half removed."""
    for place in list(places):
        if place.is_symlink() or not place.is_dir():
            place.unlink(missing_ok=True)
            continue
        if not place.name.startswith(TEMPORARY):
            doomed = place.with_name(f"{TEMPORARY}{place.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            place = place.rename(doomed)
        shutil.rmtree(place, ignore_errors=True)


def temporary_path(target):
    """Where the file or folder `target` is written before it gets its name."""
    return target.with_name(f"{TEMPORARY}{os.getpid()}-{HOST}-{target.name}")


def _remove_leftovers(folder):
    """Remove what processes of this machine that no longer run left unfinished."""
    for path in folder.glob(f"{TEMPORARY}[0-9]*-{HOST}-*"):
        with contextlib.suppress(ValueError, OSError):  # not ours to remove, or just removed
            try:
                os.kill(int(path.name.split("-")[1]), 0)  # signal 0 only asks whether it runs
            except ProcessLookupError:
                remove([path])


@contextlib.contextmanager
def open_whole(path):
    """A text file to write to, which appears at `path` once it is complete."""
    target = Path(path).parent.resolve() / Path(path).name
    temporary = temporary_path(target)
    try:
        with output_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir() and not target.is_symlink():  # else the renaming would fail
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _remove_leftovers(target.parent)
            file = open(temporary, "w", encoding="utf-8", newline="")  # noqa: SIM115
        try:
            yield file
        finally:
            with output_errors(path):
                file.close()
        with output_errors(path):
            flush_to_disk(temporary)
            os.replace(temporary, target)
            flush_to_disk(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path, text):
    """Write a text file; an earlier file of that name stays until the new one is complete."""
    write_files({path: text})


def write_files(texts):
    """Write text files, a dict from path to text. All are written before the first is renamed.

    So a full disk leaves every earlier file as it was. If two paths are the same file, the last
    counts. Raises `OutputError`.
    """
    texts = {Path(path).parent.resolve() / Path(path).name: (path, texts[path]) for path in texts}
    with contextlib.ExitStack() as unfinished:
        for path, text in texts.values():
            file = unfinished.enter_context(open_whole(path))
            with output_errors(path):
                file.write(text)
                file.close()
                flush_to_disk(Path(file.name))
