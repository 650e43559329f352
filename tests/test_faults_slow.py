"""The long ones of the table of faults: see tests/test_faults.py.

    python -m pytest -m slow tests/test_faults_slow.py

FAULTS_SEED=<number> chooses other random moments, FUZZ_EXAMPLES the number of mangled files.
"""

import csv
import io
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
from fault_hooks import REPOSITORY, leftovers, newest_state, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import TASKS, UserError
from datasets import read_task_file

pytest_plugins = ("fault_fixtures",)
pytestmark = pytest.mark.slow
KILLS = 30
SEED = int(os.environ.get("FAULTS_SEED", 11711))


def command(argv):
    """The command line as a user types it."""
    script = REPOSITORY / "multitask_classifier.py"
    return shlex.join([sys.executable, str(script), *map(str, argv)])


# ----------------------------------------------------------------------------------------- kills


def test_32_30_kills_at_random_moments(program, tiny, expected, writing_calls, tmp_path):
    """Half at a random time, half at a random call that writes; continuing is killed too.

    All of them end as the run that was never broken. A run counts when it was really killed.
    """
    moments = random.Random(SEED)
    began = time.monotonic()
    (tmp_path / "timed").mkdir()
    assert program.run(tmp_path / "timed", tiny.argv()).code == 0
    duration = time.monotonic() - began
    kills = number = 0
    while kills < KILLS:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        for attempt in range(3):
            argv = tiny.argv(*(["--resume"] if attempt else []))
            if number % 2:
                pid = program.start(folder, argv)
                time.sleep(moments.uniform(0, duration))
                os.kill(pid, signal.SIGKILL)
                done = program.wait(pid, folder)
            else:
                call = moments.randrange(1, writing_calls)
                done = program.run(folder, argv, [("kill_at", {"number": call})])
            kills += done.code == -signal.SIGKILL
            if done.code == 0:
                break
            assert done.code == -signal.SIGKILL, done
        done = program.run(folder, tiny.argv("--resume"))
        assert done.code == 0, (number, done)
        assert outcome(folder) == expected, number
        assert not leftovers(folder), number
    print(f"\n{kills} kills in {number} runs: all ended bitwise as the unbroken one (seed {SEED})")


def test_33_signals_at_random_moments(program, tiny, expected, tmp_path):
    """From outside, whenever: the run ends in good order, or had ended before."""
    moments = random.Random(SEED)
    codes = []
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        pid = program.start(folder, tiny.argv())
        time.sleep(moments.uniform(0.05, 0.8))
        stop = (signal.SIGTERM, signal.SIGINT)[number % 2]
        os.kill(pid, stop)
        done = program.wait(pid, folder)
        codes.append(done.code)
        assert done.code in (0, 128 + stop), done
        assert "Traceback" not in done.stderr
        assert program.run(folder, tiny.argv("--resume")).code == 0
        assert outcome(folder) == expected, number
    assert any(codes)


def test_35_a_real_pipe(tiny, expected, tmp_path):
    """`2>&1 | head -1` of the real command; bash gives the exit code of the first in the pipe."""
    line = f"set -o pipefail; {command(tiny.argv())} 2>&1 | head -1"
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == 1
    assert not done.stderr
    assert outcome(tmp_path) == expected


def test_35_a_full_disk_behind_standard_output(tiny, expected, tmp_path):
    """`> /dev/full`: what is said is lost, the run is not."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    line = f"{command(tiny.argv())} > /dev/full"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert outcome(tmp_path) == expected


def test_33_the_real_command_and_ctrl_c(tiny, expected, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    argv = shlex.split(command(tiny.argv()))
    process = subprocess.Popen(
        argv, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.startswith("stopped by SIGINT")
    assert len(errors.splitlines()) == 1
    subprocess.run([*argv, "--resume"], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert outcome(tmp_path) == expected


# ------------------------------------------------------------------------------------------ disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small file system: {error}")
    if done.returncode:
        pytest.skip(f"no small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_36_a_disk_that_is_really_full(program, tiny, expected, small_disk):
    """Filled up with someone else's file; with room again, continuing is bitwise."""
    other = small_disk / "somebody-else's"
    for taken in range(1800, 900, -100):  # KiB
        other.write_bytes(b"x" * 1024 * taken)
        done = program.run(small_disk, tiny.argv("--resume"))
        if done.code == 0:
            break
        assert done.code == 1, done
        assert "not written" in done.stderr
        assert "bytes free" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not list(small_disk.rglob(".tmp-*"))
    other.unlink()
    assert program.run(small_disk, tiny.argv("--resume")).code == 0
    assert outcome(small_disk) == expected
    assert not leftovers(small_disk)


# --------------------------------------------------------------------------------------- network


