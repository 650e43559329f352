"""One step of the training loop: its learning rate, its gradient, and what of it is not finite."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch

from gradient_surgery import pcgrad
from multitask_classifier import compute_gradients, loss_groups, prepare_step, set_learning_rate
from runtime.device import Compute
from training.flags import parse_command
from training.log import not_finite
from training.plan import make_plan

SEED, STEP = 7, 3
WEIGHTS = {"sst": 2.0, "para": 0.0, "sts": 0.5}
CPU = Compute("cpu", "fp32")


def plan_of(flags="", weights=WEIGHTS):
    """The plan of a command line, with these weights of the losses."""
    words = [f"{name}={weight}" for name, weight in weights.items()]
    command = [*flags.split(), "--seed", str(SEED), "--runs_dir", "none", "--loss_weights", *words]
    return make_plan(parse_command(command).flags, {})


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
    """Worked out by hand. Each group of parameters has its own peak."""
    plan = plan_of(f"--warmup {warmup} --epochs 1 --steps_per_epoch {total}")
    groups = [{"peak_lr": 1.0}, {"peak_lr": 10.0}]
    for step, factor in enumerate(expected):
        set_learning_rate(SimpleNamespace(param_groups=groups), step, plan)
        assert [group["lr"] for group in groups] == pytest.approx([factor, 10 * factor])


@pytest.fixture
def batches(tiny_config):
    """A batch of each of the three tasks; the gradient of sts opposes the others'."""
    seeds = {"sst": 0, "para": 0, "sts": 2}
    return {name: make_batch(name, tiny_config.vocab_size, seed) for name, seed in seeds.items()}


def gradients(model, compute):
    """The gradient of each trained parameter after `compute()`, by name."""
    model.zero_grad()
    compute()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def micro_batches_of(model, step_batches, plan):
    """The micro-batches, prepared, of the step that has these batches."""
    first = STEP * plan.flags.accumulate
    return prepare_step(model, dict(enumerate(step_batches, first)), STEP, plan)


def of_step(model, step_batches, plan):
    """The gradients of a step."""
    micro_batches = micro_batches_of(model, step_batches, plan)
    return gradients(model, lambda: compute_gradients(model, micro_batches, STEP, plan, CPU))


def of_task(model, batches, name):
    """The gradients of one task's loss, without a weight."""
    return gradients(model, lambda: model({name: batches[name]})[name].backward())


def test_the_gradient_is_that_of_the_weighted_sum(build, batches):
    """A weight of 0 leaves a task's head no gradient. Losses are returned without weights."""
    model = build()
    found = of_step(model, [batches], plan_of())
    parts = {name: of_task(model, batches, name) for name in WEIGHTS}
    for name, value in found.items():
        expected = sum(w * parts[t][name] for t, w in WEIGHTS.items() if name in parts[t])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert not any(value.any() for name, value in found.items() if name.startswith("heads.para"))
    micro_batches = micro_batches_of(model, [batches], plan_of())
    losses, _ = compute_gradients(model, micro_batches, STEP, plan_of(), CPU)
    for name, loss in model(batches).items():
        assert float(losses[name]) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("surgery", ["", " --gradient_surgery main --main_tasks sst sts"])
def test_with_sampling_a_task_weighs_as_its_share_of_the_batch(build, batches, surgery):
    """Of 12, 8 and 4 examples: 1.5, 1 and 0.5 times its weight. Surgery changes the encoder's."""
    sizes = [{"sst": 12, "para": 8, "sts": 4}]
    plan = replace(plan_of(f"--sampling proportional{surgery}"), epoch_sizes=sizes)
    shares = {"sst": 1.5, "para": 1.0, "sts": 0.5}
    expected = plan_of("", {name: w * shares[name] for name, w in WEIGHTS.items()})
    found, expected = (of_step(build(), [batches], p) for p in (plan, expected))
    for name, value in found.items():
        if not (surgery and name.startswith("bert.")):
            torch.testing.assert_close(value, expected[name], msg=name)


def test_r_drop_belongs_to_its_main_task():
    plan = plan_of("--gradient_surgery main --main_tasks sst --r_drop sst para")
    losses = dict.fromkeys(["sst", "para", "sts", "r_drop_sst", "r_drop_para"], 0.0)
    groups = {name: list(group) for name, group in loss_groups(losses, None, plan).items()}
    auxiliary = ["para", "sts", "r_drop_para"]
    assert groups == {"main": ["sst", "r_drop_sst"], "auxiliary": auxiliary}


