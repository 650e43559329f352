"""Where an encoder comes from: a folder, the package, the hub's cache, the hub (a local server)."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import REPOSITORY

from base_bert import load_encoder
from config import UserError
from runtime import hub
from runtime.hub import BUNDLED_ENCODER, DEFAULT_ENCODER, SHA256, resolve_encoder

# ------------------------------------------------------------------------ folders and the package


def test_a_folder_is_described_by_its_path_and_hash(tiny_folder):
    digest = sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    expected = {"name": str(tiny_folder), "revision": None, "sha256": digest}
    expected |= {"substituted": False, "settings_sha256": None, "best": None}
    assert resolve_encoder(str(tiny_folder)).describe() == expected


def test_a_folder_without_an_encoder_says_what_is_missing(tiny_folder):
    for name, words in (("model.safetensors", "no model"), ("config.json", "no config.* and no m")):
        (tiny_folder / name).unlink()
        with pytest.raises(UserError, match=f"{tiny_folder}: {words}"):
            resolve_encoder(str(tiny_folder))


def test_row_51_pickled_weights_are_refused_with_the_way_to_convert_them(tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"no model.safetensors; convert .* python -c .*t.AutoModel"
    ):
        resolve_encoder(str(tiny_folder))


def test_row_51_another_architecture_is_named_with_its_folder(tiny_folder):
    path = tiny_folder / "config.json"
    path.write_text(json.dumps({"model_type": "roberta"}))
    (tiny_folder / "vocab.txt").write_text("<s>\n</s>\n")
    (tiny_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{path}: .*model_type is 'roberta'; expected 'bert'"):
        load_encoder(str(tiny_folder))


@pytest.mark.parametrize("name", ["no_such_folder", "./a/b", "~/x", "a/b/c", "a/" + 300 * "b"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_an_error(name):
    with pytest.raises(UserError, match="neither a folder nor the name of an encoder"):
        resolve_encoder(name)


def test_the_bundled_encoder_is_the_published_file(bundled_folder):
    encoder, tokenizer = load_encoder("bundled")
    assert (encoder.name, encoder.substituted) == (BUNDLED_ENCODER, False)
    assert (encoder.folder, encoder.sha256) == (bundled_folder, SHA256[BUNDLED_ENCODER])
    assert len(tokenizer) == 30522


# ------------------------------------------------------------------------------- without the hub

RESOLVE = """
import json, sys, time
from runtime.hub import resolve_encoder
for name in json.loads(sys.argv[1]):
    began = time.perf_counter()
    try:
        encoder = resolve_encoder(name)
        found = {**encoder.describe(), "folder": str(encoder.folder)}
    except Exception as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print("found " + json.dumps(found | {"seconds": time.perf_counter() - began}))
"""


def resolve_elsewhere(names, home, endpoint):
    """`resolve_encoder` of each name, in a new process: the client reads its settings at import."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGINGFACE"))}
    no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(names)],
        cwd=REPOSITORY,
        env=kept | no_proxy | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("found ")]
    assert len(lines) == len(names), done.stdout + done.stderr
    return [json.loads(line) for line in lines]


def test_without_the_hub_the_default_falls_back_and_a_named_encoder_is_an_error(
    tmp_path, bundled_folder
):
    """Both within seconds, also where what is named is the default.

    A server that is not the hub counts as none; row 25 of test_faults.py is a closed port.
    """

    def greet():
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        default, named = resolve_elsewhere([None, "bert-base-uncased"], tmp_path, address)
    assert default["substituted"] is True
    assert (default["name"], default["sha256"]) == (BUNDLED_ENCODER, SHA256[BUNDLED_ENCODER])
    assert default["seconds"] < 20
    assert named["error"] == "UserError"
    assert f"encoder {DEFAULT_ENCODER}: not in the cache" in named["message"]
    assert "--pretrained bundled" in named["message"]
    assert named["seconds"] < 15
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_silent_hub_is_waited_for_once_however_many_addresses_it_has(monkeypatch):
    """The client's own timeout starts again for each address."""
    silence = threading.Event()

    class Client:
        head = staticmethod(lambda *_, **__: silence.wait(20))

    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(huggingface_hub, "get_session", Client)
    began = time.perf_counter()
    assert hub._hub_reachable() is False
    assert time.perf_counter() - began < 10
    silence.set()


# ---------------------------------------------------------------------------------- with the hub


@contextmanager
def local_hub(files, broken=(), refused=()):
    """A server that plays the hub; yields its address and the requests that it has answered.

    `files` are bytes by OWNER/NAME/FILE. The content of `broken` ones ends half-way; `refused` ones
    may not be read, nor anything of toy/private.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            file = re.sub("^/(.*)/resolve/[^/]*/", r"\1/", self.path)
            content = files.get(file, b"")
            known = file in files or file == "/"
            is_private = file.startswith("toy/private/")
            code = 401 if is_private else 403 if file in refused else 200 if known else 404
            self.send_response(code)
            self.send_header("X-Repo-Commit", "2" * 40)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            if not known:
                error = "RepoNotFound" if is_private else "EntryNotFound"
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if file in broken else content)

        do_HEAD = do_GET

        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


SETTINGS = "tokenizer_config.json"
REFUSED = {f"toy/{file}": f"toy/{file}/{file}" for file in ("config.json", SETTINGS)}
LACKS = {  # of repositories on the hub: files of a tiny encoder that they do not have
    "toy/encoder": (),
    "toy/old": ("tokenizer.json", SETTINGS),
    "toy/new": ("vocab.txt",),  # `transformers` 5 writes `tokenizer.json` alone
    "toy/none": hub.VOCABULARIES,
    DEFAULT_ENCODER: (),
} | dict.fromkeys(REFUSED, ())


@pytest.fixture(scope="module")
def files(write_encoder, tmp_path_factory):
    """The content of every file on the hub."""
    folder = write_encoder(tmp_path_factory.mktemp("encoder"))
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {f"{repo}/{n}": contents[n] for repo in LACKS for n in contents.keys() - LACKS[repo]}


@pytest.fixture(scope="module")
def fetched(files, tmp_path_factory):
    """What becomes of each name at the first and the second time, and the hub's requests."""
    names = [*LACKS, "toy/absent", "toy/private"]
    names[names.index(DEFAULT_ENCODER)] = None
    twice = [name for name in names for _ in range(2)]
    with local_hub(files, refused=REFUSED.values()) as (address, asked):
        found = resolve_elsewhere(twice, tmp_path_factory.mktemp("home"), address)
    return {name: pair for name, *pair in zip(names, found[::2], found[1::2], strict=True)}, asked


