"""Scores against scikit-learn and SciPy, prediction files byte for byte, saved models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

import evaluation
from base_bert import Encoder
from bert import BertModel
from config import TASKS, LoRAConfig, MultitaskConfig, UserError
from datasets import Example, TaskDataset, TaskFile
from evaluation import (
    TaskResult,
    best_offset,
    format_predictions,
    format_table,
    measure,
    overall_score,
    predict_dataset,
    prediction_files,
    read_scores,
    score_files,
    to_predictions,
    undefined_correlations,
    write_predictions,
)
from lora import adapter_tensors, apply_lora
from multitask_bert import MultitaskBERT, task_loss
from run_folder import OutputError, new_folder, write_files
from saved_models import load_weights, save_model
from tokenizer import BertTokenizer

# -------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("name", ["sst", "para", "cfimdb"])
def test_accuracy_and_macro_f1_are_scikit_learns(name):
    generator = np.random.default_rng(1)
    labels, predictions = generator.integers(0, max(2, TASKS[name].num_classes), (2, 200))
    found = measure(TASKS[name], predictions, labels.astype(np.float32))
    assert found == {
        "accuracy": accuracy_score(labels, predictions),
        "macro_f1": f1_score(labels, predictions, average="macro"),
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=3, max_size=40))
def test_correlations_are_scipys_with_ties_too(rows):
    predictions, labels = (np.array(column, dtype=np.float32) for column in zip(*rows, strict=True))
    found = measure(TASKS["sts"], predictions / 4, labels)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        assert found == {"pearson": 0.0, "spearman": 0.0}
    else:
        assert found["pearson"] == pytest.approx(pearsonr(predictions, labels).statistic, abs=1e-6)
        assert found["spearman"] == pytest.approx(
            spearmanr(predictions, labels).statistic, abs=1e-9
        )


def test_constant_predictions_count_as_zero_not_as_nan():
    """A nan score would be larger than none and smaller than none: never the best model."""
    constant = np.full(4, 2.5, dtype=np.float32)
    labels = np.array([1.0, 2, 3, 4], dtype=np.float32)
    assert measure(TASKS["sts"], constant, labels) == {"pearson": 0.0, "spearman": 0.0}
    assert measure(TASKS["sts"], constant[:1], labels[:1])["pearson"] == 0.0
    results = {"sts": TaskResult([], constant, constant[:, None])}
    assert undefined_correlations(results) == ["sts"]
    results["sts"].predictions = labels
    assert undefined_correlations(results) == []


def results_with(**scores):
    """Results that carry nothing but the metric that counts."""
    return {
        name: TaskResult(["a"], np.zeros(1), np.zeros((1, 1)), metrics={TASKS[name].metric: score})
        for name, score in scores.items()
    }


@pytest.mark.parametrize(
    ("sst", "para", "sts", "overall"),
    [
        (0.457, 0.775, 0.872, 0.723),  # two measured runs, to three digits
        (0.460, 0.811, 0.874, 0.736),
        (0.0, 0.0, -1.0, 0.0),
        (1.0, 1.0, 1.0, 1.0),
        (0.3, 0.6, 0.0, 1.4 / 3),
    ],
)
def test_overall_score(sst, para, sts, overall):
    """mean(sst, para, (1 + sts) / 2)."""
    found = overall_score(results_with(sst=sst, para=para, sts=sts))
    assert found == pytest.approx(overall, abs=6e-4)


def test_the_optional_task_does_not_count_beside_the_three():
    three = overall_score(results_with(sst=0.4, para=0.7, sts=0.8))
    assert overall_score(results_with(sst=0.4, para=0.7, sts=0.8, cfimdb=0.99)) == three
    assert overall_score(results_with(cfimdb=0.9)) == 0.9
    assert overall_score(results_with(sst=0.4, sts=0.6)) == pytest.approx(0.6)


def test_the_table_names_every_metric():
    results = results_with(sst=0.4, para=0.7, sts=0.8)
    table = format_table(results)
    assert [line.split()[0] for line in table.splitlines()] == [
        "task", "sst", "para", "sts", "overall",
    ]  # fmt: skip
    assert "accuracy 0.400" in table
    assert "pearson 0.800" in table
    assert table.endswith(f"overall  {(0.4 + 0.7 + 0.9) / 3:.3f}")


# ------------------------------------------------------------------ outputs into predictions


def test_a_class_is_the_largest_logit_and_its_scores_are_probabilities():
    predictions, scores = to_predictions(TASKS["sst"], torch.tensor([[0.0, 3, 1, 2, -1]]))
    assert predictions.tolist() == [1]
    assert scores.sum() == pytest.approx(1)


def test_a_paraphrase_is_a_probability_above_one_half():
    outputs = torch.tensor([[2.0], [-2.0], [0.1], [0.0]])
    predictions, scores = to_predictions(TASKS["para"], outputs)
    assert predictions.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert scores[0, 0] == pytest.approx(1 / (1 + np.exp(-2)))


def test_a_similarity_stays_within_the_labels_range():
    predictions, _ = to_predictions(TASKS["sts"], torch.tensor([[-1.5], [2.25], [7.0]]))
    assert predictions.tolist() == [0.0, 2.25, 5.0]


# -------------------------------------------------------------------------------------- files


def result_of(name, ids, outputs):
    """A `TaskResult` from raw outputs."""
    return TaskResult(ids, *to_predictions(TASKS[name], torch.tensor(outputs)))


def test_prediction_files_are_the_courses_byte_for_byte():
    """A leaderboard's reader splits at these very spaces; the misspelling is the course's."""
    sst = result_of("sst", ["a1", "b2"], [[0.0, 0, 0, 9, 0], [9.0, 0, 0, 0, 0]])
    assert format_predictions(TASKS["sst"], sst) == (
        "id \t Predicted_Sentiment \na1 , 3 \nb2 , 0 \n"
    )
    para = result_of("para", ["65977 641bc8de-b905", "b"], [[4.0], [-4.0]])
    assert format_predictions(TASKS["para"], para) == (
        "id \t Predicted_Is_Paraphrase \n65977 641bc8de-b905 , 1.0 \nb , 0.0 \n"
    )
    sts = result_of("sts", ["a", "b", "c"], [[3.25], [9.0], [0.1]])
    assert format_predictions(TASKS["sts"], sts) == (
        "id \t Predicted_Similiary \na , 3.25 \nb , 5.0 \nc , 0.1 \n"
    )


def test_files_lie_where_the_course_looks_for_them(tmp_path):
    results = {"sst": result_of("sst", ["a"], [[0.0, 0, 0, 9, 0]])}
    write_predictions(tmp_path / "predictions", {"dev": results})
    path = tmp_path / "predictions" / "sst-dev-output.csv"
    assert path.read_bytes() == b"id \t Predicted_Sentiment \na , 3 \n"
    files = prediction_files(tmp_path, results, "test", {"sst": tmp_path / "mine.csv"})
    assert files == {tmp_path / "mine.csv": path.read_text(encoding="utf-8")}


def test_a_disk_that_fills_up_leaves_both_splits_files_as_they_were(tmp_path):
    """New dev files beside old test files would be one upload of two models."""
    old = {"sst": result_of("sst", ["a"], [[0.0, 0, 0, 9, 0]])}
    write_predictions(tmp_path, {"dev": old, "test": old})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = {"sst": result_of("sst", ["a"], [[9.0, 0, 0, 0, 0]])}
    (tmp_path / ".tmp-sst-test-output.csv").mkdir()  # cannot be written
    with pytest.raises(OutputError):
        write_predictions(tmp_path, {"dev": new, "test": new})
    (tmp_path / ".tmp-sst-test-output.csv").rmdir()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
@pytest.mark.parametrize("labelled", [True, False])
def test_scores_read_back_as_they_were_written(tmp_path, name, labelled):
    """Reports and ensembles work from these files: not a bit may get lost on the way."""
    task = TASKS[name]
    outputs = torch.randn(30, task.num_classes) * 3
    ids = [f"x {i}" for i in range(30)]
    result = TaskResult(ids, *to_predictions(task, outputs))
    if labelled:
        labels = np.random.default_rng(2).uniform(task.low, task.high, 30)
        result.labels = (labels if name == "sts" else labels.round()).astype(np.float32)
        result.metrics = measure(task, result.predictions, result.labels)
    write_files(score_files(tmp_path, {name: result}, "dev"))
    found = read_scores(tmp_path, name, "dev")
    assert found.ids == ids
    np.testing.assert_array_equal(found.scores, result.scores)
    np.testing.assert_array_equal(found.predictions, result.predictions)
    assert found.metrics == result.metrics
    assert (found.labels is not None) == labelled
    assert format_predictions(task, found) == format_predictions(task, result)


def test_a_damaged_scores_file_is_named(tmp_path):
    (tmp_path / "sst-dev-scores.tsv").write_text("id\tlabel\tprediction\tscore_0\na\t1\t1\tmuch\n")
    for name in ("sst", "para"):  # damaged, missing
        with pytest.raises(UserError, match=f"{name}-dev-scores.tsv"):
            read_scores(tmp_path, name, "dev")


# ------------------------------------------------------------------------------------- predicting


@pytest.fixture
def model(tiny_config):
    """A tiny model of the three tasks in eval mode."""
    bert = BertModel(replace(tiny_config, initializer_range=0.2))
    return MultitaskBERT(bert, MultitaskConfig(max_length=40)).eval()


@pytest.fixture
def datasets(toy_vocab_folder):
    """Twenty examples of each task with sentences of unlike length."""
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    words = ["good", "bad", "the", "film", "an", "awful", "movie", "cat", "dog"]
    generator = np.random.default_rng(3)
    found = {}
    for name in ("sst", "para", "sts"):
        task = TASKS[name]
        examples = [
            Example(
                f"{name}{i}",
                tuple(" ".join(generator.choice(words, 1 + i * 7 % 19)) for _ in task.sentences),
                float(generator.integers(0, 2)),
            )
            for i in range(20)
        ]
        file = TaskFile(Path("x"), examples, [], 20)
        found[name] = TaskDataset(file, task, tokenizer, 40)
    return found


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_predictions_come_in_the_files_order_whatever_the_batches(
    model, datasets, name, budget, monkeypatch
):
    """Another order for speed, and a batch size, that must not show."""
    monkeypatch.setitem(evaluation.BATCH_TOKENS, "cpu", budget)
    dataset = datasets[name]
    found = predict_dataset(model, dataset, "fp32")
    with torch.no_grad():
        outputs = torch.cat([model.predict(name, dataset.batch([row])) for row in range(20)])
        whole = model.predict(name, dataset.batch(list(range(20))))
    predictions, scores = to_predictions(TASKS[name], outputs)
    assert found.ids == [f"{name}{i}" for i in range(20)]
    np.testing.assert_allclose(found.scores, scores, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.predictions, predictions, rtol=1e-3, atol=1e-5)
    expected = task_loss(TASKS[name], whole, dataset.labels)  # the whole file in one go
    assert found.loss == pytest.approx(expected.item(), rel=1e-3)


def test_predicting_leaves_no_gradients_and_no_dropout(model, datasets):
    model.train()
    first = predict_dataset(model, datasets["sst"], "fp32")
    second = predict_dataset(model, datasets["sst"], "fp32")
    assert not model.training
    np.testing.assert_array_equal(first.scores, second.scores)
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------- calibration


def test_offsets_worked_out_by_hand():
    """Of n examples: the prior takes 1/n of a score's offset and next to nothing of a large n's."""
    scores, labels = torch.tensor([[1.0], [2.0], [4.0], [3.0]]), torch.tensor([2.0, 4, 4, 4])
    torch.testing.assert_close(  # mean difference 1, times 2n / (2n + 1)
        best_offset(TASKS["sts"], scores, labels).item(), 8 / 9
    )
    quarter = (torch.arange(100_000) % 4 == 0).float()
    found = best_offset(TASKS["para"], torch.full((100_000, 1), 2.0), quarter)
    assert found.item() == pytest.approx(np.log(1 / 3) - 2, abs=1e-3)
    classes = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3, 3, 4]).repeat(10_000)
    found = best_offset(TASKS["sst"], torch.zeros(100_000, 5), classes)
    np.testing.assert_allclose(found.softmax(0), [0.1, 0.2, 0.4, 0.2, 0.1], atol=1e-3)


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
def test_examples_with_one_label_and_far_outputs_have_a_finite_offset(name):
    outputs = torch.full((8, TASKS[name].num_classes), 30.0)
    offset = best_offset(TASKS[name], outputs, torch.zeros(8))
    assert offset.isfinite().all()
    assert task_loss(TASKS[name], outputs + offset, torch.zeros(8)) <= task_loss(
        TASKS[name], outputs, torch.zeros(8)
    )


def test_a_calibrated_model_predicts_the_training_labels_mean(model, datasets):
    """Of many examples; here of few, so that some of the way is the prior's."""
    model.train()
    evaluation.calibrate(model, datasets, 20, "fp32")
    for name, dataset in datasets.items():
        offset = model.get_buffer(f"offset_{name}").clone()
        assert offset.abs().max() > 0.01
        calibrated = predict_dataset(model, dataset, "fp32")
        model.get_buffer(f"offset_{name}").zero_()
        before = predict_dataset(model, dataset, "fp32")
        assert calibrated.loss < before.loss
        if TASKS[name].num_classes == 1:
            means = [abs(r.scores.mean() - r.labels.mean()) for r in (before, calibrated)]
            assert means[1] < 0.5 * means[0]


