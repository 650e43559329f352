"""LoRA: where it goes, what it trains, and that merging and saving change no number."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from bert import BertModel
from config import LORA_TARGETS, LoRAConfig, MultitaskConfig, UserError
from lora import (
    LoRALinear,
    LowRankLinear,
    adapter_layers,
    adapter_tensors,
    apply_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    target_names,
)
from multitask_bert import MultitaskBERT

CONFIG = LoRAConfig(r=3, alpha=6.0)
IDS = torch.tensor([[2, 9, 14, 22, 3], [2, 30, 11, 3, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def bert(tiny_config):
    """A tiny encoder in eval mode with large weights."""
    return BertModel(replace(tiny_config, initializer_range=0.2)).eval()


def copy_of(bert):
    """A second encoder with the same weights."""
    twin = BertModel(bert.config).eval()
    twin.load_state_dict(bert.state_dict())
    return twin


def train_a_little(model):
    """Adapters as they are after training: B is not zero any more."""
    for name, tensor in adapter_tensors(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(tensor, std=0.3)
    return model


def output(model):
    """The pooled output of the two sentences."""
    with torch.no_grad():
        return model(IDS, MASK)["pooler_output"]


# ---------------------------------------------------------------------------------- at the start


def test_the_output_at_the_start_is_the_plain_models(bert):
    before = output(bert)
    assert torch.equal(output(apply_lora(bert, CONFIG)), before)


def test_the_base_keys_do_not_change_and_weights_are_not_copied(bert):
    before = dict(bert.named_parameters())
    keys = set(bert.state_dict())
    after = dict(apply_lora(bert, CONFIG).named_parameters())
    assert keys <= set(bert.state_dict())
    assert all(after[name] is parameter for name, parameter in before.items())
    extra = set(bert.state_dict()) - keys
    assert extra == set(adapter_tensors(bert))


def test_initial_values_are_hus(bert):
    """A Kaiming uniform with a = √5, which is ± 1 / √in; B zero (Hu et al. 2021, §4.1)."""
    apply_lora(bert, LoRAConfig(r=16))
    for layer in adapter_layers(bert).values():
        bound = 1 / math.sqrt(layer.in_features)
        assert layer.lora_A.shape == (16, layer.in_features)
        assert layer.lora_B.shape == (layer.out_features, 16)
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert not layer.lora_B.any()


def test_one_layer_by_hand():
    linear = nn.Linear(2, 2)
    layer = LoRALinear(linear, LoRAConfig(r=1, alpha=4.0))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([0.5, -0.5]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0], [0.5]]))
        found = layer(torch.tensor([[3.0, 1.0]]))
    # W x + b = (5.5, 12.5); A x = 2; B A x = (4, 1); alpha / r = 4
    assert found.tolist() == [[5.5 + 16.0, 12.5 + 4.0]]
    assert layer.delta().tolist() == [[8.0, -8.0], [2.0, -2.0]]


def test_gradcheck_of_a_layer():
    layer = LoRALinear(nn.Linear(4, 3), LoRAConfig(r=2)).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def function(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    matrices = (layer.lora_A, layer.lora_B)
    assert torch.autograd.gradcheck(function, (x, *matrices))


def test_dropout_is_on_the_low_rank_path_alone():
    linear = nn.Linear(50, 4)
    layer = LoRALinear(linear, LoRAConfig(r=2, dropout=0.5)).train()
    x = torch.randn(3, 50)
    assert torch.equal(layer(x), linear(x))  # B is zero: nothing else may be dropped
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), linear(x) + x @ layer.delta().T)


def test_dropout_of_the_low_rank_path_has_its_rate():
    """With W, A and B the identity, y - x is what dropout made of x; its mask is the gradient's."""
    layer = LoRALinear(nn.Linear(500, 500), LoRAConfig(r=500, alpha=500.0, dropout=0.3)).train()
    with torch.no_grad():
        for matrix in (layer.weight, layer.lora_A, layer.lora_B):
            matrix.copy_(torch.eye(500))
        layer.bias.zero_()
    x = torch.ones(400, 500, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    dropped = y == 1  # the base path alone; never 0, which would be its own dropout
    deviation = math.sqrt(0.3 * 0.7 / y.numel())
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=5 * deviation)
    assert y[~dropped].min().item() == pytest.approx(1 + 1 / 0.7, rel=1e-4)
    assert y[~dropped].max().item() == pytest.approx(1 + 1 / 0.7, rel=1e-4)
    torch.testing.assert_close(x.grad, y)