def test_25_a_hub_that_does_not_answer(program, tiny, tmp_path):
    """Connections are taken and nothing comes back."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system takes them, nobody else
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "cache"),
        }
        began = time.monotonic()
        done = program.run(tmp_path, tiny.argv("--pretrained", "someone/something"), env=env)
        seconds = time.monotonic() - began
    assert done.code == 2, done
    assert done.stderr.startswith("error: encoder someone/something: ")
    assert "--pretrained FOLDER" in done.stderr
    assert seconds < 30


# -------------------------------------------------------------------------------------- cost


def test_saving_costs_less_than_one_percent_of_an_epoch(tmp_path, bundled_folder):
    """The bundled encoder, all of it trained: one state against an epoch of 2,000 steps of 8."""
    script = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
import multitask_classifier as program, run_folder
save, times = run_folder.RunFolder.save_state, []
def timed(*args):
    began = time.perf_counter()
    save(*args)
    times.append(time.perf_counter() - began)
run_folder.RunFolder.save_state = timed
program.main({["--pretrained", "bundled", "--data_dir", str(REPOSITORY / "data/sample"),
               "--epochs", "1", "--steps_per_epoch", "20", "--save_every", "5"]!r})
print("saved", *times)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = [json.loads(x) for x in (tmp_path / "runs/full-model/metrics.jsonl").open()]
    (speed,) = [line["sentences_per_s"] for line in lines if line["kind"] == "train"]
    sentences = 8 * (1 + 2 + 2)  # of a step: a sentence of sst, two each of para and sts
    epoch = 2000 * sentences / speed
    times = [float(x) for x in done.stdout.splitlines()[-1].split()[1:]]
    size = sum(f.stat().st_size for f in newest_state(tmp_path / "runs/full-model").iterdir())
    share = sorted(times)[len(times) // 2] / epoch
    print(
        f"\na state of {size / 2**20:.0f} MiB: median {sorted(times)[len(times) // 2]:.2f} s of "
        f"{len(times)} ({', '.join(f'{t:.2f}' for t in times)}); an epoch of 2,000 steps "
        f"{epoch:.0f} s at {speed:.0f} sentences/s: {share:.2%}"
    )
    assert share < 0.01


# --------------------------------------------------------------------------------------- fuzz

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
PIECES = [b'"', b'""', b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"7", b"-",
          b" ", b'\t"', b'"\t', b"id1", b"\xe2\x80\xa8", b"\xc2\x85", b",", b"\t\t"]  # fmt: skip


@st.composite
def mangled(draw):
    """A good file after one to six accidents."""
    lines = [line.encode() for line in ORIGINAL]
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["swap", "repeat", "drop"]))
        i, j = draw(st.tuples(*[st.integers(0, len(lines) - 1)] * 2))
        if kind == "swap":
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == "repeat":
            lines.insert(i, lines[j])
        elif len(lines) > 2:
            del lines[i]
    content = bytearray(b"\n".join(lines) + b"\n")
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["insert", "insert", "replace", "delete", "cut"]))
        if kind == "insert":
            content[place:place] = draw(st.sampled_from(PIECES))
        elif kind == "replace":
            pieces = [*PIECES, draw(st.binary(max_size=2))]
            content[place : place + 1] = draw(st.sampled_from(pieces))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 12))]
        elif draw(st.booleans()):
            del content[place:]
    return bytes(content)


def count_records(text):
    """Records of a tab-separated text with default csv quoting, blank lines left out: an own
    reading, letter by letter."""
    records, inside, field_begins, blank = 0, False, True, True
    i = 0
    while i < len(text):
        letter = text[i]
        if inside:
            if letter == '"' and text[i + 1 : i + 2] == '"':
                i += 1
            elif letter == '"':
                inside = False
        elif letter in "\r\n":
            records += not blank
            blank, field_begins = True, True
        else:
            inside = letter == '"' and field_begins
            field_begins, blank = letter == "\t", False
        i += 1
    return records + (not blank)


def check(path, content, split):
    """Read a file: it ends in one clean error, or every row of it is accounted for."""
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
    assert found.rows == count_records(text) - 1
    warnings = "\n".join(found.warnings)
    skipped = sum(int(n) for n in re.findall(r"(\d+) of \d+ rows skipped", warnings))
    written_once = found.rows - skipped - len(found.examples)
    assert written_once == 0 or (split == "dev" and "written once" in warnings)
    assert written_once >= 0
    ids = {example.id for example in found.examples}
    header = next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter="\t")))
    place = [name.strip(" ").lower() for name in header].index("id")
    for line in re.split(r"\r\n?|\n", text):
        if line in WHOLE:  # an undamaged row is never swallowed by its neighbour
            assert line.split("\t")[place] in ids, (line, ids)
    return "read"


@pytest.mark.parametrize("split", ["train", "dev"])
def test_fuzz_of_the_task_files(tmp_path, split):
    ends = {"read": 0, "refused": 0}
    examples = int(os.environ.get("FUZZ_EXAMPLES", 2000)) // 2

    @settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(mangled())
    def fuzz(content):
        ends[check(tmp_path / "file.csv", content, split)] += 1

    fuzz()
    print(f"\n{ends} of {examples} mangled {split} files")
    assert min(ends.values()) > examples // 10  # else it is no test of one of the two
