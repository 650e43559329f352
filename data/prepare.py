"""Download the course's data files, and check every byte of them.

    python data/prepare.py                  # the 2024 files, about 70 MB, into data/
    python data/prepare.py --quora small    # the small Quora split instead: 20,212 pairs

Each file is known by its git blob id (the SHA-1 of ``blob <size>\\0<content>``), so a file that
lies here under its final name is the course's file and nothing else. A download goes to
``<name>.part``; a broken one is continued where it stopped. Standard library only, so this runs
before anything is installed.

Exit codes: 0 done; 1 network, server or disk; 2 wrong argument, or another file is in the way;
130 interrupted.
"""

import argparse
import csv
import difflib
import hashlib
import http.client
import io
import math
import os
import random
import shlex
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHUNK_BYTES = 1 << 16
LONGEST_WAIT = 20.0  # seconds between two attempts

# ----------------------------------------------------------------------------------------------
# What the course publishes

# Both years ship the same files for these three tasks.
COMMON_BLOBS = {
    "ids-sst-train.csv": "9cb7333cb1dae49c2bd2a4b56a24882a6e8704b5",
    "ids-sst-dev.csv": "3171aa629a340809d2db4a50df8f6e5ec9420ab0",
    "ids-sst-test-student.csv": "bbd2313758825f86e24416d6aad64cd93370cf7a",
    "sts-train.csv": "12b17760e7795fee35aeeabc290d5651de02622a",
    "sts-dev.csv": "9392860e584717976b8d817cc40c9e6ceeec27e0",
    "sts-test-student.csv": "25f0cf8fafdd1f82b9e2bb460c708af34341ce60",
    "ids-cfimdb-train.csv": "cd57bcbd2f7214ea6dd1783d3e885d324b1f478d",
    "ids-cfimdb-dev.csv": "8a0f5dcf3d40189b96c801a12cd79bf8003e61de",
    "ids-cfimdb-test-student.csv": "1e789c709b3ca0511f027a309b6d8bd21cde41b2",
}
SPLITS = ("train", "dev", "test-student")


@dataclass(frozen=True)
class Course:
    """One year's public repository: where it is, and the git blob id of each data file."""

    repository: str
    commit: str
    blobs: dict[str, str]


COURSES = {
    2024: Course(
        "amahankali10/CS224N-Spring2024-DFP-Student-Handout",
        "3f64c60c8a0e40a9fe581235b08f4607ff187077",
        COMMON_BLOBS
        | {
            "quora-train.csv": "1f2e73b884113e629e2786001fb9cc8ae4a696c1",
            "quora-dev.csv": "97f9430a53b7f5544f857ff27a236c40bb42b5c7",
            "quora-test-student.csv": "a1b1e5ba3ef282ba1e9b169c509eb80dbbc68666",
        },
    ),
    2023: Course(
        "gpoesia/minbert-default-final-project",
        "7ac8260577fc12a86c7aaf38918056c30054ef39",
        COMMON_BLOBS
        | {
            "quora-train.csv": "a3b5546f6a0e65b60a328a5d294d1038f5bed1da",
            "quora-dev.csv": "de7cfa32428fd470b93f778fccc45a619e01336f",
            "quora-test-student.csv": "f257ef00558555afb50819578a58205732b16354",
        },
    ),
}

# `--quora small` deals the 2023 dev file anew. Its source is kept under a name of its own.
SMALL_SOURCE = "quora-dev-2023.csv"
SMALL_SEED = 224
SMALL_HELD_OUT = 2106  # pairs, in dev and again in test
SMALL_BLOBS = {
    "quora-train.csv": "fb46c3f82a3408ff84f4be9bbe3e9d0db8bf0511",
    "quora-dev.csv": "c8af83c24faa9386b799e87ded0394290b78e749",
    "quora-test-student.csv": "5c958771dfb95e76b22f15e8ddb8d0a672e178bb",
}


@dataclass(frozen=True)
class DataFile:
    """A file to have: its name here, its path below the server's root, its git blob id."""

    name: str
    remote: str
    blob: str


def plan(year: int, quora: str, courses: dict[int, Course]) -> list[DataFile]:
    """The files to download for one year, and for one choice of Quora split."""

    def data_file(name: str, course: Course, remote_name: str) -> DataFile:
        remote = f"{course.repository}/{course.commit}/data/{remote_name}"
        return DataFile(name, remote, course.blobs[remote_name])

    course = courses[year]
    names = [n for n in course.blobs if quora == "full" or not n.startswith("quora-")]
    files = [data_file(name, course, name) for name in names]
    if quora == "small":
        files.append(data_file(SMALL_SOURCE, courses[2023], "quora-dev.csv"))
    return files


# ----------------------------------------------------------------------------------------------
# Errors: each is one line for the user, with what to do


