"""Download the course's data files and check every byte of them.

    python data/prepare.py                  # the 2024 files, about 70 MB, into data/
    python data/prepare.py --quora small    # the small Quora split instead: 20,212 pairs

A download goes to `<name>.part`. It gets its final name only when its git blob id is right: the
SHA-1 of `blob <size>`, a zero byte and the content. The same command resumes a broken download.
Standard library only, so this runs before anything is installed.

Exit codes: 0 done; 1 network, server or disk; 2 wrong argument, or another file is in the way;
130 interrupted.
"""

import argparse
import csv
import difflib
import hashlib
import io
import math
import os
import random
import shlex
import sys
import time
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from ssl import SSLCertVerificationError, SSLError
from urllib.error import HTTPError, URLError

HERE = Path(__file__).resolve().parent
CHUNK_BYTES = 1 << 16
LONGEST_WAIT = 20.0  # seconds between two attempts

# ----------------------------------------------------------------------------------------------
# What the course publishes

COMMON_BLOBS = {  # file name -> git blob id, of the files that are the same in both years
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
COURSES = {  # year -> the course's public repository, its commit, git blob ids of its Quora files
    2024: (
        "amahankali10/CS224N-Spring2024-DFP-Student-Handout",
        "3f64c60c8a0e40a9fe581235b08f4607ff187077",
        {
            "quora-train.csv": "1f2e73b884113e629e2786001fb9cc8ae4a696c1",
            "quora-dev.csv": "97f9430a53b7f5544f857ff27a236c40bb42b5c7",
            "quora-test-student.csv": "a1b1e5ba3ef282ba1e9b169c509eb80dbbc68666",
        },
    ),
    2023: (
        "gpoesia/minbert-default-final-project",
        "7ac8260577fc12a86c7aaf38918056c30054ef39",
        {
            "quora-train.csv": "a3b5546f6a0e65b60a328a5d294d1038f5bed1da",
            "quora-dev.csv": "de7cfa32428fd470b93f778fccc45a619e01336f",
            "quora-test-student.csv": "f257ef00558555afb50819578a58205732b16354",
        },
    ),
}

# `--quora small` splits the 2023 dev file into train, dev and test, and keeps it under this name.
SMALL_SOURCE = "quora-dev-2023.csv"
SMALL_SEED = 224
SMALL_HELD_OUT = 2106  # pairs in the dev file, and in the test file
SMALL_BLOBS = {
    "quora-train.csv": "fb46c3f82a3408ff84f4be9bbe3e9d0db8bf0511",
    "quora-dev.csv": "c8af83c24faa9386b799e87ded0394290b78e749",
    "quora-test-student.csv": "5c958771dfb95e76b22f15e8ddb8d0a672e178bb",
}


def files_of(year, quora):
    """File name -> (path on the server, git blob id); the path of a file dealt here is None."""

    def remote(year, name):
        repository, commit, _ = COURSES[year]
        return f"{repository}/{commit}/data/{name}"

    blobs = COMMON_BLOBS | (COURSES[year][2] if quora == "full" else {})
    files = {name: (remote(year, name), blob) for name, blob in blobs.items()}
    if quora == "small":
        files[SMALL_SOURCE] = (remote(2023, "quora-dev.csv"), COURSES[2023][2]["quora-dev.csv"])
        files |= {name: (None, blob) for name, blob in SMALL_BLOBS.items()}
    return files


# ----------------------------------------------------------------------------------------------
# Checking


class PrepareError(Exception):
    """A failure that the user must know: one line, with what to do."""

    exit_code = 1


class InTheWay(PrepareError):
    """Something else has the name of a file to be written."""

    exit_code = 2


def blob_id(path):
    """The git blob id (40 hexadecimal digits) of a file's content."""
    header = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: header).hexdigest()