def test_calibrating_is_repeatable_and_leaves_training_as_it_is(model, datasets):
    batches = {name: dataset.batch(range(8)) for name, dataset in datasets.items()}
    model.eval()
    before = model(batches)
    evaluation.calibrate(model, datasets, 12, "fp32")
    first = {name: model.get_buffer(f"offset_{name}").clone() for name in datasets}
    evaluation.calibrate(model, datasets, 12, "fp32")
    for name in datasets:
        assert torch.equal(first[name], model.get_buffer(f"offset_{name}"))
    after = model.eval()(batches)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_examples_calibrate_nothing(model, datasets):
    evaluation.calibrate(model, datasets, 0, "fp32")
    assert not any(model.get_buffer(f"offset_{name}").any() for name in datasets)


# ---------------------------------------------------------------------------------- saved models

LORA = LoRAConfig(r=3, alpha=6.0, targets=("query", "output"))


@pytest.fixture
def saved(model, toy_vocab_folder, tmp_path):
    """Saves a model and gives back its folder."""

    def save(lora=None):
        tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
        encoder = Encoder("some/encoder", toy_vocab_folder, "1" * 40, "0" * 64)
        if lora:
            apply_lora(model.bert, lora)
            for tensor in adapter_tensors(model.bert).values():
                torch.nn.init.normal_(tensor, std=0.2)
        with new_folder(tmp_path / "best") as folder:
            save_model(model, tokenizer, encoder, lora, folder)
        return tmp_path / "best"

    return save