def test_an_encoder_is_fetched_from_the_hub_once(fetched, files):
    """The second time there is no request."""
    (first, second), asked = fetched[0]["toy/encoder"], fetched[1]
    requests = [request for request in asked if "/toy/encoder/" in request]
    gets = {f"GET /toy/encoder/resolve/main/{n}" for n in (*hub.FILES, *hub.VOCABULARIES, SETTINGS)}
    assert gets <= set(requests) and len(requests) == len(set(requests))
    assert first["name"] == "toy/encoder"
    assert first["sha256"] == sha256(files["toy/encoder/model.safetensors"]).hexdigest()
    assert first["folder"] == second["folder"]


def test_wrong_bytes_of_the_default_encoder_are_an_error_and_never_another_encoder(fetched):
    """From the hub and from the cache."""
    for found in fetched[0][None]:
        assert found["error"] == "UserError"
        assert "not the published file" in found["message"]


def test_a_download_that_breaks_off_is_an_error_and_never_another_encoder(tmp_path, files):
    with local_hub(files, broken={f"{DEFAULT_ENCODER}/model.safetensors"}) as (address, _):
        (found,) = resolve_elsewhere([None], tmp_path, address)
    assert found["error"] == "UserError"
    assert f"{DEFAULT_ENCODER}: model.safetensors not downloaded" in found["message"]
    assert found["seconds"] < 60


def test_a_file_that_the_hub_refuses_does_not_count_as_absent(fetched):
    """Without its settings a cased tokenizer would silently make everything lower case."""
    for repo, file in REFUSED.items():
        found, _ = fetched[0][repo]
        assert found["error"] == "UserError"
        assert f"{file.split('/')[-1]} not downloaded" in found["message"]


def test_a_name_that_the_hub_does_not_show_is_no_fault_of_the_network(fetched):
    for found in fetched[0]["toy/private"]:
        assert found["error"] == "UserError"
        assert "toy/private: not on the hub, or private or gated" in found["message"]


def test_an_incomplete_cache_is_completed_and_one_that_cannot_be_written_is_named(
    tmp_path, files, fetched
):
    """Without its settings a cased tokenizer would silently make everything lower case."""
    found = Path(fetched[0]["toy/encoder"][0]["folder"])
    home = shutil.copytree(found.parents[3], tmp_path / "home", symlinks=True)
    settings = home / found.relative_to(found.parents[3]) / SETTINGS
    settings.unlink()
    with local_hub(files) as (address, _):
        resolve_elsewhere(["toy/encoder"], home, address)
        assert settings.exists()
        (tmp_path / "file").touch()
        (found,) = resolve_elsewhere(["toy/encoder"], tmp_path / "file" / "home", address)
    assert found["error"] == "OutputError" and "HF_HOME" in found["message"]


def test_a_file_that_may_not_be_read_is_named(tiny_folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: "model" not in Path(path).name)
    with pytest.raises(UserError, match=r"model\.safetensors: not readable"):
        resolve_encoder(str(tiny_folder))


@pytest.mark.parametrize("is_shared", [False, True])
def test_row_26_a_damaged_file_of_the_cache_is_found_in_both_layouts(tmp_path, is_shared):
    """The newer one keeps the bytes in a store that several repositories share."""
    named = tmp_path / "repo" / "blobs" / sha256(b"good").hexdigest()
    bytes_at = tmp_path / "blobs" / "ab" / (64 * "c") if is_shared else named
    for path in (named, bytes_at, tmp_path / "repo" / "snapshots" / "1" / "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
    bytes_at.write_bytes(b"good")
    if is_shared:
        named.symlink_to(bytes_at)
    path.symlink_to(f"../../blobs/{named.name}")
    hub._check_download(path)
    bytes_at.write_bytes(b"bad!")
    with pytest.raises(UserError, match=f"{bytes_at}: damaged"):
        hub._check_download(path)


def test_a_server_at_fault_is_not_the_hub(monkeypatch):
    answers = iter((503, 200))
    client = SimpleNamespace(head=lambda *_, **__: SimpleNamespace(status_code=next(answers)))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)
    assert [hub._hub_reachable() for _ in range(2)] == [False, True]


def test_one_vocabulary_and_no_tokenizer_settings_will_do(fetched):
    """Without either vocabulary, or any file at all, there is no encoder."""
    for repo in ("toy/old", "toy/new"):
        first, second = fetched[0][repo]
        assert first["name"] == repo
        assert first["folder"] == second["folder"]
    for repo in ("toy/none", "toy/absent"):
        found, _ = fetched[0][repo]
        assert found["error"] == "UserError"
        assert f"{repo}: the hub has no vocab.txt and no tokenizer.json" in found["message"]
