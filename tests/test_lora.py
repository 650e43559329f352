"""LoRA: where it goes, what it trains, and that merging and saving change no number.

Numbers in names are rows of the fault table.
"""

import copy
import json
import math
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from base_bert import read_tensors, write_tensors
from bert import BertModel
from config import LORA_VARIANTS, LoRAConfig, MultitaskConfig, UserError
from lora import (
    DoRALinear,
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
DORA = replace(CONFIG, variant="dora")
IDS = torch.tensor([[2, 9, 14, 22, 3], [2, 30, 11, 3, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def plain(tiny_config):
    """A tiny encoder in eval mode with large weights."""
    return BertModel(replace(tiny_config, initializer_range=0.2)).eval()


@pytest.fixture
def adapted(plain, request):
    """The encoder `plain`, copied, with an adapter as after training: B is not zero any more."""
    model = apply_lora(copy.deepcopy(plain), getattr(request, "param", CONFIG))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def output(model):
    """The pooled output of the two sentences."""
    with torch.no_grad():
        return model(IDS, MASK)["pooler_output"]


# -------------------------------------------------------------------------------------- one layer


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
    merged = merge_lora(nn.Sequential(layer))[0].weight  # W + 4 B A
    assert merged.tolist() == [[1.0 + 8.0, 2.0 - 8.0], [3.0 + 2.0, 4.0 - 2.0]]


def test_one_dora_layer_by_hand():
    layer = DoRALinear(linear := nn.Linear(2, 2), LoRAConfig(r=1, alpha=4.0, variant="dora"))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([0.5, -0.5]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[0.5], [0.5]]))
        layer.lora_magnitude_vector.copy_(torch.tensor([6.0, 2.5]))
    y = layer(torch.tensor([[3.0, 1.0]]))
    # V = W + 4 B A = ((3, 0), (5, 2)), of norms 3 and √29; V x = (9, 17); m / ‖V‖ = 2, 2.5 / √29
    torch.testing.assert_close(y, torch.tensor([[18.5, 42.5 / math.sqrt(29) - 0.5]]))
    y.sum().backward()
    factors = torch.tensor([2, 2.5 / math.sqrt(29)])  # the norms are constants
    torch.testing.assert_close(layer.lora_magnitude_vector.grad, torch.tensor([3, 17 / 29**0.5]))
    torch.testing.assert_close(layer.lora_B.grad, (4 * 2 * factors)[:, None])  # A x = 2
    found = merge_lora(nn.Sequential(layer))[0].weight
    torch.testing.assert_close(found, factors[:, None] * torch.tensor([[3.0, 0.0], [5.0, 2.0]]))


def test_rslora_divides_by_the_root_of_r():
    """Kalajdzievski 2023: α/√r, so that a larger r does not shrink the path."""
    scales = [LoRAConfig(r=16, alpha=8.0, variant=v).scaling for v in ("plain", "rslora", "dora")]
    assert scales == [0.5, 2.0, 0.5]


def test_dropout_is_on_the_low_rank_path_alone_and_has_its_rate():
    """With W, A and B the identity, y - x is what dropout made of x."""
    layer = LoRALinear(nn.Linear(500, 500), LoRAConfig(r=500, alpha=500.0, dropout=0.3))
    with torch.no_grad():
        for matrix in (layer.weight, layer.lora_A, layer.lora_B):
            matrix.copy_(torch.eye(500))
        layer.bias.zero_()
        x = torch.ones(400, 500)
        y = layer(x)
        assert not torch.equal(layer(x), y)  # a new mask
        assert torch.equal(layer.eval()(x), 2 * x)
    dropped = y == 1  # the base path alone; never 0, which would be its own dropout
    deviation = math.sqrt(0.3 * 0.7 / y.numel())
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=5 * deviation)
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 1 + 1 / 0.7))


def composite(layer, x):
    """The same layer by autograd, as `peft` computes it."""
    dropped = layer.dropout(x)
    low_rank = layer.scaling * F.linear(F.linear(dropped, layer.lora_A), layer.lora_B)
    y = F.linear(x, layer.weight, layer.bias)
    if not isinstance(layer, DoRALinear):
        return y + low_rank
    weight = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A)
    factor = layer.lora_magnitude_vector / weight.norm(dim=1).detach()
    share, factor = (factor - 1).to(y.dtype), factor.to(y.dtype)
    return y + share * F.linear(dropped, layer.weight) + factor * low_rank


def values_and_gradients(function, layer, x, weights):
    """Output and gradients of x, A, B and magnitudes, with the same dropout on every call."""
    torch.manual_seed(9)
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    matrices = {name: p for name, p in layer.named_parameters() if name.startswith("lora_")}
    gradients = torch.autograd.grad(y, (leaf, *matrices.values()), weights.to(y.dtype))
    return dict(zip(("y", "x", *matrices), (y.detach(), *gradients), strict=True))