def test_accumulated_batches_count_as_their_mean(build, batches, tiny_config):
    """The weights of a run would not show it: AdamW steps as far for a multiple of a gradient."""
    model, plan = build(), plan_of("--accumulate 2")
    other = {name: make_batch(name, tiny_config.vocab_size, seed=1) for name in WEIGHTS}
    one, two = (of_step(model, [part], plan_of()) for part in (batches, other))
    for name, value in of_step(model, [batches, other], plan).items():
        expected = (one[name] + two[name]) / 2
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_surgery_leaves_the_projected_gradient_on_the_encoder_alone(build, batches, reduction):
    """The heads keep their own task's gradient. Weights count before the projection."""
    model, weights = build(), WEIGHTS | {"para": 1.0}
    found = of_step(model, [batches], plan_of(f"--gradient_surgery {reduction}", weights))
    parts = {name: of_task(model, batches, name) for name in weights}
    shared = [n for n, p in model.named_parameters() if n.startswith("bert.") and p.requires_grad]
    flat = {t: w * torch.cat([parts[t][n].flatten() for n in shared]) for t, w in weights.items()}
    projected = pcgrad(flat, random.Random(f"{SEED} {STEP}"), reduction)
    assert projected.conflicts > 0, "nothing to project: the plain sum would pass too"
    encoder = torch.cat([found[name].flatten() for name in shared])
    torch.testing.assert_close(encoder, projected.gradient, rtol=1e-3, atol=1e-6)
    for name, value in found.items():
        if name.startswith("heads."):
            task = name.split(".")[1]
            torch.testing.assert_close(value, weights[task] * parts[task][name], msg=name)


@pytest.mark.parametrize(
    ("tasks", "is_conflict"), [(["sts"], True), (["sst"], True), (["sst", "sts"], False)]
)
def test_the_auxiliary_gradient_is_projected_off_the_encoders_main_one(
    build, batches, tasks, is_conflict
):
    """Where they agree all is the weighted sum, which the heads always have. One pass for all."""
    model, weights = build(dropout=0.3), {"sst": 2.0, "para": 0.3, "sts": 0.3}
    plan = plan_of(f"--gradient_surgery main --main_tasks {' '.join(tasks)}", weights)
    plain = plan_of("", weights)
    found, expected = (of_step(model, [batches], p) for p in (plan, plain))
    parts = {}
    for group in ("main", "auxiliary"):
        chosen = {n: w * ((n in tasks) == (group == "main")) for n, w in weights.items()}
        parts[group] = of_step(model, [batches], replace(plain, loss_weights=chosen))
    shared = [n for n, p in model.named_parameters() if n.startswith("bert.") and p.requires_grad]
    flat = {group: torch.cat([part[n].flatten() for n in shared]) for group, part in parts.items()}
    main, auxiliary = flat.values()
    dot = main @ auxiliary
    assert (dot < 0) == is_conflict
    if is_conflict:
        auxiliary = auxiliary - dot / (main @ main) * main
    encoder = torch.cat([found[name].flatten() for name in shared])
    torch.testing.assert_close(encoder, main + auxiliary, rtol=1e-3, atol=1e-6)
    others = [name for name in found if is_conflict <= (name not in shared)]
    for name in others:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(name.startswith("heads.para") for name in others)
    assert found.keys() == expected.keys()


def test_the_vaccines_averages_pass_from_step_to_step(build, batches):
    """The second step of the same batches differs from the first: the averages have moved."""
    model, plan = build(), plan_of("--gradient_surgery vaccine", WEIGHTS | {"para": 1.0})
    first, second = (of_step(model, [batches], plan) for _ in range(2))
    assert (model.cosine_targets.diagonal() == 0).all()
    assert model.cosine_targets.abs().sum() > 0.01
    model.cosine_targets = None
    again = of_step(model, [batches], plan)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[n], second[n]) for n in first if ".query.weight" in n)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("flags", ["", "--gradient_surgery"])
def test_the_loss_with_a_gradient_that_is_not_finite_is_named(build, batches, flags, frozen):
    """With the ids of its batch alone. Over a frozen encoder, the cosine of sts trains nothing."""
    model = build(frozen=frozen)
    losses = model(batches)
    assert losses["sts"].requires_grad != frozen

    def break_gradient(_, inputs, losses):
        if "para" in losses:
            losses["para"].register_hook(lambda gradient: gradient * float("nan"))

    model.register_forward_hook(break_gradient)
    values, plan = {name: loss.item() for name, loss in losses.items()}, plan_of(flags)
    micro_batches = micro_batches_of(model, [batches], plan)
    error = str(not_finite(model, values, micro_batches, STEP, plan, CPU))
    assert f"step {STEP + 1}: gradient of the loss para is not finite" in error
    assert error.endswith("batch para: para0 para1 para2 para3")


@pytest.mark.parametrize("flags", ["", "--gradient_surgery"])
def test_the_diagnosis_computes_the_losses_of_the_step_again(build, batches, flags):
    """Under the same dropout masks; surgery encodes task by task, each pass with its own masks."""
    model, plan, found = build(dropout=0.5), plan_of(flags), []
    model.register_forward_hook(lambda *call: found.append(call[-1]))
    micro_batches = micro_batches_of(model, [batches], plan)
    for step in (STEP, STEP + 1):
        compute_gradients(model, micro_batches, step, plan, CPU)
    not_finite(model, dict.fromkeys(WEIGHTS, 0.0), micro_batches, STEP, plan, CPU)
    values = [{name: loss.item() for name, loss in losses.items()} for losses in found]
    third = len(values) // 3
    assert values[:third] == values[-third:] != values[third : 2 * third]