def other_model(model, lora=None):
    """A model of the same shape and encoder with other trained weights."""
    torch.manual_seed(99)
    bert = BertModel(model.bert.config)
    if lora:
        base = {n: t for n, t in model.bert.state_dict().items() if "lora_" not in n}
        bert.load_state_dict(base)
        apply_lora(bert, lora)
    return MultitaskBERT(bert, model.config).eval()


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_saved_model_loads_with_the_same_numbers(model, datasets, saved, lora):
    evaluation.calibrate(model, datasets, 20, "fp32")
    folder = saved(lora)
    again = other_model(model, lora)
    load_weights(again, lora, folder)
    for dataset in datasets.values():
        expected = predict_dataset(model, dataset, "fp32")
        found = predict_dataset(again, dataset, "fp32")
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_what_a_saved_folder_holds(saved):
    full = {path.name for path in saved().iterdir()}
    assert full == {
        "config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "modules.json", "1_Pooling", "sentence_bert_config.json",
        "heads.safetensors", "heads.json", "manifest.json",
    }  # fmt: skip


def test_what_a_saved_adapter_holds(saved):
    """No copy of the encoder: an adapter is a few MiB."""
    adapter = {path.name for path in saved(LORA).iterdir()}
    assert adapter >= {
        "adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "heads.json",
        "manifest.json",
    }  # fmt: skip
    assert "model.safetensors" not in adapter


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_heads_that_do_not_fit_are_an_error(model, saved, fault):
    folder = saved()
    path = folder / "heads.safetensors"
    tensors = load_file(path)
    if fault == "missing":
        del tensors["heads.sst.projection.weight"]
    elif fault == "unexpected":
        tensors["heads.cfimdb.projection.weight"] = torch.zeros(2, 32)
    else:
        tensors["heads.sst.projection.weight"] = torch.zeros(7, 32)
    save_file(tensors, path)
    (folder / "manifest.json").write_text("{}")  # as if that had been saved: the hashes are right
    with pytest.raises(UserError, match=r"heads\.safetensors: does not fit"):
        load_weights(model, None, folder)


def test_a_flipped_bit_is_found(model, saved):
    folder = saved()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load_weights(model, None, folder)


# --------------------------------------------------------------------------------- command line


def test_a_second_sentence_needs_a_first():
    with pytest.raises(UserError, match="--sentence2 goes with --sentence"):
        evaluation.get_args(["--sentence2", "x"])


def test_an_abbreviated_flag_is_refused():
    with pytest.raises(UserError, match="did you mean --checkpoint"):
        evaluation.get_args(["--check", "runs/LoRA"])