def layer_and_input(shape, with_dropout=False, kind=LoRALinear):
    """A layer of 24 -> 20 as it is amid training, an input (…, 24) and weights of the output.

    Of three dimensions, the tensors do not lie in memory in order.
    """
    config = LoRAConfig(r=3, alpha=6.0, dropout=0.4 if with_dropout else 0.0)
    layer = kind(nn.Linear(24, 20), config).train()
    nn.init.normal_(layer.lora_B, std=0.3)
    if kind is DoRALinear:
        layer.lora_magnitude_vector.data *= 1 + 0.3 * torch.rand(20)
    x, weights = torch.randn(*shape, 24), torch.randn(*shape, 20)
    if len(shape) == 3:
        x, weights = (t.movedim(-1, 0).contiguous().movedim(0, -1) for t in (x, weights))
    return layer, x, weights


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("of", ["float64", "float32", "float32 autocast", "bfloat16 autocast"])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_a_layer_equals_the_composite(shape, with_dropout, of, kind):
    """Also in double precision, from which it differs by bf16's rounding at most."""
    dtype, autocast = getattr(torch, of.split()[0]), "autocast" in of
    layer, x, weights = layer_and_input(shape, with_dropout, kind)
    layer, x = layer.to(torch.promote_types(dtype, torch.float32)), x.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = values_and_gradients(layer, layer, x, weights)
        right = values_and_gradients(lambda x: composite(layer, x), layer, x, weights)
    exact = copy.deepcopy(layer).double()
    truth = values_and_gradients(lambda x: composite(exact, x), exact, x.double(), weights)
    assert found["y"].dtype == (torch.bfloat16 if autocast else dtype)
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        rtol, atol = (0, 2**-6 * truth[name].abs().max()) if autocast else (1e-5, 1e-5)
        for other in (tensor.double(), truth[name]):
            torch.testing.assert_close(found[name].double(), other, rtol=rtol, atol=float(atol))


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_frozen_weights_cast_to_bf16_change_nothing_under_autocast(kind):
    """`cast_frozen_linears` casts W and b once instead of in every forward pass."""
    layer, x, weights = layer_and_input((2, 3), with_dropout=True, kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = values_and_gradients(layer, layer, x, weights)
        layer.weight.data, layer.bias.data = layer.weight.bfloat16(), layer.bias.bfloat16()
        found = values_and_gradients(layer, layer, x, weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


def test_twin_a_wrong_gradient_shows(monkeypatch):
    """Here the backward pass leaves the scaling out."""
    layer, x, weights = layer_and_input((5,))
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


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_gradients_can_be_asked_for_twice_and_of_frozen_inputs(kind):
    """Surgery goes back once per task; the first layers' input and the base weights are frozen."""
    layer, x, weights = layer_and_input((2, 3), kind=kind)
    right = values_and_gradients(layer, layer, x, weights)
    y = layer(x)
    for _ in range(2):
        layer.zero_grad()
        y.backward(weights, retain_graph=True)
        assert x.grad is layer.weight.grad is layer.bias.grad is None
        assert torch.equal(layer.lora_A.grad, right["lora_A"])
        assert torch.equal(layer.lora_B.grad, right["lora_B"])


# ---------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_at_the_start_output_and_base_parameters_are_the_plain_models(plain, variant):
    """The largest r that fits is 32 here."""
    before, parameters = output(plain), dict(plain.named_parameters())
    linears = [n for n, m in plain.encoder.named_modules() if isinstance(m, nn.Linear)]
    apply_lora(plain, replace(CONFIG, r=32, variant=variant))
    assert torch.equal(output(plain), before)
    after = dict(plain.named_parameters())
    assert all(after.pop(name) is parameter for name, parameter in parameters.items())
    assert set(after) == set(adapter_tensors(plain))
    assert list(adapter_layers(plain)) == [f"encoder.{name}" for name in linears]  # every target


@pytest.mark.parametrize("r", [0, -1, 33])
def test_fault_04_r_has_to_fit_the_layers(plain, r):
    with pytest.raises(ValueError, match=f"r is {r}; expected 1 to 32"):
        apply_lora(plain, replace(CONFIG, r=r))


def test_layers_select_encoder_layers_by_number(plain):
    """Of two; an unknown one is an error, for nothing would say that it was not adapted.

    The target `output` does not hit `attention.output` too, whose name ends alike.
    """
    apply_lora(plain, replace(CONFIG, targets=("output",), layers=(1,)))
    assert list(adapter_layers(plain)) == ["encoder.layer.1.output.dense"]
    with pytest.raises(ValueError, match="layers is 2; expected 0 to 1"):
        apply_lora(plain, replace(CONFIG, layers=(0, 2)))


def test_adapters_and_heads_alone_are_trained(adapted):
    model = MultitaskBERT(adapted, MultitaskConfig())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"bert.{name}" for name in adapter_tensors(adapted)}
    heads = {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    assert adapters and heads and set(trained) == adapters | heads


# ------------------------------------------------------------------------------ merging, saving


@pytest.mark.parametrize("adapted", [CONFIG, DORA], indirect=True)
def test_merged_equals_unmerged_and_is_a_plain_model(plain, adapted, tmp_path):
    before = output(adapted)
    assert (before - output(plain)).abs().max() > 1e-2  # the twin: an adapter left out shows
    merge_lora(adapted)
    torch.testing.assert_close(output(adapted), before, rtol=1e-4, atol=1e-5)
    assert not adapter_layers(adapted)
    assert list(adapted.state_dict()) == list(plain.state_dict())
    adapted.save_pretrained(tmp_path)
    found = output(BertModel.from_pretrained(tmp_path))
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(adapted, tmp_path):
    """A folder with a trained adapter."""
    save_adapter(adapted, tmp_path, CONFIG, "some/encoder")
    return tmp_path


@pytest.fixture
def fresh(plain):
    """A model to read the adapter into."""
    return apply_lora(plain, CONFIG)


def change(folder, **settings):
    """Change settings of a saved adapter; returns those that it had."""
    path = folder / "adapter_config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | settings))
    return before


def test_eval_save_load_eval_gives_the_same_numbers(adapted, fresh, tmp_path):
    """`eval()` of loralib merges: saved then and loaded again, the update would count twice."""
    expected = output(adapted)
    save_adapter(adapted.train().eval(), tmp_path, CONFIG, "some/encoder")
    load_adapter(fresh, tmp_path, CONFIG)
    assert torch.equal(output(fresh.train().eval()), expected)
    assert torch.equal(output(adapted), expected)


def test_an_adapter_of_some_layers_names_them(plain, tmp_path):
    config = replace(CONFIG, targets=("query", "key"), layers=(1,))
    save_adapter(apply_lora(plain, config), tmp_path, config, "some/encoder", "main")
    settings = change(tmp_path)
    assert settings["layers_to_transform"] == [1]
    assert settings["target_modules"] == target_names(plain, ("query", "key"), (1,))
    assert settings["base_model_name_or_path"] == "some/encoder" and settings["revision"] == "main"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, "r is 4, expected 3"),
        ({"lora_alpha": 7}, "lora_alpha is 7, expected 6.0"),
        ({"target_modules": ["key", "pooler.dense"]}, "other layers have adapters"),
        ({"use_rslora": True}, "use_rslora is True, expected False"),
        ({"use_dora": True, "r": 2}, "r is 2, expected 3; use_dora is True"),
        ({"lora_alpha": "much"}, "lora_alpha is much, expected 6.0"),
        ({"target_modules": None}, "other layers have adapters"),
    ],
)
def test_fault_28_another_adapter_is_refused(saved, fresh, settings, message):
    """With another alpha, say, every number would be off, with nothing else to show for it."""
    change(saved, **settings)
    with pytest.raises(UserError, match=re.escape(f"adapter_config.json: {message}")):
        load_adapter(fresh, saved, CONFIG)