def describe_content(path):
    """What a wrong file looks like, for the error message."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"it is a web page, not data ({size:,} bytes): a proxy's or a login page?"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-LFS pointer, not the data itself"
    return f"it has {size:,} bytes of other content"


def is_in_place(path, blob, overwrite):
    """Whether the right file is there. Raises `InTheWay` for another one that must be kept."""
    if not path.exists():
        return False
    if path.is_dir():
        raise InTheWay(f"{path}: is a folder; expected a file: move it away")
    found = blob_id(path)
    if found != blob and not overwrite:
        raise InTheWay(
            f"{path}: is not the file asked for ({describe_content(path)}); expected git blob"
            f" {blob}, found {found}: move it away, or replace it with --overwrite"
        )
    return found == blob


def move_if_right(part, target, blob):
    """Give a part its final name, in one step, if its content is right; whether it is."""
    if not part.exists() or blob_id(part) != blob:
        return False
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    return True


# ----------------------------------------------------------------------------------------------
# Downloading

# What a network can do in the middle of a download. A full disk is a plain OSError, not in here.
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError)


def open_url(url, offset, timeout):
    """Ask for a file from byte `offset` on. Raises `PrepareError` where a retry cannot help."""
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416 and offset:
            return open_url(url, 0, timeout)  # the part is longer than the file: start over
        if error.code >= 500 or error.code in (408, 416, 429):
            raise
        message = f"{url}: the server answered {error.code} {error.reason}: check --base_url"
        raise PrepareError(message) from None
    except URLError as error:
        if not isinstance(error.reason, SSLCertVerificationError):
            raise
        hint = "name your network's certificates in SSL_CERT_FILE"
        raise PrepareError(f"{url}: {error.reason}: {hint}") from None


def download_rest(url, part, timeout):
    """Download what the part lacks, in one attempt; returns whether earlier bytes were kept."""
    offset = part.stat().st_size if part.exists() else 0
    with open_url(url, offset, timeout) as response:
        # Some servers ignore the range and send the whole file.
        content_range = response.headers.get("Content-Range", "")
        resumed = response.status == 206 and content_range.startswith(f"bytes {offset}-")
        with open(part, "ab" if resumed else "wb") as file:
            # read1 returns what there is and flush hands it on: it all survives a SIGKILL.
            while chunk := response.read1(CHUNK_BYTES):
                file.write(chunk)
                file.flush()
                if sys.stderr.isatty():
                    progress = f"\r{part.stem}: {file.tell() / 2**20:7.1f} MiB \r"
                    print(progress, end="", file=sys.stderr, flush=True)
        if response.length:  # the server closed early; http.client does not say so
            raise ConnectionError(f"connection closed with {response.length:,} bytes missing")
    return resumed


def download(url, part, retries, timeout):
    """Download what the part lacks, in at most 1 + `retries` attempts; whether bytes were kept."""
    for attempt in range(retries + 1):
        try:
            return download_rest(url, part, timeout)
        except NETWORK_ERRORS as error:
            reason = getattr(error, "reason", None) or error
            if attempt == retries:
                raise PrepareError(
                    f"{url}: {reason} (attempt {attempt + 1} of {retries + 1}): check the"
                    " network, then run the same command again; it resumes where it stopped"
                ) from None
        wait = min(2.0 ** min(attempt, 9), LONGEST_WAIT)
        print(f"{part.stem}: {reason}; next attempt in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def fetch(url, target, blob, retries, timeout):
    """Download and check one file; returns "fetched", or "resumed" where bytes were kept."""
    part = target.with_name(f"{target.name}.part")
    if move_if_right(part, target, blob):  # a run was stopped just before it moved the part
        return "resumed"
    for _ in range(2):  # a second time from scratch: the part may have been of another file
        resumed = download(url, part, retries, timeout)
        if move_if_right(part, target, blob):
            return "resumed" if resumed else "fetched"
        problem = describe_content(part)
        part.unlink()
    raise PrepareError(
        f"{url}: is not the course's {target.name}: {problem}; expected git blob"
        f" {blob}: check the network (or --base_url) and run the same command again"
    )


# ----------------------------------------------------------------------------------------------
# The small Quora split


def deal_small_quora(source):
    """Deal the 2023 dev file into three, as data/README.md describes: file name -> content."""
    with open(source, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    labelled, unlabelled = [], []
    for row in rows:
        has_label = len(row) == len(header) and row[-1].strip()
        row += [""] * (len(header) - len(row))
        (labelled if has_label else unlabelled).append(row[: len(header)])
    random.Random(SMALL_SEED).shuffle(labelled)
    test, rest = labelled[:SMALL_HELD_OUT], labelled[SMALL_HELD_OUT:]
    dev, train = rest[:SMALL_HELD_OUT], rest[SMALL_HELD_OUT:]
    return {
        "quora-train.csv": to_tsv([header, *train, *unlabelled]),
        "quora-dev.csv": to_tsv([header, *dev]),
        "quora-test-student.csv": to_tsv(row[:-1] for row in [header, *test]),
    }


def to_tsv(rows):
    """Rows in the course's format: tabs, default csv quoting, line feeds, UTF-8."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")


