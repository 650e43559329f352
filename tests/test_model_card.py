"""The model card of a best model's folder, in the format of the Hugging Face hub."""

import shlex
from pathlib import Path

from huggingface_hub import ModelCard

import evaluation
import multitask_classifier
from training.flags import default_flags, make_parser
from training.model_card import NOT_LISTED, model_card
from training.run_folder import RunFolder

SMALL = "--pretrained encoder --epochs 1 --steps_per_epoch 1 --batch_size 4 --max_length 30"
FLAGS = "--fine-tune-mode LoRA --LoRA_r 4 --LoRA_targets key value --r_drop sst"
FLAGS += " --loss_weights para=2 --model_file_suffix x"


def test_the_card_has_the_runs_scores_and_flags_and_names_no_path(
    tiny_folder, tmp_path, cut_sample, workplace
):
    multitask_classifier.main([*SMALL.split(), *FLAGS.split(), "--data_dir", str(cut_sample)])
    run = RunFolder("runs/LoRA-x")
    text = (run.best / "README.md").read_text()
    card, (line,) = ModelCard(text), [x for x in run.metrics() if x["kind"] == "eval"]
    assert f"| similarity (`sts`) | pearson | {line['dev']['sts']['pearson']:.3f} |" in text
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert "generated sample" in text and card.data.eval_results is None
    assert "cut at 30 tokens" in text and "PeftModel.from_pretrained" in text
    assert str(tmp_path) not in text and str(cut_sample) not in text
    command = next(x for x in text.splitlines() if x.startswith("    python multitask_c"))
    words = shlex.split(command)[2:]
    assert words[:2] == ["--pretrained", "ENCODER"]
    again, asked = (
        {name: value for name, value in flags.items() if name not in NOT_LISTED}
        for flags in (vars(make_parser().parse_args(words)), run.description()["args"])
    )
    assert again == asked
    evaluation.main(["--export", "merged"])
    text = Path("merged/README.md").read_text()
    assert ModelCard(text).data.library_name == "sentence-transformers"
    assert "SentenceTransformer(FOLDER)" in text and "peft" not in text


def test_the_card_of_masked_language_modelling_alone_names_what_can_be_done_with_it():
    description = {"args": default_flags(), "data": {}, "encoder": {"name": "some/encoder"}}
    text = model_card(description, {"mlm_sst": {"loss": 2.5}}, 512, is_adapter=False)
    assert "fine-tuned on mlm_sst" in text and "| `mlm_sst` | loss | 2.500 |" in text
    assert "multitask_classifier.py --start_from RUN" in text and "--predict" not in text


def test_the_card_of_a_run_on_the_courses_data_has_the_hubs_metadata():
    """Each score is a result that the hub shows; the data and the base model are linked."""
    description = {"args": default_flags(), "data": {"sst": {"dev": {"path": "data/x.csv"}}}}
    description["encoder"] = {"name": "google-bert/bert-base-uncased"}
    dev = {"sst": {"loss": 1.0, "accuracy": 0.5}, "sts": {"pearson": 0.75, "spearman": 0.7}}
    text = model_card(description, dev, 512, is_adapter=True)
    data = ModelCard(text).data
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.datasets == ["stanfordnlp/sst", "mteb/stsbenchmark-sts"]
    found = [(r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results]
    assert found == [
        ("stanfordnlp/sst", "accuracy", 0.5),
        ("mteb/stsbenchmark-sts", "pearsonr", 0.75),
        ("mteb/stsbenchmark-sts", "spearmanr", 0.7),
    ]
    assert 'AutoModel.from_pretrained("google-bert/bert-base-uncased")' in text
    assert "generated sample" not in text
