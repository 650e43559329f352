"""The download script against a local server that breaks off, lies and stalls.

Every file is made here; only the Quora rule is checked against the course's own files, where
they are at hand.
"""

import csv
import hashlib
import http.server
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
REAL_DATA = Path(
    os.environ.get("REAL_DATA_DIR") or Path(__file__).resolve().parents[2] / "shared" / "data"
)

prepare = load_script(SCRIPT)


def git_blob_id(content: bytes) -> str:
    """The git blob id, worked out here independently of the script."""
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


# ----------------------------------------------------------------------------------------------
# A server that can misbehave, and a course of two small files


class Server(http.server.ThreadingHTTPServer):
    """Serves `contents` (file name -> bytes); each request may take a fault off `faults`.

    Faults: ("break", n): closes after n bytes; ("stall", n): sends n bytes, then waits for
    `released`; ("no-range",): ignores Range; ("whole-range",): answers 206 with the whole file;
    ("status", code): answers with that code.
    `log` holds (file name, Range header or None, bytes of body sent).
    """

    daemon_threads = True

    def __init__(self, contents: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents, self.faults, self.log = contents, [], []
        self.released = threading.Event()
        self.stalled = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that was killed is part of these tests, not noise for their output."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET with ranges, like the real server."""

    def log_message(self, *args):
        """Silent."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        fault = self.server.faults.pop(0) if self.server.faults else ("none",)
        wanted = self.headers.get("Range")
        body = self.server.contents.get(name)
        entry = [name, wanted, 0]
        self.server.log.append(entry)
        if body is None or fault[0] == "status":
            self.send_error(fault[1] if body is not None else 404)
            return
        start = 0
        if wanted and fault[0] != "no-range":
            asked = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1))
            start = 0 if fault[0] == "whole-range" else asked
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if fault[0] in ("break", "stall"):
            rest = rest[: fault[1]]
        self.wfile.write(rest)
        self.wfile.flush()
        entry[2] = len(rest)
        if fault[0] == "stall":
            self.server.stalled.set()
            self.server.released.wait(30)
        self.close_connection = True


def make_table(rows: int, seed: int) -> bytes:
    """A file in the course's format; a quoted field of two lines is one row."""
    rng = random.Random(seed)
    lines = ["\tid\tsentence\tsentiment"]
    for row in range(rows):
        lines.append(f"{row}\t{rng.getrandbits(100):025x}\t a film , number {row}\t{row % 5}")
    lines.append(f'{rows}\t{rng.getrandbits(100):025x}\t" ""two""\nlines"\t3')
    return ("\n".join(lines) + "\n").encode()


CONTENTS = {"ids-sst-dev.csv": make_table(3000, 1), "quora-dev.csv": make_table(40, 2)}
BIG = "ids-sst-dev.csv"
STALL = 900  # bytes: fewer than a file object buffers, so an unflushed part would be empty
BLOBS = {name: git_blob_id(content) for name, content in CONTENTS.items()}
COURSES = {year: prepare.Course("owner/course", "c0ffee", BLOBS) for year in (2024, 2023)}


@pytest.fixture(autouse=True)
def direct_connection(monkeypatch):
    """No proxy stands between these tests and 127.0.0.1, and no attempt waits."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)


@pytest.fixture
def server():
    """A running server of CONTENTS."""
    with Server(dict(CONTENTS)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def run(server, out: Path, *flags: str, courses=COURSES, **tables) -> int:
    """The command in this process."""
    argv = ["--base_url", server.url, "--out", str(out), *flags]
    return prepare.main(argv, courses=courses, **tables)


CHILD = """
import importlib.util, json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may ignore it
spec = importlib.util.spec_from_file_location("prepare_child", sys.argv[1])
prepare = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = prepare
spec.loader.exec_module(prepare)
courses = {int(y): prepare.Course(*c) for y, c in json.loads(sys.argv[2]).items()}
sys.exit(prepare.main(sys.argv[3:], courses=courses))
"""


def start_child(server, out: Path) -> subprocess.Popen:
    """The command in a process of its own, to be killed."""
    table = json.dumps({y: [c.repository, c.commit, c.blobs] for y, c in COURSES.items()})
    flags = ["--base_url", server.url, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(SCRIPT), table, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def wait_for_size(path: Path, size: int) -> None:
    """Wait until a file has reached a size in bytes."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and path.stat().st_size >= size:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"{path.name} has not reached {size} bytes in 20 s")


def names_in(folder: Path) -> list[str]:
    """The names in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------
# A whole download


def test_fetches_every_file_and_says_what_comes_next(server, tmp_path, capsys):
    assert run(server, tmp_path) == 0
    assert {n: (tmp_path / n).read_bytes() for n in names_in(tmp_path)} == CONTENTS
    said = capsys.readouterr().out
    # The quoted field of two lines counts once, as the readers of these files count it.
    assert re.search(rf"ids-sst-dev.csv +{len(CONTENTS[BIG]):,} bytes +3,001 rows  fetched", said)
    assert re.search(r"quora-dev.csv .* 41 rows  fetched", said)
    assert "python multitask_classifier.py --pretrained bundled --recipe best" in said


def test_nobody_needs_to_read_what_it_says(server, tmp_path):
    """As `python data/prepare.py | head -1`: the downloads go on."""
    child = start_child(server, tmp_path)
    child.stdout.close()
    assert child.wait(timeout=60) == 0, child.stderr.read()
    child.stderr.close()
    assert names_in(tmp_path) == sorted(CONTENTS)


def test_asks_for_the_pinned_commit(monkeypatch, server, tmp_path):
    asked = []
    real = prepare.open_url
    monkeypatch.setattr(
        prepare, "open_url", lambda url, *rest: asked.append(url) or real(url, *rest)
    )
    assert run(server, tmp_path) == 0
    assert asked == [f"{server.url}/owner/course/c0ffee/data/{name}" for name in CONTENTS]


def test_default_tables_name_twelve_files_a_year_with_whole_ids():
    for year in (2024, 2023):
        files = prepare.plan(year, "full", prepare.COURSES)
        assert len({file.name for file in files}) == 12
        assert all(re.fullmatch("[0-9a-f]{40}", file.blob) for file in files)
    small = prepare.plan(2024, "small", prepare.COURSES)
    # The small split needs the 2023 dev file, and must not download the large ones.
    assert [f.remote.split("/")[1] for f in small if "quora" in f.name] == [
        "minbert-default-final-project"
    ]
    assert len(small) == 10


def test_a_second_run_asks_the_server_for_nothing(server, tmp_path, capsys):
    assert run(server, tmp_path) == 0
    server.log.clear()
    assert run(server, tmp_path) == 0
    assert server.log == []
    assert capsys.readouterr().out.count("rows  ok") == len(CONTENTS)


# ----------------------------------------------------------------------------------------------
# Broken connections


def test_a_broken_connection_is_continued_with_the_rest_only(server, tmp_path, capsys):
    server.faults = [("break", 70_000)]
    assert run(server, tmp_path) == 0
    size = len(CONTENTS[BIG])
    assert server.log[:2] == [
        [BIG, None, 70_000],
        [BIG, "bytes=70000-", size - 70_000],
    ]
    assert (tmp_path / BIG).read_bytes() == CONTENTS[BIG]
    assert "rows  resumed" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["no-range", "whole-range"])
def test_a_server_that_sends_it_all_means_starting_over(server, tmp_path, fault):
    (tmp_path / f"{BIG}.part").write_bytes(CONTENTS[BIG][:1000])
    server.faults = [(fault,)]
    assert run(server, tmp_path) == 0
    # Appending a whole body to the part would need a second request to repair it.
    assert server.log[0] == [BIG, "bytes=1000-", len(CONTENTS[BIG])]
    assert [entry[0] for entry in server.log].count(BIG) == 1
    assert (tmp_path / BIG).read_bytes() == CONTENTS[BIG]


def test_a_part_longer_than_the_file_means_starting_over(server, tmp_path):
    (tmp_path / f"{BIG}.part").write_bytes(CONTENTS[BIG] + b"more")
    assert run(server, tmp_path) == 0
    assert [entry[1] for entry in server.log if entry[0] == BIG] == [
        f"bytes={len(CONTENTS[BIG]) + 4}-",
        None,
    ]
    assert (tmp_path / BIG).read_bytes() == CONTENTS[BIG]


def test_a_part_of_another_file_is_dropped_and_fetched_afresh(server, tmp_path):
    (tmp_path / f"{BIG}.part").write_bytes(b"x" * 1000)
    assert run(server, tmp_path) == 0
    assert [entry[1] for entry in server.log if entry[0] == BIG] == ["bytes=1000-", None]
    assert (tmp_path / BIG).read_bytes() == CONTENTS[BIG]


def test_a_finished_part_needs_no_network(server, tmp_path):
    (tmp_path / f"{BIG}.part").write_bytes(CONTENTS[BIG])
    assert run(server, tmp_path) == 0
    assert BIG not in [entry[0] for entry in server.log]
    assert names_in(tmp_path) == sorted(CONTENTS)


def test_gives_up_after_the_retries_in_one_line_and_keeps_the_part(server, tmp_path, capsys):
    server.faults = [("break", 500), ("break", 500), ("status", 503)]
    assert run(server, tmp_path, "--retries", "2") == 1
    errors = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert len(errors) == 1 and "attempt 3 of 3" in errors[0] and "same command" in errors[0]
    assert names_in(tmp_path) == [f"{BIG}.part"]
    assert (tmp_path / f"{BIG}.part").read_bytes() == CONTENTS[BIG][:1000]


def test_nobody_listening_is_one_line_and_exit_1(server, tmp_path, capsys):
    # A port that is bound but does not listen refuses, and nobody else can take it meanwhile.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert prepare.main(["--base_url", url, "--out", str(tmp_path), "--retries", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "network" in error


def test_a_silent_server_is_waited_for_no_longer_than_the_timeout(server, tmp_path, capsys):
    server.faults = [("stall", 100)]
    started = time.monotonic()
    assert run(server, tmp_path, "--timeout", "0.3", "--retries", "0") == 1
    assert time.monotonic() - started < 10
    assert "timed out" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# Wrong content


@pytest.mark.parametrize(
    "content, hint",
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS pointer"),
        (CONTENTS[BIG].replace(b"number 7", b"number 8", 1), "other content"),
        (b"", "empty"),
    ],
)
def test_other_content_never_gets_the_final_name(server, tmp_path, capsys, content, hint):
    server.contents[BIG] = content
    assert run(server, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and hint in error and BLOBS[BIG] in error
    assert names_in(tmp_path) == []
    assert len(server.log) == 2  # once, and once afresh


def test_a_missing_file_is_said_at_once(server, tmp_path, capsys):
    del server.contents[BIG]
    assert run(server, tmp_path) == 1
    assert "404" in capsys.readouterr().err
    assert len(server.log) == 1


def test_another_file_in_the_way_is_kept_until_overwritten(server, tmp_path, capsys):
    mine = tmp_path / "quora-dev.csv"
    mine.write_bytes(b"mine\n")
    assert run(server, tmp_path) == 2
    error = capsys.readouterr().err
    assert str(mine) in error and "--overwrite" in error and error.count("\n") == 1
    assert mine.read_bytes() == b"mine\n"
    assert server.log == []  # told before any download, though another file comes first
    assert run(server, tmp_path, "--overwrite") == 0
    assert mine.read_bytes() == CONTENTS["quora-dev.csv"]


def test_overwriting_keeps_the_old_file_until_the_new_one_is_verified(server, tmp_path):
    (tmp_path / BIG).write_bytes(b"mine\n")
    server.contents[BIG] = b"something else\n"
    assert run(server, tmp_path, "--overwrite") == 1
    assert (tmp_path / BIG).read_bytes() == b"mine\n"


@pytest.mark.parametrize("blocked", ["out", "file"])
def test_a_path_that_cannot_be_written_is_one_line(server, tmp_path, capsys, blocked):
    out = tmp_path / "out"
    if blocked == "out":
        out.write_text("a file where the folder should be")
    else:
        (out / f"{BIG}.part").mkdir(parents=True)
    assert run(server, out) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--out" in error


# ----------------------------------------------------------------------------------------------
# Stopped in the middle


def test_nothing_has_the_final_name_while_the_download_runs(server, tmp_path):
    server.faults = [("stall", STALL)]
    child = start_child(server, tmp_path)
    try:
        wait_for_size(tmp_path / f"{BIG}.part", STALL)
        assert names_in(tmp_path) == [f"{BIG}.part"]
    finally:
        child.kill()
        child.communicate()


def test_sigkill_in_the_middle_then_continue(server, tmp_path):
    server.faults = [("stall", STALL)]
    child = start_child(server, tmp_path)
    try:
        wait_for_size(tmp_path / f"{BIG}.part", STALL)
    finally:
        child.kill()
        child.communicate()
    server.released.set()
    server.log.clear()
    assert run(server, tmp_path) == 0
    assert server.log[0] == [BIG, f"bytes={STALL}-", len(CONTENTS[BIG]) - STALL]
    assert {n: (tmp_path / n).read_bytes() for n in names_in(tmp_path)} == CONTENTS


def test_ctrl_c_is_130_with_one_line_and_keeps_the_part(server, tmp_path):
    server.faults = [("stall", STALL)]
    child = start_child(server, tmp_path)
    try:
        wait_for_size(tmp_path / f"{BIG}.part", STALL)
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode == 130
    assert error.startswith("interrupted: ") and error.count("\n") == 1
    assert (tmp_path / f"{BIG}.part").read_bytes() == CONTENTS[BIG][:STALL]


# ----------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "flags, hint",
    [
        (["--yaer", "2023"], "--year"),
        (["--quor", "small"], "--quora"),  # no silent abbreviation
        (["--year", "2022"], "2024"),
        (["--quora", "tiny"], "small"),
        (["--retries", "-1"], "expected 0, 1, 2, ..., found -1"),
        (["--retries", "x"], "expected 0, 1, 2, ..., found x"),
        (["--timeout", "nan"], "above 0"),
        (["--timeout", "soon"], "above 0, at most 86400, found soon"),
        (["--timeout", "1e300"], "above 0, at most 86400, found 1e300"),
        (["--base_url", "file:///etc"], "http"),
        (["--base_url", "http://"], "http"),
        (["--base_url", "http://a b"], "http"),
        (["--base_url", "http://[::1"], "http"),
        (["--base_url", "http://a_b..c"], "http"),
        (["--base_url", "http://localhost:x"], "http"),
    ],
)
def test_a_wrong_flag_is_exit_2_in_one_line(flags, hint):
    command = [sys.executable, SCRIPT, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert hint in done.stderr


# ----------------------------------------------------------------------------------------------
# The small Quora split


def make_pairs(count: int) -> bytes:
    """A stand-in for the 2023 dev file, with two rows that have no label."""
    lines = ["\tid\tsentence1\tsentence2\tis_duplicate"]
    for row in range(count):
        label = "" if row in (3, count - 2) else f"{row % 2}.0"
        lines.append(f'{row * 7}\t{row:025x}\t"Why ""{row}""?"\tHow {row}, é?\t{label}')
    return ("\n".join(lines) + "\n").encode()


def read_rows(content: bytes) -> list[list[str]]:
    """The rows of a file, header first."""
    return list(csv.reader(content.decode().splitlines(keepends=True), delimiter="\t"))


def test_the_deal_loses_and_doubles_nothing(tmp_path):
    source = tmp_path / "source.csv"
    source.write_bytes(make_pairs(5000))
    dealt = prepare.deal_small_quora(source)
    train, dev, test = (read_rows(dealt[f"quora-{split}.csv"]) for split in prepare.SPLITS)
    assert (len(train), len(dev), len(test)) == (5000 - 2 * 2106 + 1, 2107, 2107)
    assert test[0] == ["", "id", "sentence1", "sentence2"]
    originals = {row[1]: row for row in read_rows(make_pairs(5000))[1:]}
    seen = [*train[1:], *dev[1:], *([*row, originals[row[1]][4]] for row in test[1:])]
    assert sorted(seen) == sorted(originals.values())
    assert [row[4] for row in train].count("") == 2 and [row[4] for row in train[-2:]] == ["", ""]
    # A row says the same bytes as before: quotes stay doubled where they were.
    assert b'"Why ""12""?"' in b"".join(dealt.values())


def rebuild_2023_dev() -> bytes:
    """A 2023 dev file that deals out to the shared files: the rule, run backwards.

    The test file's labels are not known, and neither are the places of the two unlabelled rows;
    the rule uses neither.
    """

    def rows(split: str) -> list[list[str]]:
        return read_rows((REAL_DATA / f"quora-{split}.csv").read_bytes())

    header, *train = rows("train")
    shuffled = [[*row, "0.0"] for row in rows("test-student")[1:]] + rows("dev")[1:] + train[:-2]
    order = list(range(len(shuffled)))
    random.Random(224).shuffle(order)
    original = [row for _, row in sorted(zip(order, shuffled, strict=True))]
    original.insert(100, train[-2])
    original.insert(15_000, train[-1])
    return prepare.to_tsv([header, *original])


@pytest.fixture
def small_server(server):
    """A server with the rebuilt 2023 dev file, and the course that describes it."""
    if not (REAL_DATA / "quora-train.csv").exists():
        pytest.skip("needs the course's small Quora files: set REAL_DATA_DIR to their folder")
    rebuilt = rebuild_2023_dev()
    server.contents["quora-dev.csv"] = rebuilt
    blobs = BLOBS | {"quora-dev.csv": git_blob_id(rebuilt)}
    courses = {**COURSES, 2023: prepare.Course("owner/earlier", "beef", blobs)}
    return server, courses


def test_small_quora_is_byte_for_byte_the_shared_files(small_server, tmp_path, capsys):
    server, courses = small_server
    assert run(server, tmp_path, "--quora", "small", courses=courses) == 0
    for split in prepare.SPLITS:
        name = f"quora-{split}.csv"
        assert (tmp_path / name).read_bytes() == (REAL_DATA / name).read_bytes(), name
    assert names_in(tmp_path) == sorted(
        [BIG, prepare.SMALL_SOURCE, *(f"quora-{split}.csv" for split in prepare.SPLITS)]
    )
    assert re.search(r"quora-train.csv .* 16,002 rows  dealt", capsys.readouterr().out)
    server.log.clear()
    for _ in range(2):
        assert run(server, tmp_path, "--quora", "small", courses=courses) == 0
        (tmp_path / prepare.SMALL_SOURCE).unlink(missing_ok=True)  # what came from it is there
    assert server.log == []


def test_small_quora_does_not_replace_the_full_files_unasked(small_server, tmp_path, capsys):
    server, courses = small_server
    full = b"the large file\n"
    (tmp_path / "quora-train.csv").write_bytes(full)
    assert run(server, tmp_path, "--quora", "small", courses=courses) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "quora-train.csv").read_bytes() == full
    assert run(server, tmp_path, "--quora", "small", "--overwrite", courses=courses) == 0
    assert (tmp_path / "quora-train.csv").read_bytes() != full


def test_a_deal_that_came_out_otherwise_is_an_error(server, tmp_path, capsys):
    pairs = make_pairs(5000)
    server.contents["quora-dev.csv"] = pairs
    blobs = BLOBS | {"quora-dev.csv": git_blob_id(pairs)}
    courses = {**COURSES, 2023: prepare.Course("owner/earlier", "beef", blobs)}
    assert run(server, tmp_path, "--quora", "small", courses=courses) == 1
    assert "otherwise than published" in capsys.readouterr().err
    assert names_in(tmp_path) == [BIG, prepare.SMALL_SOURCE]


def test_the_real_files_have_the_ids_of_the_table():
    """A blob id mistyped in the table, or worked out wrongly, would refuse good files."""
    if not (REAL_DATA / "ids-sst-dev.csv").exists():
        pytest.skip("needs the course's files: set REAL_DATA_DIR to their folder")
    table = {**prepare.COMMON_BLOBS, **prepare.SMALL_BLOBS}
    assert {name: prepare.blob_id(REAL_DATA / name) for name in table} == table
