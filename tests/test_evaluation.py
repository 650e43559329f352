"""Prediction, calibration, and flags of the evaluation script that do not go together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluation
from bert import BertModel
from config import TASKS, MultitaskConfig, UserError
from datasets import Example, TaskDataset
from evaluation import best_offset, calibrate, parse_flags, predict_dataset, predict_sentences
from heads import task_loss
from multitask_bert import MultitaskBERT
from runtime.device import BATCH_TOKENS, Compute, OutOfMemory, memory_errors
from tokenizer import BertTokenizer
from training.saved_models import load_weights, save_model

NAMES = ("sst", "para", "sts")
CPU = Compute("cpu", "fp32")
EXAMPLES = 20


@pytest.fixture
def model(tiny_config, toy_vocab_folder):
    """A tiny model of the three tasks in eval mode."""
    bert = BertModel(replace(tiny_config, initializer_range=0.2))
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    return MultitaskBERT(bert, MultitaskConfig(max_length=40), tokenizer).eval()


@pytest.fixture
def datasets(model):
    """Twenty examples of each task, with sentences of different lengths."""
    words = ["good", "bad", "the", "film", "an", "awful", "movie", "cat", "dog"]
    random, found = np.random.default_rng(3), {}
    for name in NAMES:
        examples = []
        for i in range(EXAMPLES):
            columns = TASKS[name].sentences
            texts = tuple(" ".join(random.choice(words, 1 + i * 7 % 19)) for _ in columns)
            examples.append(Example(f"{name}{i}", texts, float(random.integers(0, 2))))
        found[name] = TaskDataset(examples, TASKS[name], model.tokenizer, 40)
    return found


# --------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize(
    ("name", "outputs", "scores", "predictions"),
    [
        ("sst", np.log([[0.1, 0.4, 0.2, 0.2, 0.1]]) + 3, [[0.1, 0.4, 0.2, 0.2, 0.1]], [1]),
        ("para", np.log([[4], [1 / 4], [1.5], [1]]), [[0.8], [0.2], [0.6], [0.5]], [1, 0, 1, 0]),
        ("sts", [[-1.5], [2.25], [7]], [[0], [2.25], [5]], [0, 2.25, 5]),
    ],
)
def test_outputs_become_scores_and_predictions(
    model, monkeypatch, name, outputs, scores, predictions
):
    """Probabilities and the most likely class; a similarity stays within the labels' range."""
    outputs = torch.tensor(outputs, dtype=torch.float32)
    monkeypatch.setattr(evaluation, "head_outputs", lambda *_: outputs)
    texts = [("x",) * len(TASKS[name].sentences)] * len(outputs)
    found = predict_sentences(model, name, texts, CPU)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)
    assert found.predictions.tolist() == predictions


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_their_order_do_not_change_predictions(model, datasets, name, monkeypatch):
    """Batches hold sentences of similar lengths; the results are in the file's order."""
    dataset = datasets[name]
    rows = [predict_sentences(model, name, [e.sentences], CPU) for e in dataset.examples]
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 60)
    found = predict_dataset(model, dataset, CPU)
    assert found.ids == [f"{name}{i}" for i in range(EXAMPLES)]
    for values in ("scores", "predictions"):
        expected = np.concatenate([getattr(row, values) for row in rows])
        np.testing.assert_allclose(getattr(found, values), expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        outputs = model.predict(name, dataset.batch(range(EXAMPLES)))
    expected = task_loss(TASKS[name], outputs, dataset.labels).item()
    assert found.loss == pytest.approx(expected, rel=1e-3)


def test_a_batch_too_large_for_a_gpus_memory_is_halved(model, datasets, monkeypatch):
    """Until its parts fit; one that holds a single example is an error."""
    predict, sizes, most = model.predict, [], 3

    def predict_few(name, batch):
        sizes.append(len(batch.ids))
        if len(batch.ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(name, batch)

    expected = predict_dataset(model, datasets["para"], CPU)
    monkeypatch.setattr(model, "predict", predict_few)
    found = predict_dataset(model, datasets["para"], CPU)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-5)
    assert sizes[:4] == [20, 10, 5, 3]
    most = 0
    with pytest.raises(OutOfMemory, match="out of memory on cpu with evaluation batches of up to"):
        predict_dataset(model, datasets["para"], CPU)
    assert sizes[-1] == 1


def test_a_gpu_without_virtual_memory_is_told_the_setting():
    refused = pytest.raises(UserError, match="not supported; try PYTORCH_ALLOC_CONF=expandable_")
    with refused, memory_errors("cuda", "the model"):
        raise RuntimeError("CUDA driver error: operation not supported")


# -------------------------------------------------------------------------------------- calibration


def test_offsets_by_hand():
    """The prior matters for few examples and hardly at all for many."""
    scores, labels = torch.tensor([[1.0], [2.0], [4.0], [3.0]]), torch.tensor([2.0, 4, 4, 4])
    found = best_offset(TASKS["sts"], scores, labels)
    torch.testing.assert_close(found.item(), 8 / 9)  # mean difference 1, times 2n / (2n + 1)
    quarter = (torch.arange(100_000) % 4 == 0).float()
    found = best_offset(TASKS["para"], torch.full((100_000, 1), 2.0), quarter)
    assert found.item() == pytest.approx(np.log(1 / 3) - 2, abs=1e-3)
    classes = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3, 3, 4]).repeat(10_000)
    found = best_offset(TASKS["sst"], torch.zeros(100_000, 5), classes)
    np.testing.assert_allclose(found.softmax(0), [0.1, 0.2, 0.4, 0.2, 0.1], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_offset_of_equal_labels_and_extreme_outputs_is_finite(name):
    task, labels = TASKS[name], torch.zeros(8)
    outputs = torch.full((8, task.num_classes), 30.0)
    offset = best_offset(task, outputs, labels)
    assert offset.isfinite().all()
    assert task_loss(task, outputs + offset, labels) <= task_loss(task, outputs, labels)


def test_calibration_moves_the_mean_prediction_to_the_mean_label(model, datasets):
    """For many examples all the way; for few, the prior keeps it part of the way."""
    on_train = calibrate(model.train(), datasets, EXAMPLES, CPU)
    for name, dataset in datasets.items():
        assert model.get_buffer(f"offset_{name}").abs().max() > 0.01
        calibrated = predict_dataset(model, dataset, CPU)
        assert on_train[name].metrics == pytest.approx(calibrated.metrics, abs=1e-6)
        assert on_train[name].loss == pytest.approx(calibrated.loss, abs=1e-6)
        model.get_buffer(f"offset_{name}").zero_()
        before = predict_dataset(model, dataset, CPU)
        assert calibrated.loss < before.loss
        if TASKS[name].num_classes == 1:
            means = [abs(r.scores.mean() - r.labels.mean()) for r in (before, calibrated)]
            assert means[1] < 0.5 * means[0]


def test_calibration_is_repeatable(model, datasets):
    """With 12 of 20 examples, and from other offsets."""
    offsets = []
    for _ in range(2):
        calibrate(model, datasets, 12, CPU)
        offsets.append([model.get_buffer(f"offset_{name}").tolist() for name in NAMES])
    assert offsets[0] == offsets[1]


# ------------------------------------------------------------------------------------- saved models


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_fault_29_heads_that_do_not_fit(model, tmp_path, fault):
    save_model(model, None, tmp_path)
    tensors = load_file(tmp_path / "heads.safetensors")
    name = f"heads.{'cfimdb' if fault == 'unexpected' else 'sst'}.projection.weight"
    tensors[name] = torch.zeros(7, 32)
    if fault == "missing":
        del tensors[name]
    save_file(tensors, tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=r"heads\.safetensors: does not fit"):
        load_weights(model, None, tmp_path)


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--report a --sentence x", "--sentence and --report exclude each other"),
        ("--predict x --sentence y", "--sentence and --predict exclude each other"),
        ("--report a --checkpoint b", "--report and --checkpoint exclude each other"),
        ("--sentence x --checkpoint a b", "--sentence takes one run"),
        ("--predict x --checkpoint a b", "--predict takes one run"),
        ("--export x --checkpoint a b", "--export takes one run"),
        ("--data_dir x --report a", "--data_dir: only to evaluate one run"),
        ("--data_dir x --checkpoint a b", "--data_dir: only to evaluate one run"),
        ("--sentence2 x", "--sentence2: only with --sentence"),
        ("--sentence --sentence2 b", "argument --sentence: expected one argument"),
        ("--out x", "--out: only with --predict"),
        ("--predict x --out /dev/null", "--out /dev/null: expected the name of a file"),
        ("--sentence x --sentence2 caf\udce9", "caf.*: not UTF-8"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_flags(words.split())


def test_without_a_run_there_is_nothing_to_evaluate():
    with pytest.raises(UserError, match=r"^nowhere/: no trained run"):
        evaluation.main(["--runs_dir", "nowhere/"])
