"""Where an encoder comes from: a folder, the package, the hub's cache, the hub (a local server)."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from conftest import REPOSITORY

from base_bert import load_encoder
from config import UserError
from runtime import hub
from runtime.hub import BUNDLED_ENCODER, DEFAULT_ENCODER, SHA256, resolve_encoder
from tokenizer import BertTokenizer

# ------------------------------------------------------------------------ folders and the package


def test_a_folder_is_described_by_its_path_and_hash(tiny_folder):
    digest = sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    expected = {"name": str(tiny_folder), "revision": None, "sha256": digest}
    expected |= {"substituted": False, "settings_sha256": None, "best": None}
    assert resolve_encoder(str(tiny_folder)).describe() == expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_an_encoder_says_what_is_missing(tiny_folder, name):
    (tiny_folder / name).unlink()
    with pytest.raises(UserError, match=f"no {name}"):
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


NO_ENCODERS = ["no_such_folder", "./a/b", "/no/such/folder", "a/b/c", "~/x", "a/b--c", "a/b.git"]
NO_ENCODERS += ["C:\\models/bert", "my models/bert", "~nobody of that name/bert", "a/" + 300 * "b"]


@pytest.mark.parametrize("name", NO_ENCODERS)
def test_what_is_neither_a_folder_nor_a_hub_name_is_an_error(name):
    with pytest.raises(UserError, match="neither a folder nor the name of an encoder"):
        resolve_encoder(name)


def test_the_bundled_encoder_is_the_published_file(bundled_folder):
    encoder, tokenizer = load_encoder("bundled")
    assert (encoder.name, encoder.substituted) == (BUNDLED_ENCODER, False)
    assert (encoder.folder, encoder.sha256) == (bundled_folder, SHA256[BUNDLED_ENCODER])
    assert len(tokenizer) == 30522


# ------------------------------------------------------------------------------- without the hub

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing answers there
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


def resolve_elsewhere(names, home, endpoint, **environment):
    """`resolve_encoder` of each name, in a new process: the client reads its settings at import."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGINGFACE"))}
    no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(names)],
        cwd=REPOSITORY,
        env=kept | no_proxy | settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("found ")]
    assert len(lines) == len(names), done.stdout + done.stderr
    return [json.loads(line) for line in lines]


@pytest.fixture
def contents(tiny_folder):
    """The files of a tiny encoder by name."""
    (tiny_folder / "tokenizer.json").unlink()
    (tiny_folder / "special_tokens_map.json").unlink()
    return {path.name: path.read_bytes() for path in tiny_folder.iterdir()}


def test_without_the_hub_the_default_falls_back_and_a_named_encoder_is_an_error(
    tmp_path, bundled_folder
):
    """Both within seconds. Also where what is named is the default."""
    default, named = resolve_elsewhere([None, "bert-base-uncased"], tmp_path, CLOSED)
    assert default["substituted"] is True
    assert (default["name"], default["sha256"]) == (BUNDLED_ENCODER, SHA256[BUNDLED_ENCODER])
    assert default["seconds"] < 20
    assert named["error"] == "UserError"
    assert f"encoder {DEFAULT_ENCODER}: not in the cache" in named["message"]
    assert "--pretrained bundled" in named["message"]
    assert named["seconds"] < 15
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_server_that_is_not_the_hub_counts_as_no_hub(tmp_path, bundled_folder):
    def greet():
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        (found,) = resolve_elsewhere([None], tmp_path, address)
    assert found["substituted"] is True


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
    may not be read.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            file = re.sub("^/(.*)/resolve/[^/]*/", r"\1/", self.path)
            content = files.get(file, b"")
            known = file in files or file == "/"
            self.send_response(403 if file in refused else 200 if known else 404)
            self.send_header("X-Repo-Commit", "2" * 40)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            if not known:
                self.send_header("X-Error-Code", "EntryNotFound")
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


def of_repository(repo, contents, without=()):
    """`contents` as the files of a repository on the `local_hub`."""
    return {f"{repo}/{name}": c for name, c in contents.items() if name not in without}


def test_an_encoder_is_fetched_from_the_hub_once(tmp_path, contents):
    """The second time there is no request. Wrong bytes of the default encoder are an error, from
    the hub and from the cache, and never a reason to use another encoder."""
    files = of_repository("toy/encoder", contents) | of_repository(DEFAULT_ENCODER, contents)
    names = ["toy/encoder", "toy/encoder", "toy/absent", None, None]
    with local_hub(files) as (address, asked):
        first, second, missing, *wrong = resolve_elsewhere(names, tmp_path, address)
    requests = [request for request in asked if "/toy/encoder/" in request]
    gets = {f"GET /toy/encoder/resolve/main/{name}" for name in contents}
    assert gets <= set(requests) and len(requests) == len(set(requests))
    assert first["name"] == "toy/encoder"
    assert first["sha256"] == sha256(contents["model.safetensors"]).hexdigest()
    assert first["folder"] == second["folder"]
    assert "toy/absent" in missing["message"]
    assert ["not the published file" in found["message"] for found in wrong] == [True, True]
    assert {found["error"] for found in (missing, *wrong)} == {"UserError"}


def test_a_download_that_breaks_off_is_an_error_and_never_another_encoder(tmp_path, contents):
    files = of_repository(DEFAULT_ENCODER, contents)
    with local_hub(files, broken={f"{DEFAULT_ENCODER}/model.safetensors"}) as (address, _):
        (found,) = resolve_elsewhere([None], tmp_path, address)
    assert found["error"] == "UserError"
    assert f"{DEFAULT_ENCODER}: model.safetensors not downloaded" in found["message"]
    assert found["seconds"] < 60


def test_a_file_that_the_hub_refuses_does_not_count_as_absent(tmp_path, contents):
    """Without its settings a cased tokenizer would silently make everything lower case."""
    for name in ("tokenizer_config.json", "config.json"):
        files = of_repository("toy/encoder", contents)
        with local_hub(files, refused={f"toy/encoder/{name}"}) as (address, _):
            (found,) = resolve_elsewhere(["toy/encoder"], tmp_path / name, address)
        assert found["error"] == "UserError"
        assert f"{name} not downloaded" in found["message"]


def test_one_vocabulary_and_no_tokenizer_settings_will_do(tmp_path, contents, tiny_folder):
    """`transformers` 5 writes `tokenizer.json` alone; without either there is no encoder."""
    BertTokenizer.from_pretrained(tiny_folder).save_pretrained(tiny_folder)
    contents["tokenizer.json"] = (tiny_folder / "tokenizer.json").read_bytes()
    files = (
        of_repository("toy/old", contents, without=("tokenizer.json", "tokenizer_config.json"))
        | of_repository("toy/new", contents, without=("vocab.txt",))
        | of_repository("toy/none", contents, without=hub.VOCABULARIES)
    )
    with local_hub(files) as (address, _):
        old, new, again, none = resolve_elsewhere(
            ["toy/old", "toy/new", "toy/new", "toy/none"], tmp_path, address
        )
    assert old["name"] == "toy/old"
    assert new["name"] == "toy/new"
    assert new["folder"] == again["folder"]
    assert none["error"] == "UserError"
    assert "no vocab.txt and no tokenizer.json" in none["message"]
