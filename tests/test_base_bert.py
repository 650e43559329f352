"""Where weights come from: folders, the hub's cache, the hub itself (played by a local server)."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import base_bert
from base_bert import (
    BUNDLED_ENCODER,
    REVISIONS,
    SHA256,
    VOCABULARIES,
    load_encoder,
    published_to_own,
    read_tensors,
    resolve_encoder,
    write_tensors,
)
from bert import BertModel
from config import UserError
from tokenizer import BertTokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[2, 9, 14, 22, 3], [2, 30, 11, 3, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def tiny_folder(tiny_config, toy_vocab_folder, tmp_path):
    """A saved tiny encoder with its tokenizer."""
    torch.manual_seed(2)
    folder = tmp_path / "encoder"
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    BertModel(tiny_config).save_pretrained(folder, tokenizer)
    return folder


def change_tensors(folder, change):
    """Rewrite the weights of a folder after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ------------------------------------------------------------------------------- a local folder


def test_saved_and_loaded_the_outputs_are_the_same(tiny_config, tiny_folder):
    torch.manual_seed(2)
    expected = BertModel(tiny_config).eval()(IDS, MASK)
    model = BertModel.from_pretrained(tiny_folder)
    assert model.config == tiny_config
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, tensor in model(IDS, MASK).items():
        assert torch.equal(tensor, expected[name])


def test_weights_in_another_precision_load_as_fp32(tiny_folder):
    def halve(tensors):
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    expected = load_file(tiny_folder / "model.safetensors")
    change_tensors(tiny_folder, halve)
    for name, tensor in BertModel.from_pretrained(tiny_folder).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float())


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_published_names_of_every_age_are_accepted(tiny_folder, prefix):
    """`bert-base-uncased` itself has the prefix, gamma and beta, and the pre-training heads."""
    expected = BertModel.from_pretrained(tiny_folder)(IDS, MASK)["pooler_output"]

    def age(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[prefix + old] = tensors.pop(name)
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(40)[None]
        tensors["cls.predictions.bias"] = torch.zeros(7)
        tensors["cls.seq_relationship.weight"] = torch.zeros(2, 32)

    change_tensors(tiny_folder, age)
    assert torch.equal(BertModel.from_pretrained(tiny_folder)(IDS, MASK)["pooler_output"], expected)


def test_names_are_mapped_one_by_one():
    layer = "encoder.layer.3.attention.output.LayerNorm"
    assert published_to_own(f"bert.{layer}.gamma") == f"{layer}.weight"
    assert published_to_own(f"{layer}.beta") == f"{layer}.bias"
    assert published_to_own("bert.pooler.dense.weight") == "pooler.dense.weight"
    assert published_to_own("bert.embeddings.position_ids") is None
    assert published_to_own("cls.predictions.transform.LayerNorm.gamma") is None
    assert published_to_own("classifier.weight") == "classifier.weight"  # and so unexpected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.layer.1.output.dense.bias"),
         "missing encoder.layer.1.output.dense.bias"),
        (lambda t: t.pop("pooler.dense.weight"), "missing pooler.dense.weight"),
        (lambda t: t.update({"classifier.weight": torch.zeros(2, 32)}),
         "unexpected classifier.weight"),
        (lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.zeros(32)}),
         "unexpected encoder.layer.2.output.dense.bias"),
        (lambda t: t.update({"pooler.dense.bias": torch.zeros(33)}),
         r"pooler.dense.bias is \(33,\), expected \(32,\)"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(tiny_folder, change, message):
    change_tensors(tiny_folder, change)
    with pytest.raises(UserError, match=message):
        BertModel.from_pretrained(tiny_folder)


def test_many_problems_are_cut_short(tiny_folder):
    change_tensors(tiny_folder, dict.clear)
    with pytest.raises(UserError, match=r"missing .* and \d+ more$"):
        BertModel.from_pretrained(tiny_folder)


def test_a_configuration_that_does_not_fit_the_weights_is_an_error(tiny_folder):
    path = tiny_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 36}))
    with pytest.raises(UserError, match=r"expected .*36"):
        BertModel.from_pretrained(tiny_folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_weights_are_an_error(tiny_folder, keep):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path}: not a complete safetensors file"):
        BertModel.from_pretrained(tiny_folder)


