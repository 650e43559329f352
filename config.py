"""Configuration: the encoder, LoRA, the tasks, the heads and the paper's recipes.

Plain values and their checks; nothing here needs torch.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class UserError(Exception):
    """A mistake in the call or the data: one line on standard error."""

    exit_code = 2


# What the encoder implements. A file that asks for anything else would compute other numbers.
IMPLEMENTED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "model_type": "bert"}


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder, under the names of the published `config.json`.

    The defaults are those of `bert-base-uncased` (Devlin et al. 2019).
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    model_type: str = "bert"

    def __post_init__(self):
        for size in fields(self):
            value = getattr(self, size.name)
            least = 0 if size.name == "pad_token_id" else 1
            if size.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{size.name} is {value!r}; expected an integer from {least} on")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name, value in IMPLEMENTED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {value!r}")

    @classmethod
    def from_file(cls, path):
        """Read a published `config.json`; keys that this encoder does not use are ignored."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a BERT config.json: {error}") from error

    def to_dict(self):
        """Every value, plus the architecture name by which other tools pick their class."""
        return {"architectures": ["BertModel"], **asdict(self)}


LORA_TARGETS = {  # flag value -> the linear layer's name inside one BertLayer
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


LORA_VARIANTS = ("plain", "rslora", "dora")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021): W x + scaling · B A dropout(x).

    `targets` are keys of `LORA_TARGETS`, the kinds of linear layer that get an adapter, in the
    encoder layers with the numbers `layers` (None: in all).
    """

    r: int = 32
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple = tuple(LORA_TARGETS)
    variant: str = "plain"  # of `LORA_VARIANTS`
    layers: tuple | None = None

    @property
    def scaling(self):
        """The low-rank path's factor: alpha / r, in rsLoRA alpha / √r (Kalajdzievski 2023)."""
        return self.alpha / (self.r**0.5 if self.variant == "rslora" else self.r)


