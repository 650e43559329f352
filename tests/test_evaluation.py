"""Prediction, calibration, and saved models that load with the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluation
from base_bert import Encoder
from bert import BertModel
from config import TASKS, LoRAConfig, MultitaskConfig, UserError
from datasets import Example, TaskDataset
from evaluation import best_offset, calibrate, predict_dataset, predict_sentences
from heads import task_loss
from lora import adapter_tensors, apply_lora
from multitask_bert import MultitaskBERT
from runtime.device import BATCH_TOKENS, Compute, OutOfMemory
from tokenizer import BertTokenizer
from training.run_folder import RunFolder
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
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_batches_and_their_order_do_not_change_predictions(
    model, datasets, name, budget, monkeypatch
):
    """Batches hold sentences of similar lengths; the results are in the file's order."""
    dataset = datasets[name]
    rows = [predict_sentences(model, name, [e.sentences], CPU) for e in dataset.examples]
    monkeypatch.setitem(BATCH_TOKENS, "cpu", budget)
    found = predict_dataset(model, dataset, CPU)
    assert found.ids == [f"{name}{i}" for i in range(EXAMPLES)]
    for values in ("scores", "predictions"):
        expected = np.concatenate([getattr(row, values) for row in rows])
        np.testing.assert_allclose(getattr(found, values), expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        outputs = model.predict(name, dataset.batch(range(EXAMPLES)))
    expected = task_loss(TASKS[name], outputs, dataset.labels).item()
    assert found.loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_batch_too_large_for_a_gpus_memory_is_halved(model, datasets, monkeypatch, most):
    """Until its parts fit; one that holds a single example is an error."""
    predict, sizes = model.predict, []

    def predict_few(name, batch):
        sizes.append(len(batch.ids))
        if len(batch.ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(name, batch)

    for dataset in datasets.values():
        expected = predict_dataset(model, dataset, CPU)
        with monkeypatch.context() as patch:
            patch.setattr(model, "predict", predict_few)
            found = predict_dataset(model, dataset, CPU)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-5)
    assert sizes[:2] == [EXAMPLES, EXAMPLES // 2]
    most = 0
    monkeypatch.setattr(model, "predict", predict_few)
    with pytest.raises(OutOfMemory, match="out of memory on cpu with evaluation batches of up to"):
        predict_dataset(model, datasets["sst"], CPU)
    assert sizes[-1] == 1


def test_prediction_has_no_dropout_and_leaves_no_gradients(model, datasets):
    model.train()
    first, second = (predict_dataset(model, datasets["sst"], CPU) for _ in range(2))
    assert not model.training
    np.testing.assert_array_equal(first.scores, second.scores)
    assert all(p.grad is None for p in model.parameters())


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
    calibrate(model.train(), datasets, EXAMPLES, CPU)
    for name, dataset in datasets.items():
        assert model.get_buffer(f"offset_{name}").abs().max() > 0.01
        calibrated = predict_dataset(model, dataset, CPU)
        model.get_buffer(f"offset_{name}").zero_()
        before = predict_dataset(model, dataset, CPU)
        assert calibrated.loss < before.loss
        if TASKS[name].num_classes == 1:
            means = [abs(r.scores.mean() - r.labels.mean()) for r in (before, calibrated)]
            assert means[1] < 0.5 * means[0]


def test_calibration_is_repeatable_and_changes_no_training_loss(model, datasets):
    batches = {name: dataset.batch(range(8)) for name, dataset in datasets.items()}
    before, offsets = model(batches), []
    for _ in range(2):
        calibrate(model, datasets, 12, CPU)
        offsets.append({name: model.get_buffer(f"offset_{name}").clone() for name in NAMES})
    after = model.eval()(batches)
    for name in NAMES:
        assert torch.equal(offsets[0][name], offsets[1][name])
        assert torch.equal(before[name], after[name])


def test_calibration_with_no_examples_does_nothing(model, datasets):
    calibrate(model, datasets, 0, CPU)
    assert not any(model.get_buffer(f"offset_{name}").any() for name in NAMES)


# ------------------------------------------------------------------------------------- saved models

LORA = LoRAConfig(r=3, alpha=6.0, targets=("query", "output"))
IN_BOTH = "vocab.txt tokenizer.json tokenizer_config.json special_tokens_map.json "
IN_BOTH += "heads.safetensors heads.json manifest.json "


@pytest.fixture
def save(model, toy_vocab_folder, tmp_path):
    """A function that saves the model, with trained adapters if asked, and returns the folder."""

    def saved(lora):
        model.bert.origin = Encoder("some/encoder", toy_vocab_folder, "1" * 40, "0" * 64)
        if lora:
            apply_lora(model.bert, lora)
            for tensor in adapter_tensors(model.bert).values():
                torch.nn.init.normal_(tensor, std=0.2)
        RunFolder(tmp_path).save_best(lambda folder: save_model(model, lora, folder))
        return tmp_path / "best"

    return saved


@pytest.mark.parametrize("lora", [None, LORA])
def test_saved_model_loads_with_the_same_numbers(model, datasets, save, lora):
    calibrate(model, datasets, EXAMPLES, CPU)
    folder = save(lora)
    torch.manual_seed(99)  # other weights than the saved ones, except for the adapter's encoder
    bert = BertModel(model.bert.config)
    if lora:
        base = {n: t for n, t in model.bert.state_dict().items() if "lora_" not in n}
        bert.load_state_dict(base)
        apply_lora(bert, lora)
    again = MultitaskBERT(bert, model.config, model.tokenizer).eval()
    load_weights(again, lora, folder)
    for dataset in datasets.values():
        found, expected = (predict_dataset(m, dataset, CPU) for m in (again, model))
        np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    ("lora", "files"),
    [
        (None, "config.json model.safetensors modules.json 1_Pooling sentence_bert_config.json"),
        (LORA, "adapter_config.json adapter_model.safetensors"),  # no copy of the encoder
    ],
)
def test_files_of_a_saved_model(save, lora, files):
    assert {path.name for path in save(lora).iterdir()} == set((IN_BOTH + files).split())


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_fault_29_heads_that_do_not_fit(model, save, fault):
    folder = save(None)
    tensors = load_file(folder / "heads.safetensors")
    name = f"heads.{'cfimdb' if fault == 'unexpected' else 'sst'}.projection.weight"
    tensors[name] = torch.zeros(7, 32)
    if fault == "missing":
        del tensors[name]
    save_file(tensors, folder / "heads.safetensors")
    (folder / "manifest.json").write_text("{}")  # no hash speaks against the file
    with pytest.raises(UserError, match=r"heads\.safetensors: does not fit"):
        load_weights(model, None, folder)


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("others", ["--report run", "--sentence x", "--checkpoint a b"])
def test_data_dir_goes_with_one_run(others):
    with pytest.raises(UserError, match="--data_dir goes with"):
        evaluation.main(["--data_dir", "moved", *others.split()])


def test_without_a_run_there_is_nothing_to_evaluate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        evaluation.main([])