def test_a_pickle_in_place_of_the_weights_is_an_error(tiny_folder):
    torch.save({"x": torch.zeros(2)}, tiny_folder / "model.safetensors")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        BertModel.from_pretrained(tiny_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_an_encoder_says_what_is_missing(tiny_folder, name):
    (tiny_folder / name).unlink()
    with pytest.raises(UserError, match=f"no {name}"):
        resolve_encoder(str(tiny_folder))


def test_a_vocabulary_larger_than_the_embedding_table_is_an_error(tiny_folder):
    with open(tiny_folder / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="does not fit vocab_size"):
        load_encoder(str(tiny_folder))


def test_the_tokenizers_limit_is_never_beyond_the_positions(tiny_folder):
    settings = {"do_lower_case": True, "model_max_length": 512}
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_encoder(str(tiny_folder))[1].model_max_length == 40


def test_a_folder_is_described_by_its_path_and_hash(tiny_folder):
    encoder = resolve_encoder(str(tiny_folder))
    weights = (tiny_folder / "model.safetensors").read_bytes()
    assert encoder.describe() == {
        "name": str(tiny_folder), "revision": None, "sha256": sha256(weights).hexdigest(),
        "substituted": False, "settings_sha256": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["no_such_folder", "./a/b", "/no/such/folder", "a/b/c", "~/x", "my models/bert", "a/b--c",
     "a/b.git", "C:\\models/bert", "~nobody of that name/bert", "a/" + 300 * "b"],
)  # fmt: skip
def test_what_is_neither_a_folder_nor_a_hub_name_is_an_error(name):
    with pytest.raises(UserError, match="neither a folder nor the name of an encoder"):
        resolve_encoder(name)


def test_written_tensors_are_readable_by_whoever_may_read_the_folder(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2, 3).T}, {"step": "3"})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["a"], torch.ones(3, 2))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


# ------------------------------------------------------------------------------- the hub

HUB_SCRIPT = """
import json, sys, time
from base_bert import load_encoder
for name in json.loads(sys.argv[1]):
    began = time.perf_counter()
    try:
        encoder, _ = load_encoder(name)
        found = {**encoder.describe(), "folder": str(encoder.folder)}
    except Exception as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print("found " + json.dumps(found | {"seconds": time.perf_counter() - began}))
"""


def resolve_elsewhere(names, home, endpoint, **environment):
    """`load_encoder` of each name in a process of its own, which reads the hub's settings anew."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGINGFACE"))}
    no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, json.dumps(names)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env=kept | no_proxy | settings | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("found ")]
    assert len(lines) == len(names), done.stdout + done.stderr
    return [json.loads(line) for line in lines]


CLOSED = "http://127.0.0.1:9"  # the discard port: nothing answers there


def fill_cache(home, repo, revision, files):
    """A hub cache that holds `files` (name -> bytes) of `repo`, as the hub's client lays it out."""
    repo_folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = repo_folder / "snapshots" / revision
    for folder in (snapshot, repo_folder / "blobs", repo_folder / "refs"):
        folder.mkdir(parents=True)
    (repo_folder / "refs" / "main").write_text(revision)
    for name, content in files.items():
        blob = repo_folder / "blobs" / sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def contents(folder):
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_the_hub_a_named_encoder_is_an_error_and_the_default_is_replaced(
    tmp_path, bundled_folder
):
    """Fast, with the way out; and the encoder that stands in says so."""
    named, published, default = resolve_elsewhere(
        ["some/encoder", "bert-base-uncased", None], tmp_path, CLOSED
    )
    for found, repo in ((named, "some/encoder"), (published, "google-bert/bert-base-uncased")):
        assert found["error"] == "UserError"
        assert repo in found["message"]
        assert "--pretrained bundled" in found["message"]
        assert found["seconds"] < 15
    assert default["substituted"] is True
    assert default["name"] == BUNDLED_ENCODER
    assert default["sha256"] == SHA256[BUNDLED_ENCODER]
    assert default["seconds"] < 20
    assert not list(tmp_path.rglob("*.incomplete"))