@pytest.mark.parametrize("fault", ["missing encoder", "unexpected classifier", "expected (3, 32)"])
def test_fault_29_a_wrong_tensor_is_refused_and_nothing_is_copied(saved, fresh, fault):
    path = saved / "adapter_model.safetensors"
    tensors = read_tensors(path)
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    tensor = tensors.pop(name)
    wrong = {
        "missing encoder": {},
        "unexpected classifier": {name: tensor, "base_model.model.classifier.weight": tensor + 1},
        "expected (3, 32)": {name: tensor[:, :-1]},
    }
    write_tensors(path, tensors | wrong[fault])
    before = copy.deepcopy(adapter_tensors(fresh))
    with pytest.raises(UserError, match=f"{path}: does not fit: .*{re.escape(fault)}"):
        load_adapter(fresh, saved, CONFIG)
    assert all(torch.equal(t, before[n]) for n, t in adapter_tensors(fresh).items())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", None])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_fault_30_damaged_files_and_pickles_are_refused(saved, fresh, name, content):
    """The code of a pickle, which would create a file, never runs."""
    canary = saved / "canary"
    pickled = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    (saved / name).write_bytes(pickled if content is None else content)
    with pytest.raises(UserError, match=f"{name}: not a"):
        load_adapter(fresh, saved, CONFIG)
    assert not canary.exists()
    pickle.loads(pickled)  # the twin
    assert canary.exists()
