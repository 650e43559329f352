"""The long tests of the table of faults; tests/test_faults.py has the others.

    python -m pytest -m slow tests/test_faults_slow.py

FAULTS_SEED=<number> chooses other random moments, FUZZ_EXAMPLES the number of mangled files.
"""

import csv
import io
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

import pytest
from conftest import REPOSITORY
from fault_hooks import ONE_THREAD, finish, kill_at, leftovers, outcome, run, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import TASKS, UserError
from datasets import read_task_file

pytest_plugins = ("fault_fixtures",)
pytestmark = pytest.mark.slow
KILLS = 30
SEED = int(os.environ.get("FAULTS_SEED", 11711))


# ------------------------------------------------------------------------------ kills and signals


def test_32_30_kills_at_random_moments(tiny, expected, writing_calls, tmp_path):
    """Half at a random time, half at a random call that writes; resumed runs are killed too.

    All end as the run that was never broken. Only those that were really killed count.
    """
    moments = random.Random(SEED)
    (tmp_path / "timed").mkdir()
    began = time.monotonic()
    assert run(tmp_path / "timed", tiny.argv()).returncode == 0
    duration = time.monotonic() - began
    kills = number = 0
    while kills < KILLS:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        for more in ([], ["--resume"], ["--resume"]):
            if number % 2:
                process = start(folder, tiny.argv(*more))
                process.join(moments.uniform(0, duration))
                process.kill()
                done = finish(process, folder)
            else:
                call = moments.randrange(1, writing_calls)
                done = run(folder, tiny.argv(*more), partial(kill_at, call))
            assert done.returncode in (0, -signal.SIGKILL), done
            kills += done.returncode == -signal.SIGKILL
        done = run(folder, tiny.argv("--resume"))
        assert done.returncode == 0, (number, done)
        assert outcome(folder) == expected, number
        assert not leftovers(folder), number
    print(f"\n{kills} kills in {number} runs: all ended bitwise as the unbroken one (seed {SEED})")


def test_33_signals_at_random_moments(tiny, expected, tmp_path):
    """From outside, at any time: the run ends in good order, or had ended before."""
    moments, codes = random.Random(SEED), []
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start(folder, tiny.argv())
        process.join(moments.uniform(0.05, 0.8))
        stop = (signal.SIGTERM, signal.SIGINT)[number % 2]
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process.pid, stop)
        done = finish(process, folder)
        codes.append(done.returncode)
        assert done.returncode in (0, 128 + stop), done
        assert "Traceback" not in done.stderr
        assert run(folder, tiny.argv("--resume")).returncode == 0
        assert outcome(folder) == expected, number
    assert any(codes)


# ---------------------------------------------------------------------- the command, as it is typed


def words(argv):
    """The words of the command line."""
    return [sys.executable, str(REPOSITORY / "multitask_classifier.py"), *map(str, argv)]


def shell(line, folder):
    """Run a command line with bash: the exit code is that of the first command that failed."""
    bash = ["bash", "-o", "pipefail", "-c", line]
    env = os.environ | ONE_THREAD
    return subprocess.run(bash, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("redirection", "lines"), [("2>&1 | head -1", 1), ("> /dev/full", 0)])
def test_35_a_closed_pipe_or_full_disk_as_output(tiny, expected, tmp_path, redirection, lines):
    """The output is lost, the run is not."""
    done = shell(f"{shlex.join(words(tiny.argv()))} {redirection}", tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, lines), done
    assert lines == 0 or not done.stderr
    assert outcome(tmp_path) == expected


def test_33_ctrl_c(tiny, expected, tmp_path):
    options = {"env": os.environ | ONE_THREAD, "cwd": tmp_path, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words(tiny.argv()), **options, **pipes)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped by SIGINT; continue with --resume\n")
    assert shell(shlex.join(words(tiny.argv("--resume"))), tmp_path).returncode == 0
    assert outcome(tmp_path) == expected


