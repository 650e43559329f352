"""The model card: `README.md` of a best model's folder, in the format of the Hugging Face hub."""

import argparse
import shlex
from pathlib import Path

from config import TASKS
from training.data_files import uses_sample
from training.flags import FREE_WHEN_RESUMING, OF_ONE_COMMAND, default_flags, flag_words
from training.run_folder import run_name

# Where the hub has the data of a task: its name there, and what it is.
DATASETS = {
    "sst": ("stanfordnlp/sst", "Stanford Sentiment Treebank, 5 classes"),
    "para": ("quora-competitions/quora", "Quora question pairs"),
    "sts": ("mteb/stsbenchmark-sts", "SemEval STS benchmark"),
}
METRICS = {"accuracy": "accuracy", "pearson": "pearsonr", "spearman": "spearmanr", "macro_f1": "f1"}
NOT_LISTED = {"recipe", "pretrained"} | OF_ONE_COMMAND | FREE_WHEN_RESUMING
ENCODER = """\
    from transformers import AutoModel, AutoTokenizer
    model, tokenizer = AutoModel.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)

    from sentence_transformers import SentenceTransformer    # one vector for each sentence
    vectors = SentenceTransformer(FOLDER).encode(["A film to fall in love with."])
"""
ADAPTER = """\
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer
    model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

For `sentence-transformers`, merge the adapter into its encoder first, in the project's folder:

    python evaluation.py --checkpoint RUN --export NEW_FOLDER
"""
PALS = """\
`model.safetensors` alone is not the model: each task adds its own projected attention layers
(Stickland & Murray 2019) to the encoder. Only the project's own code computes them.
"""
TEXT = """
# {name}

{what}, fine-tuned on {titles} with Multitask minBERT. Its base: {base}.

| task | metric | dev score |
|---|---|---|
{scores}

The dev set also chose the epoch, so the scores are a little too high.{data}

## How to load it

FOLDER is this folder, or the model's name on the hub; RUN is the folder of the run in the project.

{load}
The {heads} in `heads.safetensors`. To {use[0]}, in the project's folder:

    python {use[1]}

## How it was trained

    {command}

## Limits

English only; texts are cut at {length} tokens. The model repeats what its training texts hold:
words for groups of people change its predictions. Do not use it for decisions about people.
"""


def model_card(description, dev, max_length, is_adapter, has_pals=False):
    """The text of a card.

    `description` holds the values of `run.json`; `dev` maps a task to its dev metrics by name;
    `max_length` is in tokens. `is_adapter`: the folder has an adapter, not a whole encoder.
    `has_pals`: its encoder is not the model without the PALs beside the heads.
    """
    about, on_sample = description["encoder"], uses_sample(description)
    base = (is_adapter and about.get("best")) or about["name"]
    on_hub = not Path(base).is_absolute()  # a local folder's name is its whole path
    base = base if on_hub else "ENCODER"
    scores = [
        f"| {TASKS[name].title} (`{name}`) | {metric} | {value:.3f} |"
        for name, metric, value in measured(dev)
    ]
    masked = {name: found["loss"] for name, found in dev.items() if name not in TASKS}
    scores += [f"| `{name}` | loss | {loss:.3f} |" for name, loss in masked.items()]
    use = "predict with them", "evaluation.py --checkpoint RUN --predict FILE"
    if masked:  # a run has these scores only where it has no others
        use = "train tasks from this model", "multitask_classifier.py --start_from RUN"
    name = run_name(argparse.Namespace(**description["args"]))
    sample = " The data was the project's small generated sample: a try, not a result."
    text = TEXT.format(
        name=name,
        what="A LoRA adapter of a BERT encoder" if is_adapter else "A BERT encoder",
        heads="heads and these layers are" if has_pals else "heads are",
        use=use,
        titles=", ".join(TASKS[name].title if name in TASKS else name for name in dev),
        base=f"`{base}`" if on_hub else "a local encoder, ENCODER below",
        scores="\n".join(scores),
        data=sample if on_sample else "",
        load=ADAPTER.format(base=base) if is_adapter else PALS if has_pals else ENCODER,
        command=shlex.join(training_command(description, base)),
        length=max_length,
    )
    settings = {"base_model": base} if on_hub else {}
    settings |= {"library_name": "peft" if is_adapter else "sentence-transformers"}
    if has_pals:
        settings |= {"library_name": None, "pipeline_tag": None}
    return f"---\n{metadata(name, {} if on_sample else dev, settings)}\n---\n{text}"


def measured(dev):
    """The metrics that a card shows: (task, metric, value) of each."""
    return [(name, m, found[m]) for name, found in dev.items() for m in METRICS if m in found]


def metadata(name, dev, settings):
    """The card's YAML: the hub's fields of `settings`, the run's `name`, data and dev scores."""
    from huggingface_hub import EvalResult, ModelCardData

    named = {task: found for task, found in dev.items() if task in DATASETS}
    results = [
        EvalResult(
            task_type="sentence-similarity" if TASKS[task].is_pair else "text-classification",
            dataset_type=DATASETS[task][0],
            dataset_name=DATASETS[task][1],
            dataset_split="dev",
            metric_type=METRICS[metric],
            metric_value=round(value, 4),
        )
        for task, metric, value in measured(named)
    ]
    values = {"language": "en", "pipeline_tag": "sentence-similarity", "tags": ["bert"], **settings}
    if results:
        values |= {"datasets": [DATASETS[task][0] for task in named], "eval_results": results}
        values |= {"metrics": sorted({result.metric_type for result in results})}
        values |= {"model_name": name}
    return ModelCardData(**values).to_yaml()


def training_command(description, encoder):
    """The words of a command that trains the model again: flags that are not at their defaults."""
    defaults = default_flags()
    start = [] if description["args"].get("start_from") else ["--pretrained", encoder]
    words = ["python", "multitask_classifier.py", *start]
    for name, value in description["args"].items():
        if name not in NOT_LISTED and value != defaults[name]:
            words += flag_words(name, value)
    return words