class PrepareError(Exception):
    """Something the user must know; `code` is the process's exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class BrokenDownload(Exception):
    """A download that broke and may be tried again."""


# ----------------------------------------------------------------------------------------------
# Checking


def blob_id(path: Path) -> str:
    """The git blob id (40 hex digits) of a file's content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_content(path: Path) -> str:
    """What a file that is not the expected one looks like, for the error message."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"it is a web page, not data ({size:,} bytes): a proxy's or a login page?"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-LFS pointer, not the data itself"
    return f"it has {size:,} bytes of other content"


def count_rows(path: Path) -> int:
    """Rows of a tab-separated file as the csv reader sees them, without the header."""
    with open(path, encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.reader(file, delimiter="\t")) - 1


def is_in_place(path: Path, blob: str, overwrite: bool) -> bool:
    """Whether the right file is there already; another file in its place is an error."""
    if not path.exists():
        return False
    if path.is_dir():
        raise PrepareError(f"{path}: is a folder; expected a file: move it away", code=2)
    found = blob_id(path)
    if found == blob:
        return True
    if overwrite:
        return False
    raise PrepareError(
        f"{path}: is not the file asked for ({describe_content(path)}); expected git blob"
        f" {blob}, found {found}: move it away, or replace it with --overwrite",
        code=2,
    )


# ----------------------------------------------------------------------------------------------
# Downloading

# What a network can do in the middle of a download. A full disk is a plain OSError, not in here.
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    BrokenDownload,
)


def open_url(url: str, offset: int, timeout: float):
    """Ask for `url` from byte `offset` on; the response, or an error worth its message."""
    request = urllib.request.Request(url)
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:  # closes the connection
            if error.code >= 500 or error.code in (408, 416, 429):
                raise
            raise PrepareError(
                f"{url}: the server answered {error.code} {error.reason}: check --base_url"
            ) from None


def starts_at(response, offset: int) -> bool:
    """Whether the answer really is the rest of the file from byte `offset` on."""
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {offset}-")


def copy_body(response, part: Path, mode: str) -> None:
    """Append (`ab`) or write (`wb`) the body to the part; too short a body is an error."""
    length = response.headers.get("Content-Length")
    missing = int(length) if length else math.inf
    # read1 returns what there is and flush hands it on: all that arrived survives a SIGKILL.
    with open(part, mode) as file:
        while missing and (chunk := response.read1(int(min(CHUNK_BYTES, missing)))):
            file.write(chunk)
            file.flush()
            missing -= len(chunk)
            show_progress(part.stem, file.tell())
    # http.client ends a sized read silently when the peer closes early.
    if length and missing:
        raise BrokenDownload(f"connection closed with {missing:,} bytes missing")


def show_progress(name: str, received: int) -> None:
    """A moving line on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{name}: {received / 2**20:7.1f} MiB \r", end="", file=sys.stderr, flush=True)