# --------------------------------------------------------------------------------- disk and costs


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, if this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system: {error}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_36_a_disk_that_is_really_full(tiny, expected, small_disk):
    """It is full of another file. With room again, resuming is bitwise."""
    other, failures = small_disk / "another", 0
    for taken in range(1800, 900, -100):  # KiB
        other.write_bytes(b"x" * 1024 * taken)
        done = run(small_disk, tiny.argv("--resume"))
        if done.returncode == 0:
            break
        failures += 1
        assert done.returncode == 1, done
        assert re.fullmatch("error: .*not written.*bytes free.*\n", done.stderr)
        assert not list(small_disk.rglob(".tmp-*"))
    other.unlink()
    assert run(small_disk, tiny.argv("--resume")).returncode == 0
    assert outcome(small_disk) == expected
    assert not leftovers(small_disk)
    assert failures


# ------------------------------------------------------------------------------------------- fuzz

ORIGINAL = [
    "\tid\tsentence\tsentiment",
    "0\tid0\ta plain sentence\t3",
    '1\tid1\t"a quoted one, with a ""word"" in it"\t2',
    "2\tid2\tanother plain sentence\t0",
    '3\tid3\tin the "middle" of it\t1',
    '4\tid4\t"with a\ttab"\t4',
    '5\tid5\tat the "end"\t2',
    '6\tid6\t""" all of it """\t2',
    "7\tid7\t\t3.0",
    '8\tid8\t"two\nlines"\t3',
    "9\tid9\tthe last one 😀\t1",
]
WHOLE = {line for line in ORIGINAL[1:] if "\n" not in line}
PIECES = [b'"', b'""', b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"7", b"-"]
PIECES += [b" ", b'\t"', b'"\t', b"id1", b"\xe2\x80\xa8", b"\xc2\x85", b",", b"\t\t"]


# What an accident removes, in bytes, and what it puts there.
REMOVED = st.sampled_from([0, 0, 0, 1, 1, 5, 12, 10**6])
PUT = st.one_of(st.sampled_from(PIECES), st.binary(max_size=2))
# Rows as they are, repeated, dropped and in another order; then also with another first line.
BODIES = st.lists(st.sampled_from(ORIGINAL[1:]), min_size=1, max_size=12)
FILES = st.one_of(
    st.just(ORIGINAL), BODIES.map(lambda body: [ORIGINAL[0], *body]), st.permutations(ORIGINAL)
)


@st.composite
def mangled(draw):
    """A file after up to four accidents."""
    content = bytearray("\n".join([*draw(FILES), ""]).encode())
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(REMOVED)] = draw(PUT)
    return bytes(content)


def check(path, content, split):
    """Read a file: it ends in one clear error, or every row of it is accounted for."""
    path.write_bytes(content)
    began = time.monotonic()
    try:
        found = read_task_file(path, TASKS["sst"], split)
    except UserError as error:
        assert str(error).startswith(str(path)), error
        assert len(str(error)) < 1000 + len(str(path))
        return "refused"
    finally:
        assert time.monotonic() - began < 2
    text = content.decode("utf-8-sig").replace("\0", "")
    header, *rows = filter(None, csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    assert found.rows == len(rows)
    warnings = "\n".join(found.warnings)
    skipped = sum(int(n) for n in re.findall(r"(\d+) of \d+ rows skipped", warnings))
    written_once = found.rows - skipped - len(found.examples)
    assert written_once == 0 or (split == "dev" and "written once" in warnings)
    assert written_once >= 0
    ids = {example.id for example in found.examples}
    place = [name.strip(" ").lower() for name in header].index("id")
    for line in re.split(r"\r\n?|\n", text):
        fields = next(csv.reader([line], delimiter="\t"), [])
        # An undamaged row of the header's width is never swallowed by its neighbour.
        if line in WHOLE and len(fields) == len(header):
            assert fields[place] in ids, (line, ids)
    return "read"


@pytest.mark.parametrize("split", ["train", "dev"])
def test_07_to_19_mangled_files_are_read_or_refused(tmp_path, split):
    ends = {"read": 0, "refused": 0}
    examples = int(os.environ.get("FUZZ_EXAMPLES", 2000)) // 2
    slow = [HealthCheck.too_slow]

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=slow)
    @given(mangled())
    def fuzz(content):
        ends[check(tmp_path / "file.csv", content, split)] += 1

    fuzz()
    print(f"\n{ends} of {examples} mangled {split} files")
    assert min(ends.values()) > examples // 10  # else it is no test of one of the two