# ------------------------------------------------------------------------- gradients by hand

KINDS = list(itertools.product([(5,), (2, 3), (2, 2, 3)], [False, True], [False, True]))
kinds = pytest.mark.parametrize(("shape", "with_dropped", "with_bias"), KINDS)


@kinds
def test_gradcheck_of_the_gradients_by_hand(shape, with_dropped, with_bias):
    """Of x, what dropout made of it, A and B; W and b are frozen."""
    weight, bias = torch.randn(3, 4).double(), torch.randn(3).double() if with_bias else None
    lora_A, lora_B = torch.randn(2, 4).double(), torch.randn(3, 2).double()
    x, dropped = torch.randn(2, *shape, 4).double()
    inputs = [t.requires_grad_() for t in (x, dropped, lora_A, lora_B)]

    def function(x, dropped, lora_A, lora_B):
        dropped = dropped if with_dropped else None
        return LowRankLinear.apply(x, dropped, weight, bias, lora_A, lora_B, 1.7)

    if not with_dropped:
        dropped.requires_grad_(False)
    assert torch.autograd.gradcheck(function, inputs)


def composite(layer, x):
    """The same layer by autograd, as `peft` computes it."""
    low_rank = F.linear(F.linear(layer.dropout(x), layer.lora_A), layer.lora_B)
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * low_rank


def values_and_gradients(function, layer, x, weights):
    """Output and gradients of x, A and B, with the same dropout on every call."""
    torch.manual_seed(9)
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    matrices = (layer.lora_A, layer.lora_B)
    gradients = torch.autograd.grad(y, (leaf, *matrices), weights.to(y.dtype))
    return dict(zip(("y", "x", "lora_A", "lora_B"), (y.detach(), *gradients), strict=True))


def layer_and_input(shape, with_dropout, with_bias):
    """A layer of 24 -> 20 as it is amid training, an input (…, 24) and weights of the output."""
    config = LoRAConfig(r=3, alpha=6.0, dropout=0.4 if with_dropout else 0.0)
    layer = LoRALinear(nn.Linear(24, 20, bias=with_bias), config).train()
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer, torch.randn(*shape, 24), torch.randn(*shape, 20)


@kinds
def test_a_layer_equals_the_composite(shape, with_dropped, with_bias):
    layer, x, weights = layer_and_input(shape, with_dropped, with_bias)
    found = values_and_gradients(layer, layer, x, weights)
    right = values_and_gradients(lambda x: composite(layer, x), layer, x, weights)
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_a_layer_equals_the_composite_under_autocast(shape, with_dropped, with_bias, dtype):
    """Neither differs from double precision by more than bf16's rounding; types are the same."""
    layer, x, weights = layer_and_input(shape, with_dropped, with_bias)
    x = x.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(layer, layer, x, weights)
        right = values_and_gradients(lambda x: composite(layer, x), layer, x, weights)
    exact = copy.deepcopy(layer).double()
    truth = values_and_gradients(lambda x: composite(exact, x), exact, x.double(), weights)
    assert found["y"].dtype == torch.bfloat16
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        limit = 2**-6 * truth[name].abs().max().item()
        for other in (tensor.double(), truth[name]):
            torch.testing.assert_close(found[name].double(), other, rtol=0, atol=limit, msg=name)


def test_a_wrong_gradient_would_show(monkeypatch):
    """The twin of those above, by a scaling that the backward pass leaves out."""
    layer, x, weights = layer_and_input((5,), False, True)
    right = values_and_gradients(layer, layer, x, weights)
    backward = LowRankLinear.backward

    def unscaled(ctx, grad):
        ctx.scaling = 1.0
        return backward(ctx, grad)

    monkeypatch.setattr(LowRankLinear, "backward", staticmethod(unscaled))
    wrong = values_and_gradients(layer, layer, x, weights)
    for name in ("x", "lora_A", "lora_B"):
        scale = right[name].abs().max().item()
        assert (wrong[name] - right[name]).abs().max() > 2**-4 * scale, name