@dataclass(frozen=True)
class PALConfig:
    """Projected attention layers (Stickland & Murray 2019): self-attention of `size` dimensions.

    By default hidden size · 204 / 768, the authors' ratio, rounded down to a multiple of `heads`.
    The default of 12 heads is BERT-base's; the authors' code has 6.
    """

    size: int | None = None
    heads: int = 12

    def size_for(self, hidden_size):
        """The dimensions in an encoder of `hidden_size`."""
        return self.size or max(1, hidden_size * 204 // 768 // self.heads) * self.heads


@dataclass(frozen=True)
class Task:
    """A task: its files, columns, labels, heads, metric and prediction header."""

    name: str
    title: str
    files: str  # file name with {split} for train, dev, test-student
    sentences: tuple  # one column, or two for a pair task
    label: str  # label column
    kind: str  # "classes" (cross entropy), "binary" (logistic), "score" (mean squared error)
    num_classes: int  # width of the head's output; 1 for binary and score
    header: str  # second column of the prediction file
    heads: tuple  # choices of --<task>_head, the default first
    low: float = 0.0  # smallest and largest label
    high: float = 1.0
    default: bool = True  # trained unless --tasks says otherwise

    @property
    def is_pair(self):
        """Whether an example has two sentences."""
        return len(self.sentences) == 2

    @property
    def metric(self):
        """The metric that counts for selection and the overall score."""
        return "pearson" if self.kind == "score" else "accuracy"

    def file_name(self, split):
        """File name of `split` ("train", "dev" or "test")."""
        return self.files.format(split="test-student" if split == "test" else split)

    def output_name(self, split):
        """Name of the prediction file of `split` ("dev" or "test")."""
        return f"{self.name}-{split}-output.csv"

    def format(self, prediction):
        """A prediction as the course's script prints it: class `3`, binary `1.0`, score `3.25`."""
        return str(int(prediction)) if self.kind == "classes" else str(prediction)


SENTENCE, PAIR = ("sentence",), ("sentence1", "sentence2")

# fmt: off
TASKS = {
    task.name: task
    for task in (
        Task("sst", "sentiment", "ids-sst-{split}.csv", SENTENCE, "sentiment",
             "classes", 5, "Predicted_Sentiment", ("ffn", "linear"), high=4),
        Task("para", "paraphrase", "quora-{split}.csv", PAIR, "is_duplicate",
             "binary", 1, "Predicted_Is_Paraphrase",
             ("features", "dot", "cosine", "features+cosine")),
        Task("sts", "similarity", "sts-{split}.csv", PAIR, "similarity",
             "score", 1, "Predicted_Similiary", ("cosine", "linear"), high=5),  # spelt so there
        Task("cfimdb", "movie reviews", "ids-cfimdb-{split}.csv", SENTENCE, "sentiment",
             "classes", 2, "Predicted_Sentiment", ("ffn", "linear"), default=False),
    )
}
# fmt: on


def overall_tasks(names):
    """The tasks of `names` that count for the overall score.

    An optional task such as CFIMDB counts only if there is no other.
    """
    return [name for name in names if TASKS[name].default] or list(names)


@dataclass(frozen=True)
class MultitaskConfig:
    """The part above the encoder: heads, pooling and the losses of a training step."""

    tasks: tuple = ("sst", "para", "sts")
    heads: dict = field(default_factory=dict)  # task -> head, if not the default
    joint: tuple = ()  # pair tasks encoded as one sequence, [CLS] a [SEP] b [SEP]
    both: tuple = ()  # pair tasks encoded both as one sequence and as two
    pooling: str = "mean"  # "mean" over the real tokens or "cls", the first token
    dropout: float = 0.1  # in front of a head's linear layers
    max_length: int = 512  # tokens of a sequence, special tokens included
    simcse_tasks: tuple = ()  # tasks with the unsupervised contrastive loss
    supervised_simcse: bool = False  # contrastive loss on the paraphrase pairs
    r_drop: tuple = ()  # tasks with R-Drop: two passes should predict the same
    swap_pairs: bool = False  # R-Drop's second pass swaps a pair's sentences
    mlm: tuple = ()  # tasks with masked language modelling on their sentences; may have no head

    def roles(self, task):
        """The sequences whose vectors the task's head takes: "pair", "first", "second"."""
        if task in self.joint:
            return ("pair",)
        apart = ("first", "second") if TASKS[task].is_pair else ("first",)
        return ("pair", *apart) if task in self.both else apart

    def head(self, task):
        """Name of the head of `task`."""
        return self.heads.get(task, TASKS[task].heads[0])

    @property
    def uses_simcse(self):
        """Whether any contrastive loss is trained."""
        return bool(self.simcse_tasks) or self.supervised_simcse


# Peak learning rates by mode, (encoder, heads). What is new, heads and LoRA's matrices, needs a
# larger rate than the pretrained encoder. PALs learn at the heads' rate.
LEARNING_RATES = {
    "last-linear-layer": (0.0, 1e-3),
    "full-model": (5e-5, 5e-4),
    "LoRA": (5e-4, 5e-4),
    "PAL": (5e-4, 5e-4),
}
MODES = tuple(LEARNING_RATES)


@dataclass(frozen=True)
class Recipe:
    """Preset flags: a row of the paper's Table 1 with its overall dev score, or our own."""

    flags: dict  # name in the parser's namespace -> value
    description: str  # what the row means here, where the paper leaves a choice
    paper_score: float | None = None


COSINE = {"sst_head": "linear", "para_head": "features", "sts_head": "cosine"}
SIMCSE = {**COSINE, "unsupervised_simcse": True}

# fmt: off
RECIPES = {
    "baseline": Recipe(
        {"fine_tune_mode": "last-linear-layer", "sst_head": "linear", "para_head": "dot",
         "sts_head": "linear", "warmup": 0.1},
        "frozen encoder, linear heads with warm-up, paraphrase by the dot product of both vectors",
        0.471,
    ),
    "cosine": Recipe(
        {"fine_tune_mode": "full-model", **COSINE},
        "all three tasks at once on the whole model, similarity as 5 cos(u, v) with squared error, "
        "a linear sentiment head, paraphrase from the features of both vectors",
        0.662,
    ),
    "simcse": Recipe(
        {"fine_tune_mode": "full-model", **SIMCSE},
        "cosine plus unsupervised SimCSE on the sentences of all tasks",
        0.703,
    ),
    "simcse-lora": Recipe(
        {"fine_tune_mode": "LoRA", "LoRA_r": 32, "LoRA_alpha": 16.0, **SIMCSE, "sst_head": "ffn"},
        "simcse with LoRA (r = 32, α = 16, all six kinds of linear layer) and a feed-forward layer "
        "before the sentiment projection",
        0.727,
    ),
    "simcse-full": Recipe(
        {"fine_tune_mode": "full-model", **SIMCSE, "sst_head": "ffn"},
        "simcse-lora with the whole model trained instead of the adapters",
        0.732,
    ),
    "best": Recipe(
        {"fine_tune_mode": "full-model", "sst_head": "ffn", "para_head": "features+cosine",
         "sts_head": "cosine", "pair_encoding": ["para=both", "sts=separate"],
         "r_drop": ["sst", "para"], "loss_weights": ["r_drop_sst=4", "r_drop_para=4"],
         "freeze_word_embeddings": True, "lr": 1e-4,
         "batch_size": 32, "epochs": 9, "steps_per_epoch": 200},
        "ours, not the paper's: paraphrase pairs encoded as one sequence and apart, similarity "
        "pairs apart, R-Drop on sentiment and paraphrase, word embeddings as pretrained, 1,800 "
        "steps of batch 32",
    ),
}
# fmt: on
