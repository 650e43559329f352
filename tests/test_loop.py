"""One step of the loop by itself: its learning rate, and the gradient it leaves."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_multitask_bert import make_batch

import monitor
import multitask_classifier
from bert import BertModel
from config import MultitaskConfig
from gradient_surgery import pcgrad
from multitask_bert import MultitaskBERT
from multitask_classifier import backward, backward_with_surgery, set_learning_rate

SEED, STEP = 7, 3
WEIGHTS = {"sst": 2.0, "para": 0.0, "sts": 0.5}


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (4, 0.5, [0.5, 1, 1, 0.5]),
        (10, 0.1, [1, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]),
        (4, 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
        (3, 1.0, [1 / 3, 2 / 3, 1]),
        (1, 0.1, [1]),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_to_zero(total, warmup, expected):
    """By hand; of groups each has its own peak."""
    groups = [{"peak_lr": 1.0}, {"peak_lr": 10.0}]
    for step, factor in enumerate(expected):
        set_learning_rate(SimpleNamespace(param_groups=groups), step, total, warmup)
        assert [group["lr"] for group in groups] == pytest.approx([factor, 10 * factor])


@pytest.fixture
def model(tiny_config):
    """Three tasks on a tiny encoder, in training mode; without dropout, so that passes agree."""
    torch.manual_seed(6)
    bert = BertModel(replace(tiny_config, initializer_range=0.2))
    bert.set_dropout(0.0)
    return MultitaskBERT(bert, MultitaskConfig(dropout=0.0, max_length=40)).train()


@pytest.fixture
def batches(tiny_config):
    """A batch of each of the three tasks."""
    return {name: make_batch(name, tiny_config.vocab_size) for name in WEIGHTS}


def arguments(**settings):
    """What `backward` reads of the command line."""
    values = {"weights": WEIGHTS, "seed": SEED, "gradient_surgery": "sum"}
    return SimpleNamespace(**values | settings)


def gradients(model, compute):
    """Gradient of each trained weight by name after `compute()`."""
    model.zero_grad()
    compute()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def of_task(model, batches, name):
    """Gradients of one task's loss, without a factor."""
    return gradients(model, lambda: model({name: batches[name]})[name].backward())


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def test_the_gradient_is_that_of_the_weighted_sum(model, batches):
    """A factor of 0 leaves a task's head without any; the losses are logged without factors."""
    rest = (arguments(), STEP, "fp32", NO_SCALER)
    losses = {}
    summed = gradients(model, lambda: losses.update(backward(model, [batches], *rest)[0]))
    parts = {name: of_task(model, batches, name) for name in WEIGHTS}
    for name, value in summed.items():
        expected = sum(f * parts[t][name] for t, f in WEIGHTS.items() if name in parts[t])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert not any(summed[name].any() for name in summed if name.startswith("heads.para"))
    for name, loss in model(batches).items():
        assert float(losses[name]) == pytest.approx(loss.item(), rel=1e-5)


def test_accumulated_batches_count_as_their_mean(model, batches, tiny_config):
    other = {name: make_batch(name, tiny_config.vocab_size, seed=1) for name in WEIGHTS}
    rest = (arguments(), STEP, "fp32", NO_SCALER)
    both = gradients(model, lambda: backward(model, [batches, other], *rest))
    one, two = (gradients(model, lambda b=b: backward(model, [b], *rest)) for b in (batches, other))
    for name, value in both.items():
        expected = (one[name] + two[name]) / 2
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_surgery_leaves_the_projected_gradient_on_the_encoder_alone(
    model, batches, tiny_config, reduction
):
    """The heads keep their own tasks'; factors count before the projection."""
    weights = {"sst": 2.0, "para": 1.0, "sts": 0.5}
    batches["sts"] = make_batch("sts", tiny_config.vocab_size, seed=2)  # which opposes the others
    args = arguments(weights=weights, gradient_surgery=reduction)
    found = gradients(
        model, lambda: backward_with_surgery(model, [batches], args, STEP, "fp32", NO_SCALER)
    )
    parts = {name: of_task(model, batches, name) for name in weights}
    shared = [n for n, p in model.named_parameters() if n.startswith("bert.") and p.requires_grad]
    flat = {
        task: factor * torch.cat([parts[task][name].flatten() for name in shared])
        for task, factor in weights.items()
    }
    projected = pcgrad(flat, random.Random(f"{SEED} {STEP}"), reduction)
    assert projected.conflicts > 0, "nothing to project: the plain sum would pass too"
    encoder = torch.cat([found[name].flatten() for name in shared])
    torch.testing.assert_close(encoder, projected.gradient, rtol=1e-3, atol=1e-6)
    for name, value in found.items():
        if name.startswith("heads."):
            task = name.split(".")[1]
            torch.testing.assert_close(value, weights[task] * parts[task][name], msg=name)


# --------------------------------------------------------------------- whose gradient is not finite


def broken(model, task, number=float("nan")):
    """Let the gradient of one task's loss be `number` times itself; the loss stays as it is."""
    forward = model.forward

    def changed(batches):
        losses = forward(batches)
        if task in losses:
            losses[task].register_hook(lambda gradient: gradient * number)
        return losses

    model.forward = changed
    return model


def test_the_loss_with_a_gradient_that_is_not_finite_is_found(model, batches):
    for surgery in (None, "sum"):
        args = arguments(gradient_surgery=surgery)
        found = monitor.bad_gradients(broken(model, "para"), [batches], args, STEP, "fp32")
        assert found == ["para"]


def test_a_loss_that_trains_nothing_has_no_gradient_to_look_at(tiny_config, batches):
    """The cosine of two vectors of a frozen encoder."""
    model = MultitaskBERT(BertModel(tiny_config), MultitaskConfig(), frozen=True).train()
    assert not model({"sts": batches["sts"]})["sts"].requires_grad
    args = arguments(gradient_surgery=None)
    assert monitor.bad_gradients(broken(model, "sst"), [batches], args, STEP, "fp32") == ["sst"]


def test_surgery_looks_for_it_under_the_masks_of_the_step(tiny_config, batches, monkeypatch):
    """It encodes task by task: each pass has seeds of its own."""
    seeds = {"step": [], "search": []}
    args = arguments(weights=dict.fromkeys(WEIGHTS, 1.0))
    model = MultitaskBERT(BertModel(tiny_config), MultitaskConfig(max_length=40)).train()
    for module, key in ((multitask_classifier, "step"), (monitor, "search")):
        monkeypatch.setattr(module, "seed_everything", lambda *n, key=key: seeds[key].append(n))
    backward_with_surgery(model, [batches], args, STEP, "fp32", NO_SCALER)
    monitor.bad_gradients(model, [batches], args, STEP, "fp32")
    assert seeds["step"] == seeds["search"] and len(seeds["step"]) == 3