def test_transposed_inputs_and_gradients():
    """Neither has to lie in memory in order: here (batch, seq) are exchanged on both sides."""
    layer, x, weights = layer_and_input((4, 3), True, True)

    def exchanged(function):
        return lambda x: function(x.transpose(0, 1)).transpose(0, 1)

    found = values_and_gradients(exchanged(layer), layer, x, weights)
    right = values_and_gradients(exchanged(lambda x: composite(layer, x)), layer, x, weights)
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_can_be_asked_for_twice():
    """Gradient surgery goes back through one forward pass once per task."""
    layer, x, weights = layer_and_input((2, 3), True, True)
    y = layer(x.requires_grad_())
    inputs = (x, layer.lora_A, layer.lora_B)
    first = torch.autograd.grad(y, inputs, weights, retain_graph=True)
    first = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(y, inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_frozen_weights_converted_to_bf16_change_nothing_under_autocast():
    """`keep_frozen_in` converts W and b once, in place of on every use."""
    layer, x, weights = layer_and_input((2, 3), True, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = values_and_gradients(layer, layer, x, weights)
        layer.weight.data, layer.bias.data = layer.weight.bfloat16(), layer.bias.bfloat16()
        found = values_and_gradients(layer, layer, x, weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


def test_the_base_weights_get_no_gradient_and_an_input_needs_none():
    """The first layers' input is frozen, and the gradient of x then is not computed at all."""
    layer, x, weights = layer_and_input((2, 3), False, True)
    right = values_and_gradients(layer, layer, x, weights)
    torch.manual_seed(9)
    layer(x).backward(weights)
    assert x.grad is None
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert torch.equal(layer.lora_A.grad, right["lora_A"])
    assert torch.equal(layer.lora_B.grad, right["lora_B"])


# ---------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize("target", LORA_TARGETS)
def test_each_target_is_one_kind_of_layer(bert, target):
    """`output` must not hit `attention.output` too, whose name ends alike."""
    suffix = LORA_TARGETS[target]
    expected = [f"encoder.layer.{i}.{suffix}" for i in range(bert.config.num_hidden_layers)]
    assert target_names(bert, (target,)) == expected
    apply_lora(bert, replace(CONFIG, targets=(target,)))
    assert list(adapter_layers(bert)) == expected


def test_all_targets_are_every_linear_layer_of_the_encoders_layers(bert):
    linears = {
        name
        for name, module in bert.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    }
    assert set(target_names(bert, tuple(LORA_TARGETS))) == linears
    apply_lora(bert, CONFIG)
    assert set(adapter_layers(bert)) == linears
    assert target_names(bert, tuple(LORA_TARGETS)) == list(adapter_layers(bert))


@pytest.mark.parametrize("r", [0, -1, 33])
def test_r_has_to_fit_the_layers(bert, r):
    with pytest.raises(ValueError, match=f"r is {r}; expected 1 to 32"):
        apply_lora(bert, replace(CONFIG, r=r))


def test_the_largest_r_works(bert):
    before = output(bert)
    assert torch.equal(output(apply_lora(bert, replace(CONFIG, r=32))), before)


# ------------------------------------------------------------------------------------ what trains


def test_only_adapters_and_heads_train(bert):
    apply_lora(bert, CONFIG)
    model = MultitaskBERT(bert, MultitaskConfig())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"bert.{name}" for name in adapter_tensors(bert)}
    heads = {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    assert trained == adapters | heads
    assert adapters
    assert heads


def test_a_training_step_moves_adapters_and_leaves_the_base(bert):
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    apply_lora(bert, CONFIG)
    trained = [p for p in bert.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):  # A moves from the second step on, once B is not zero
        bert(IDS, MASK)["last_hidden_state"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in before.items():
        assert torch.equal(bert.state_dict()[name], value), name
    assert all(layer.lora_B.any() for layer in adapter_layers(bert).values())


# ------------------------------------------------------------------------------- merging, saving


def test_merged_equals_unmerged_and_is_a_plain_model(bert):
    train_a_little(apply_lora(bert, CONFIG))
    before = output(bert)
    keys = set(BertModel(bert.config).state_dict())
    merge_lora(bert)
    torch.testing.assert_close(output(bert), before, rtol=1e-4, atol=1e-5)
    assert not adapter_layers(bert)
    assert set(bert.state_dict()) == keys


def test_an_untrained_adapter_would_show(bert):
    """The twin of merged equals unmerged: trained adapters do change the output."""
    before = output(bert)
    train_a_little(apply_lora(bert, CONFIG))
    assert (output(bert) - before).abs().max() > 1e-2


def test_eval_and_train_merge_nothing(bert):
    """loralib's eval() merges: saved then and loaded again, the update would count twice."""
    train_a_little(apply_lora(bert, CONFIG))
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    bert.train().eval().train().eval()
    assert all(torch.equal(bert.state_dict()[name], value) for name, value in before.items())


def test_eval_save_load_eval_gives_the_same_numbers(bert, tmp_path):
    plain = copy_of(bert)
    train_a_little(apply_lora(bert, CONFIG)).eval()
    expected = output(bert)
    save_adapter(bert, tmp_path, CONFIG, "some/encoder")
    again = apply_lora(plain, CONFIG)
    load_adapter(again, tmp_path, CONFIG)
    assert torch.equal(output(again.eval()), expected)
    assert torch.equal(output(bert), expected)


def test_a_merged_model_saves_and_loads_as_a_plain_one(bert, tmp_path):
    train_a_little(apply_lora(bert, CONFIG))
    expected = output(bert)
    merge_lora(bert).save_pretrained(tmp_path)
    found = output(BertModel.from_pretrained(tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(bert, tmp_path):
    """A folder with a trained adapter, and a fresh model to read it into."""
    fresh = apply_lora(copy_of(bert), CONFIG)
    save_adapter(train_a_little(apply_lora(bert, CONFIG)), tmp_path, CONFIG, "some/encoder")
    return tmp_path, fresh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, "r is 3, expected 4"),
        ({"alpha": 7.0}, "alpha is 6.0, expected 7.0"),
        ({"targets": ("query", "value")}, "target_modules is "),
    ],
)
def test_an_adapter_of_another_kind_is_refused(saved, change, message):
    """With another alpha every number would be off, with nothing else to show for it."""
    folder, fresh = saved
    with pytest.raises(UserError, match=message):
        load_adapter(fresh, folder, replace(CONFIG, **change))


@pytest.mark.parametrize("setting", ["use_rslora", "use_dora"])
def test_another_kind_of_low_rank_path_is_refused(saved, setting):
    folder, fresh = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: True}))
    with pytest.raises(UserError, match=f"{setting} is True"):
        load_adapter(fresh, folder, CONFIG)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_an_adapter_with_a_wrong_tensor_is_refused_and_nothing_is_copied(saved, fault):
    folder, fresh = saved
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["base_model.model.classifier.weight"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, path)
    before = {n: t.clone() for n, t in adapter_tensors(fresh).items()}
    with pytest.raises(UserError, match=fault if fault != "shape" else "expected"):
        load_adapter(fresh, folder, CONFIG)
    assert all(torch.equal(t, before[n]) for n, t in adapter_tensors(fresh).items())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"r": 3, "lora_alpha": "much"}'])
def test_a_damaged_adapter_configuration_is_refused(saved, text):
    folder, fresh = saved
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config"):
        load_adapter(fresh, folder, CONFIG)


def test_the_written_configuration_is_one_peft_reads(saved):
    folder, _ = saved
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 3, 6.0)
    assert settings["base_model_name_or_path"] == "some/encoder"
    assert all(name.startswith("encoder.layer.") for name in settings["target_modules"])
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight" in names


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    x, A, B = (torch.randn(*shape, requires_grad=True) for shape in ((3, 6), (2, 6), (5, 2)))
    y = LowRankLinear.apply(x, None, torch.randn(5, 6), None, A, B, 0.5)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_low_rank_linear_takes_one_vector_and_no_vector():
    W, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    x = torch.randn(6, requires_grad=True)
    y = LowRankLinear.apply(x, None, W, None, A, B, 0.5)
    torch.testing.assert_close(y, x @ (W + 0.5 * B @ A).T)
    y.sum().backward()
    assert x.grad.shape == (6,)
    empty = torch.randn(0, 6, requires_grad=True)
    LowRankLinear.apply(empty, None, W, None, A, B, 0.5).sum().backward()
    assert empty.grad.shape == (0, 6)