def deal(target, blob):
    """Write and check one file of the small split; returns "dealt"."""
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(deal_small_quora(target.with_name(SMALL_SOURCE))[target.name])
    if not move_if_right(part, target, blob):
        part.unlink()
        raise PrepareError(f"{target}: came out otherwise than published; report this")
    return "dealt"


# ----------------------------------------------------------------------------------------------
# The command


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and name the nearest flag."""

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = list(self._option_string_actions)
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(flags)}"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return namespace

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def whole_number(text):
    """An argparse type: 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ..., found {text}")
    return int(text)


def seconds(text):
    """An argparse type: a time above 0, at most a day."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, at most 86400, found {text}")
    return number


def web_address(text):
    """An argparse type: an http(s) address, without its closing slash."""
    try:
        parts = urllib.parse.urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and text.split() == [text]
        valid = valid and parts.port != 0 and parts.hostname.encode("idna")
        valid = valid and text.isascii() and not set("@?#") & set(text)
    except ValueError:  # a port or a host name that cannot be
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"expected http://... or https://..., found {text}")
    return text.rstrip("/")


def get_args(argv=None):
    """The command line."""
    parser = OneLineParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    small = "small: 16,000 training pairs, split off the 2023 dev file"
    mirror = "root of a mirror, above OWNER/NAME/COMMIT/data/"
    add("--year", type=int, choices=list(COURSES), default=2024, help="only the Quora files differ")
    add("--quora", choices=["full", "small"], default="full", help=small)
    add("--out", type=Path, default=HERE, help="folder for the files")
    add("--overwrite", action="store_true", help="replace other files of the same names")
    add("--base_url", type=web_address, default="https://raw.githubusercontent.com", help=mirror)
    add("--retries", type=whole_number, default=4, help="attempts after a failed download; 0: none")
    add("--timeout", type=seconds, default=30.0, help="seconds to wait for a silent connection")
    return parser.parse_args(argv)


def say(text):
    """Print a line that nobody needs to read (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_file(path, state):
    """Print a file's name, size and rows (as the csv reader counts them), and what was done."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = sum(1 for _ in csv.reader(file, delimiter="\t")) - 1
    size = f"{path.stat().st_size:,} bytes"
    say(f"{path.name:<29}{size:>18}{rows:>9,} rows  {state}")


def prepare(args):
    """Bring every file into place, then say what to run next."""
    files = files_of(args.year, args.quora)
    args.out.mkdir(parents=True, exist_ok=True)
    # All files are checked first, so that one in the way is reported before a long download.
    in_place = {
        name: is_in_place(args.out / name, blob, args.overwrite)
        for name, (_, blob) in files.items()
    }
    if args.quora == "small" and all(in_place[name] for name in SMALL_BLOBS):
        del files[SMALL_SOURCE]  # everything that is made from it is there
    for name, (remote, blob) in files.items():
        target = args.out / name
        if in_place[name]:
            state = "ok"
        elif remote:
            url = f"{args.base_url}/{remote}"
            state = fetch(url, target, blob, args.retries, args.timeout)
        else:
            state = deal(target, blob)
        print_file(target, state)
    where = "" if args.out.resolve() == HERE else f" --data_dir={shlex.quote(str(args.out))}"
    say(f"All files are in {args.out}. Next:")
    say(f"  python multitask_classifier.py --pretrained bundled --recipe best{where}")


def main(argv=None):
    """Run the command; returns the exit code."""
    args = get_args(argv)
    try:
        prepare(args)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}: check --out {args.out} (space, permissions)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