def test_in_offline_mode_the_cache_is_used_and_damage_in_it_is_found(tmp_path, tiny_folder):
    """A cached encoder needs no hub; wrong bytes of the default encoder are never replaced by
    another encoder in silence."""
    home = tmp_path / "home"
    default = "google-bert/bert-base-uncased"
    cached = fill_cache(home, "toy/cached", "1" * 40, contents(tiny_folder))
    damaged = fill_cache(home, default, REVISIONS[default], contents(tiny_folder))
    toy, unnamed, named = resolve_elsewhere(
        ["toy/cached", None, default], home, CLOSED, HF_HUB_OFFLINE="1"
    )
    assert Path(toy["folder"]) == cached
    assert toy["name"] == "toy/cached"
    blob = (damaged / "model.safetensors").resolve()
    for found in (unnamed, named):
        assert found["error"] == "UserError"
        assert str(blob) in found["message"]
        assert "remove it" in found["message"]


@contextmanager
def hub(files, broken=(), refused=()):
    """A server that plays the hub: `files` (repo, name) -> bytes; those in `broken` break off, and
    those in `refused` may not be read.

    Yields its address and the list of what was asked of it, as (method, path).
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def end_headers(self):
            self.send_header("Connection", "close")
            super().end_headers()

        def answer(self, with_body):
            asked.append((self.command, self.path))
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
            content = files.get(match.groups()) if match else None
            if match and match.groups() in refused:
                self.send_response(429)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if content is None:
                self.send_response(200 if self.path == "/" else 404)
                if match:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", "2" * 40)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                half = len(content) // 2 if match.groups() in broken else len(content)
                self.wfile.write(content[:half])
                self.wfile.flush()

        def log_message(self, *args):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_encoder_is_fetched_from_the_hub_once(tmp_path, tiny_folder):
    """A second time it comes from the cache, with no request at all. Wrong bytes under the default
    encoder's name are an error, never a reason to take another encoder."""
    home = tmp_path / "home"
    default = "google-bert/bert-base-uncased"
    files = {
        (repo, name): content
        for repo in ("toy/encoder", default)
        for name, content in contents(tiny_folder).items()
    }
    with hub(files) as (address, asked):
        first, second, missing, wrong = resolve_elsewhere(
            ["toy/encoder", "toy/encoder", "toy/absent", None], home, address
        )
        assert ("GET", "/toy/encoder/resolve/main/model.safetensors") in asked
        gets = [path for method, path in asked if method == "GET" and "/toy/encoder/" in path]
    assert first["name"] == "toy/encoder"
    assert first["sha256"] == sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert first["folder"] == second["folder"]
    assert sorted(path.rsplit("/", 1)[1] for path in gets) == [
        "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert missing["error"] == "UserError"
    assert "toy/absent" in missing["message"]
    assert wrong["error"] == "UserError"
    assert "not the published file" in wrong["message"]


def test_a_download_that_breaks_off_is_an_error_never_another_encoder(tmp_path, tiny_folder):
    """The default encoder: once the download has begun there is no falling back."""
    default = "google-bert/bert-base-uncased"
    files = {(default, name): content for name, content in contents(tiny_folder).items()}
    with hub(files, broken={(default, "model.safetensors")}) as (address, asked):
        began = time.perf_counter()
        (found,) = resolve_elsewhere([None], tmp_path / "home", address)
        assert time.perf_counter() - began < 60
        assert any(path.endswith("model.safetensors") for method, path in asked if method == "GET")
    assert found.get("error") == "UserError", found
    assert "model.safetensors" in found["message"]
    assert default in found["message"]


def test_a_hub_that_refuses_has_not_said_that_a_file_is_not_there(tmp_path, tiny_folder):
    """Without its settings a cased tokenizer would make everything lower case, without a word."""
    files = {("toy/encoder", name): content for name, content in contents(tiny_folder).items()}
    for name in ("tokenizer_config.json", "config.json"):
        with hub(files, refused={("toy/encoder", name)}) as (address, _):
            (found,) = resolve_elsewhere(["toy/encoder"], tmp_path / name, address)
        assert found.get("error") == "UserError", found
        assert f"{name} not downloaded" in found["message"]
    without = {key: content for key, content in files.items() if "tokenizer" not in key[1]}
    with hub(without) as (address, _):
        (found,) = resolve_elsewhere(["toy/encoder"], tmp_path / "without", address)
    assert found["name"] == "toy/encoder"


def test_either_vocabulary_on_the_hub_will_do(tmp_path, tiny_folder):
    """`transformers` 5 writes `tokenizer.json` alone; without either there is no encoder."""
    BertTokenizer.from_pretrained(tiny_folder).save_pretrained(tiny_folder)
    for absent, problem in ((("vocab.txt",), None), (VOCABULARIES, "no vocab.txt and no")):
        files = {("toy/encoder", n): b for n, b in contents(tiny_folder).items() if n not in absent}
        with hub(files) as (address, _):
            first, again = resolve_elsewhere(["toy/encoder"] * 2, tmp_path / absent[-1], address)
        if problem:
            assert problem in first["message"] and first["error"] == "UserError"
        else:
            assert "folder" in first and "folder" in again, (first, again)
            assert Path(first["folder"]).is_dir() and first["folder"] == again["folder"]


@contextmanager
def no_hub(greeting):
    """A server that is none of the hub: it says `greeting` to whoever comes. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_is_not_the_hub_is_none(tmp_path, bundled_folder):
    with no_hub(b"SSH-2.0-OpenSSH_9.0\r\n") as address:
        (found,) = resolve_elsewhere([None], tmp_path, address)
    assert found["substituted"] is True


def test_silence_is_waited_for_once_however_many_addresses_the_hub_has(monkeypatch):
    """A timeout of the socket's own counts anew for each."""
    monkeypatch.setattr(base_bert, "PROBE_SECONDS", 0.3)
    silence = threading.Event()

    def address_after_address(*_, **__):
        silence.wait(20)
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", address_after_address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    began = time.perf_counter()
    assert base_bert._hub_reachable() is False
    assert time.perf_counter() - began < 10
    silence.set()


# ------------------------------------------------------------------------------- the real ones


def test_the_bundled_encoder_is_the_published_file(bundled_folder):
    encoder, tokenizer = load_encoder("bundled")
    assert encoder.folder == bundled_folder
    assert encoder.sha256 == SHA256[BUNDLED_ENCODER]
    assert (encoder.name, encoder.substituted) == (BUNDLED_ENCODER, False)
    assert len(tokenizer) == 30522


GOLDEN_IDS = [[101, 7592, 2088, 102, 0, 0, 0, 0], [101, 7592, 15756, 2897, 2005, 17953, 2361, 102]]
GOLDEN = {  # the course's own published check: first values and norm
    "state 0": ([-0.16888, 0.13606, -0.13940, -0.05436, -0.29527, -0.24611], 14.87603),
    "state 1": ([-0.44185, -0.51507, -0.15365, 0.20939, -0.02733, -0.15256], 14.38921),
    "pooled 0": ([-0.90615, -0.31115, -0.62165, 0.77409, 0.28987, -0.19024], 16.80862),
    "pooled 1": ([-0.80426, -0.28601, -0.28289, 0.49109, 0.17010, -0.14788], 14.54416),
}


@pytest.mark.pretrained
def test_golden_numbers_of_bert_base_uncased():
    ids = torch.tensor(GOLDEN_IDS)
    with torch.no_grad():
        outputs = BertModel.from_pretrained("bert-base-uncased")(ids, (ids != 0).long())
    for row in (0, 1):
        for name, tensor in (
            (f"state {row}", outputs["last_hidden_state"][row, 0]),
            (f"pooled {row}", outputs["pooler_output"][row]),
        ):
            values, norm = GOLDEN[name]
            assert tensor[:6].tolist() == pytest.approx(values, abs=1e-5, rel=1e-3)
            assert tensor.norm().item() == pytest.approx(norm, rel=1e-3)