def continue_part(url: str, part: Path, timeout: float) -> bool:
    """One attempt at the rest of the part; returns whether earlier bytes were kept."""
    offset = part.stat().st_size if part.exists() else 0
    try:
        response = open_url(url, offset, timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:
            raise
        # No such bytes: the part is longer than the file, so it is no part of it. Start over.
        offset = 0
        response = open_url(url, offset, timeout)
    with response:
        resumed = offset > 0 and starts_at(response, offset)
        copy_body(response, part, "ab" if resumed else "wb")
    return resumed


def download_part(url: str, part: Path, retries: int, timeout: float) -> bool:
    """Bring the part to its end, in at most 1 + `retries` attempts; whether bytes were kept."""
    for attempt in range(retries + 1):
        try:
            return continue_part(url, part, timeout)
        except NETWORK_ERRORS as error:
            reason = getattr(error, "reason", None) or error
            if attempt == retries:
                raise PrepareError(
                    f"{url}: {reason} (attempt {attempt + 1} of {retries + 1}): check the"
                    " network, then run the same command again; it continues where it stopped"
                ) from None
            wait = min(2.0**attempt, LONGEST_WAIT)
            print(f"{part.stem}: {reason}; again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError(f"retries must not be negative, found {retries}")


def fetch(url: str, target: Path, blob: str, retries: int, timeout: float) -> str:
    """Download one file by way of its part, check it, and give it its name in one step.

    Returns "fetched", or "resumed" where an earlier part was continued. Raises PrepareError.
    """
    part = target.with_name(target.name + ".part")
    # A run that was stopped between the last byte and the renaming left a finished part.
    if part.exists() and blob_id(part) == blob:
        move_into_place(part, target)
        return "resumed"
    for is_last in (False, True):
        resumed = download_part(url, part, retries, timeout)
        if blob_id(part) == blob:
            move_into_place(part, target)
            return "resumed" if resumed else "fetched"
        problem = describe_content(part)
        part.unlink()  # perhaps a part of something else was continued: once more, afresh
        if is_last:
            raise PrepareError(
                f"{url}: is not the course's {target.name}: {problem}; expected git blob"
                f" {blob}: check the network (or --base_url) and run the same command again"
            )


def move_into_place(part: Path, target: Path) -> None:
    """Make the verified part durable, then give it its final name."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)


# ----------------------------------------------------------------------------------------------
# The small Quora split


def deal_small_quora(source: Path) -> dict[str, bytes]:
    """Deal the 2023 dev file into three files, as data/README.md describes; name -> content."""
    with open(source, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    width = len(header)
    labelled = [row for row in rows if len(row) == width and row[-1].strip()]
    unlabelled = [row for row in rows if len(row) != width or not row[-1].strip()]
    random.Random(SMALL_SEED).shuffle(labelled)
    test, rest = labelled[:SMALL_HELD_OUT], labelled[SMALL_HELD_OUT:]
    dev, train = rest[:SMALL_HELD_OUT], rest[SMALL_HELD_OUT:]
    train += [(row + [""] * width)[:width] for row in unlabelled]
    return {
        "quora-train.csv": to_tsv([header, *train]),
        "quora-dev.csv": to_tsv([header, *dev]),
        "quora-test-student.csv": to_tsv(row[:-1] for row in [header, *test]),
    }


def to_tsv(rows) -> bytes:
    """Rows in the course's format: tabs, default csv quoting, line feeds, UTF-8."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")


def write_small_quora(out: Path, blobs: dict[str, str], ready: dict[str, bool]) -> None:
    """Write the small split from its source, one verified file at a time, but for what is ready."""
    contents = {} if all(ready[n] for n in blobs) else deal_small_quora(out / SMALL_SOURCE)
    for name, blob in blobs.items():
        target, part = out / name, out / f"{name}.part"
        state = "ok"
        if not ready[name]:
            part.write_bytes(contents[name])
            if blob_id(part) != blob:
                part.unlink()
                raise PrepareError(f"{target}: came out otherwise than published; report this")
            move_into_place(part, target)
            state = "dealt"
        print_file(target, state)


# ----------------------------------------------------------------------------------------------
# The command


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and name the nearest flag."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; expected one of {flags}"
            self.error(f"unknown argument {unknown[0]}{hint}")
        return parsed

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def whole_number(text: str) -> int:
    """A number of times: 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ..., found {text}")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0, at most a day."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, at most 86400, found {text}")
    return number


def web_address(text: str) -> str:
    """An http(s) address without its closing slash."""
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and len(text.split()) == 1
        good = good and parts.port != 0 and parts.hostname.encode("idna")  # or a ValueError
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"expected http://... or https://..., found {text}")
    return text.rstrip("/")


def get_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Each default stands here and nowhere else."""
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    # What
    add("--year", type=int, choices=sorted(COURSES, reverse=True), default=2024,
        help="the course's year; only the Quora files differ (default: %(default)s)")
    add("--quora", choices=["full", "small"], default="full",
        help="small: the 2023 dev file dealt anew, 16,000 training pairs (default: %(default)s)")
    # Where
    add("--out", type=Path, default=HERE, help="folder to fill (default: the script's own)")
    add("--overwrite", action="store_true",
        help="replace files of these names that are not the ones asked for")
    # From where
    add("--base_url", type=web_address, default="https://raw.githubusercontent.com",
        help="a mirror's root, above OWNER/NAME/COMMIT/data/ (default: %(default)s)")
    add("--retries", type=whole_number, default=4,
        help="further attempts when a connection breaks, 0 = none (default: %(default)s)")
    add("--timeout", type=seconds, default=30.0,
        help="seconds to wait for a silent connection (default: %(default)s)")
    return parser.parse_args(argv)


def print_file(path: Path, state: str) -> None:
    """One line: name, size, rows, what was done."""
    size = f"{path.stat().st_size:,} bytes"
    say(f"{path.name:<29}{size:>18}{count_rows(path):>9,} rows  {state}")


def say(text: str) -> None:
    """A line for people; nobody needs to read it (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare(args: argparse.Namespace, courses: dict[int, Course], small: dict[str, str]) -> None:
    """Bring every file of the plan into place, then say what to run next."""
    files = plan(args.year, args.quora, courses)
    wanted = {file.name: file.blob for file in files} | (small if args.quora == "small" else {})
    args.out.mkdir(parents=True, exist_ok=True)
    # Every file first, so that one in the way is told before a long download, not after it.
    ready = {name: is_in_place(args.out / name, b, args.overwrite) for name, b in wanted.items()}
    dealt = args.quora == "small" and all(ready[name] for name in small)
    for file in files:
        if dealt and file.name == SMALL_SOURCE:
            continue  # all that comes from it is there
        target, state = args.out / file.name, "ok"
        if not ready[file.name]:
            url = f"{args.base_url}/{file.remote}"
            state = fetch(url, target, file.blob, args.retries, args.timeout)
        print_file(target, state)
    if args.quora == "small":
        write_small_quora(args.out, small, ready)
    where = "" if args.out.resolve() == HERE else f" --data_dir={shlex.quote(str(args.out))}"
    say(f"All files are in {args.out}. Next:")
    say(f"  python multitask_classifier.py --pretrained bundled --recipe best{where}")


def main(
    argv: list[str] | None = None,
    courses: dict[int, Course] = COURSES,
    small_blobs: dict[str, str] = SMALL_BLOBS,
) -> int:
    """Run the command; returns the exit code. The tests pass tables of their own files."""
    args = get_args(argv)
    try:
        prepare(args, courses, small_blobs)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"error: {error}: check --out {args.out} (space, permissions)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
