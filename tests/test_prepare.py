"""The download script against a local server that breaks off, stalls or sends something else.

The Quora rule and the blob ids are checked against the course's own files, where they are at hand.
"""

import csv
import hashlib
import http.server
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPOSITORY, load_script

prepare = load_script(REPOSITORY / "data" / "prepare.py")


def git_blob_id(content):
    """The git blob id of some bytes, computed independently of the script."""
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


def make_pairs(count):
    """A file like the course's Quora files; two rows lack a label, one field has two lines."""
    lines = ["\tid\tsentence1\tsentence2\tis_duplicate"]
    for row in range(count):
        label = "" if row in (3, count - 2) else f"{row % 2}.0"
        lines.append(f'{row * 7}\t{row:025x}\t"Why ""{row}""?"\tHow {row}, é?\t{label}')
    return "\n".join([*lines, f'9\t{count:025x}\t"two\nlines"\t?\t1.0', ""]).encode()


BIG, SMALL = "ids-sst-dev.csv", "quora-dev.csv"  # in the order in which they are downloaded
CONTENTS = {BIG: make_pairs(3000), SMALL: make_pairs(40)}
BLOBS = {name: git_blob_id(content) for name, content in CONTENTS.items()}
SIZE = len(CONTENTS[BIG])
# It sends fewer bytes than a file object buffers, so a part that is not flushed would be empty.
STALL, CUT = {"count": 900, "stalls": True}, {"count": 500}
TABLES = {
    "COMMON_BLOBS": {BIG: BLOBS[BIG]},
    "COURSES": {y: (f"owner/{y}", "c0ffee", {SMALL: BLOBS[SMALL]}) for y in (2024, 2023)},
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a GET with a file of `server.contents`, from the byte on that is asked for.

    Each request takes a fault off `server.faults`: another `status`, another first byte (`start`),
    the `count` of bytes after which it breaks off, and whether it `stalls` instead.
    `server.log` holds (path, Range header or None, bytes of body sent).
    """

    def log_message(self, *args):
        """Silent."""

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        body = server.contents.get(self.path.rsplit("/", 1)[1])
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        answer = {"status": 206 if wanted else 200, "start": start, "count": None, "stalls": False}
        answer |= server.faults.pop(0) if server.faults else {}
        if body is None or start > len(body):
            answer["status"] = 404 if body is None else 416
        rest = b"" if answer["status"] >= 400 else body[answer["start"] :]
        sent = rest[: answer["count"]]
        server.log.append((self.path, wanted, len(sent)))
        self.send_response(answer["status"])
        self.send_header("Content-Range", f"bytes {answer['start']}-")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(sent)
        if answer["stalls"]:
            server.released.wait(30)


@pytest.fixture
def server(monkeypatch):
    """A running server of CONTENTS; the script's tables describe it, and no attempt waits."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    for name, table in TABLES.items():
        monkeypatch.setattr(prepare, name, table)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.contents, running.faults, running.log = dict(CONTENTS), [], []
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        running.released = threading.Event()
        running.handle_error = lambda *args: None  # some tests kill the client
        thread = threading.Thread(target=running.serve_forever, args=[0.02])
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def run(server, out, *flags):
    """Run the command in this process; returns its exit code."""
    return prepare.main(["--base_url", server.url, "--out", str(out), *flags])


CHILD = f"""
import signal, sys
sys.path.insert(0, {str(REPOSITORY / "data")!r})
import prepare
vars(prepare).update({TABLES!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may ignore it
sys.exit(prepare.main())
"""


def start_child(server, out):
    """Start the command in a process of its own, to be stopped."""
    command = [sys.executable, "-B", "-c", CHILD, "--base_url", server.url, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents_of(folder):
    """File name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def only_error(capsys):
    """What was written to standard error: one line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_every_file_is_fetched_once_at_the_pinned_commit(server, tmp_path, capsys):
    assert run(server, tmp_path) == 0
    assert contents_of(tmp_path) == CONTENTS
    assert [log[0] for log in server.log] == [f"/owner/2024/c0ffee/data/{n}" for n in CONTENTS]
    printed = capsys.readouterr().out
    # The quoted field of two lines is one row, as it is for the readers of these files.
    assert re.search(rf"ids-sst-dev.csv +{SIZE:,} bytes +3,001 rows  fetched", printed)
    assert re.search(r"quora-dev.csv .* 41 rows  fetched", printed)
    assert "python multitask_classifier.py --pretrained bundled --recipe best" in printed
    server.log.clear()
    assert run(server, tmp_path) == 0
    assert server.log == []
    assert capsys.readouterr().out.count("rows  ok") == len(CONTENTS)


def test_a_closed_standard_output_does_not_stop_the_downloads(server, tmp_path):
    with start_child(server, tmp_path) as child:
        child.stdout.close()
        assert child.wait(timeout=60) == 0, child.stderr.read()
    assert contents_of(tmp_path) == CONTENTS


def test_the_tables_name_twelve_files_a_year_with_whole_blob_ids():
    for year in (2024, 2023):
        files = prepare.files_of(year, "full")
        assert len(files) == 12
        assert all(re.fullmatch("[0-9a-f]{40}", blob) for _, blob in files.values())


@pytest.mark.parametrize(
    "part, fault, requests, state",
    [
        (b"", {"count": 70_000}, [(None, 70_000), ("bytes=70000-", SIZE - 70_000)], "resumed"),
        # Appending a whole body to the part would need another request to repair it.
        (CONTENTS[BIG][:9], {"status": 200, "start": 0}, [("bytes=9-", SIZE)], "fetched"),
        (CONTENTS[BIG][:9], {"start": 0}, [("bytes=9-", SIZE)], "fetched"),
        (CONTENTS[BIG] + b"more", {}, [(f"bytes={SIZE + 4}-", 0), (None, SIZE)], "fetched"),
        (b"x" * 1000, {}, [("bytes=1000-", SIZE - 1000), (None, SIZE)], "fetched"),
        (CONTENTS[BIG], {}, [], "resumed"),
    ],
    ids=["broken", "range ignored", "wrong range", "too long", "of another file", "finished"],
)
def test_a_part_is_resumed_where_it_can_be(server, tmp_path, capsys, part, fault, requests, state):
    (tmp_path / f"{BIG}.part").write_bytes(part)
    server.faults = [fault]
    assert run(server, tmp_path) == 0
    assert [(wanted, sent) for path, wanted, sent in server.log if BIG in path] == requests
    assert contents_of(tmp_path) == CONTENTS
    assert re.search(rf"{BIG} .* rows  {state}\n", capsys.readouterr().out)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_download_has_no_final_name_and_is_resumed(server, tmp_path, number, code):
    server.faults = [STALL]
    part, sent, deadline = tmp_path / f"{BIG}.part", STALL["count"], time.monotonic() + 20
    with start_child(server, tmp_path) as child:
        while not part.exists() or part.stat().st_size < sent:
            assert time.monotonic() < deadline, "the part has not grown in 20 s"
            threading.Event().wait(0.02)
        child.send_signal(number)
        _, error = child.communicate(timeout=20)
    assert child.returncode == code
    assert error == ("interrupted: run the same command again to resume\n" if code == 130 else "")
    assert contents_of(tmp_path) == {part.name: CONTENTS[BIG][:sent]}
    server.log.clear()
    assert run(server, tmp_path) == 0
    assert server.log[0][1:] == (f"bytes={sent}-", SIZE - sent)
    assert contents_of(tmp_path) == CONTENTS


@pytest.mark.parametrize(
    "content, faults, flags, requests, kept, hint",
    [
        (b"<!DOCTYPE html><html>Please log in</html>", [], "", 2, 0, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", [], "", 2, 0, "git-LFS pointer"),
        (CONTENTS[BIG].replace(b"How 7", b"How 8", 1), [], "", 2, 0, "other content"),
        (b"", [], "", 2, 0, "empty"),
        (None, [], "", 1, 0, "404"),
        (CONTENTS[BIG], [CUT, CUT, {"status": 503}], "--retries 2", 3, 1000, "attempt 3 of 3"),
        (CONTENTS[BIG], [STALL], "--retries 0 --timeout 0.3", 1, STALL["count"], "timed out"),
        (CONTENTS[BIG], [], "--retries 0 --base_url http://127.0.0.1:1", 0, 0, "refused"),
    ],
    ids=["page", "pointer", "edited", "empty", "missing", "broken", "silent", "not listening"],
)
def test_a_failed_download_is_exit_1_and_never_gets_the_final_name(
    server, tmp_path, capsys, content, faults, flags, requests, kept, hint
):
    server.contents[BIG], server.faults = content, list(faults)
    started = time.monotonic()
    assert run(server, tmp_path, *flags.split()) == 1
    assert time.monotonic() - started < 10
    *retries, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and hint in error
    assert len(retries) == 2 * (CUT in faults)
    assert "same command" in error or content is None
    assert BLOBS[BIG] in error or content in (CONTENTS[BIG], None)
    assert len(server.log) == requests
    assert contents_of(tmp_path) == ({f"{BIG}.part": CONTENTS[BIG][:kept]} if kept else {})


def test_another_file_in_the_way_is_kept_until_a_right_one_replaces_it(server, tmp_path, capsys):
    own = tmp_path / SMALL
    own.write_bytes(b"own\n")
    assert run(server, tmp_path) == 2
    error = only_error(capsys)
    assert str(own) in error and "--overwrite" in error
    assert server.log == []  # reported before any download, though another file comes first
    server.contents[SMALL] = b"something else\n"
    assert run(server, tmp_path, "--overwrite") == 1
    assert own.read_bytes() == b"own\n"
    server.contents[SMALL] = CONTENTS[SMALL]
    assert run(server, tmp_path, "--overwrite") == 0
    assert own.read_bytes() == CONTENTS[SMALL]


def test_a_path_that_cannot_be_written_is_one_line(server, tmp_path, capsys):
    (tmp_path / "file").write_text("a file where the folder should be")
    (tmp_path / "out" / f"{BIG}.part").mkdir(parents=True)
    for out in ("file", "out"):
        assert run(server, tmp_path / out) == 1
        assert "--out" in only_error(capsys)


ADDRESSES = "file:///etc", "http://", "http://a b", "http://[::1", "http://a_b..c", "http://host:x"
ADDRESSES += "http://user@host", "http://host/?x", "http://host/ü"


@pytest.mark.parametrize(
    "flag, value, hint",
    [
        ("--quor", "small", "did you mean --quora?"),  # no silent abbreviation
        ("--year", "2022", "2024"),
        *(("--retries", x, f"expected 0, 1, 2, ..., found {x}") for x in ("-1", "x")),
        *(("--timeout", x, f"at most 86400, found {x}") for x in ("0", "nan", "soon", "1e300")),
        *(("--base_url", x, f"expected http://... or https://..., found {x}") for x in ADDRESSES),
    ],
)
def test_a_wrong_flag_is_exit_2_in_one_line(capsys, flag, value, hint):
    with pytest.raises(SystemExit) as stopped:
        prepare.main([flag, value])
    assert stopped.value.code == 2 and hint in only_error(capsys)


def read_rows(content):
    """The rows of a file, header first."""
    return list(csv.reader(content.decode().splitlines(keepends=True), delimiter="\t"))


def test_the_deal_loses_and_doubles_nothing(tmp_path):
    source = tmp_path / "source.csv"
    source.write_bytes(make_pairs(5000))
    dealt = prepare.deal_small_quora(source)
    train, dev, test = (read_rows(dealt[name]) for name in prepare.SMALL_BLOBS)
    assert (len(train), len(dev), len(test)) == (5001 - 2 * 2106 + 1, 2107, 2107)
    assert test[0] == ["", "id", "sentence1", "sentence2"]
    originals = {row[1]: row for row in read_rows(make_pairs(5000))[1:]}
    seen = [*train[1:], *dev[1:], *([*row, originals[row[1]][4]] for row in test[1:])]
    assert sorted(seen) == sorted(originals.values())
    assert [row[4] for row in train].count("") == 2 and [row[4] for row in train[-2:]] == ["", ""]
    # A row has the same bytes as before: quotes stay doubled where they were.
    assert b'"Why ""12""?"' in b"".join(dealt.values())


def test_a_deal_with_another_result_is_an_error(server, tmp_path, capsys):
    assert run(server, tmp_path, "--quora", "small") == 1
    assert "otherwise than published" in only_error(capsys)
    assert set(contents_of(tmp_path)) == {BIG, prepare.SMALL_SOURCE}
    # It is the 2023 dev file that is dealt, and the large files are not downloaded.
    assert [path.split("/")[2] for path, *_ in server.log] == ["2024", "2023"]


def rebuild_2023_dev(files):
    """A 2023 dev file that deals out to these files. What the rule does not use is made up."""
    (header, *train), (_, *dev), (_, *test) = map(read_rows, files.values())
    shuffled = [[*row, "0.0"] for row in test] + dev + train[:-2]
    order = list(range(len(shuffled)))
    random.Random(224).shuffle(order)
    original = [row for _, row in sorted(zip(order, shuffled, strict=True))]
    original.insert(100, train[-2])
    original.insert(15_000, train[-1])
    return prepare.to_tsv([header, *original])


def test_small_quora_is_the_published_split(server, real_data, monkeypatch, tmp_path, capsys):
    """Byte for byte, and it replaces other Quora files only with --overwrite."""
    published = {name: (real_data / name).read_bytes() for name in prepare.SMALL_BLOBS}
    source = server.contents[SMALL] = rebuild_2023_dev(published)
    monkeypatch.setitem(prepare.COURSES[2023][2], SMALL, git_blob_id(source))
    (tmp_path / "quora-train.csv").write_bytes(b"the large file\n")
    assert run(server, tmp_path, "--quora", "small") == 2
    assert "--overwrite" in only_error(capsys)
    assert contents_of(tmp_path) == {"quora-train.csv": b"the large file\n"}
    assert run(server, tmp_path, "--quora", "small", "--overwrite") == 0
    assert contents_of(tmp_path) == {BIG: CONTENTS[BIG], prepare.SMALL_SOURCE: source} | published
    assert re.search(r"quora-train.csv .* 16,002 rows  dealt", capsys.readouterr().out)
    server.log.clear()
    for _ in range(2):
        assert run(server, tmp_path, "--quora", "small") == 0
        (tmp_path / prepare.SMALL_SOURCE).unlink(missing_ok=True)  # what comes from it is there
    assert server.log == []


def test_the_real_files_have_the_blob_ids_of_the_tables(real_data):
    """A blob id that is mistyped, or computed wrongly, would refuse good files."""
    table = {**prepare.COMMON_BLOBS, **prepare.SMALL_BLOBS}
    assert {name: prepare.blob_id(real_data / name) for name in table} == table
