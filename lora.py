"""Low-rank adaptation of linear layers (Hu et al. 2021).

`apply_lora(model.bert, LoRAConfig(r=32))` replaces linear layers of a finished model, after its
weights are loaded. The encoder's own code does not know about LoRA.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from base_bert import load_strictly, read_tensors, write_tensors
from config import LORA_TARGETS, UserError


class LowRankLinear(torch.autograd.Function):
    """x W^T + b + scaling · x A^T B^T with W and b frozen, and its gradients by hand.

    Autograd would add the two paths in separate passes over large tensors, which costs a fifth of a
    training step. The low-rank path takes `dropped` in place of x, unless it is None.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, lora_A, lora_B, scaling):
        """x and `dropped` (…, in), weight (out, in), bias (out,) or None -> (…, out)."""
        low = x if dropped is None else dropped
        down = low @ lora_A.T  # (…, r)
        y = F.linear(x, weight, bias)
        y.view(-1, y.size(-1)).addmm_(down.view(-1, down.size(-1)), lora_B.T, alpha=scaling)
        ctx.save_for_backward(low, down, weight, lora_A, lora_B)
        ctx.scaling, ctx.is_dropped = scaling, dropped is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of the arguments of `forward`, in their order; None for those without one."""
        low, down, weight, lora_A, lora_B = ctx.saved_tensors
        low, down, flat = (t.reshape(-1, t.size(-1)) for t in (low, down, grad))
        up = ctx.scaling * (flat @ lora_B)  # (…, r)
        grad_x = flat @ weight if ctx.needs_input_grad[0] else None
        grad_dropped = up @ lora_A if ctx.is_dropped else None
        if grad_x is not None and not ctx.is_dropped:
            grad_x.addmm_(up, lora_A)
        of_inputs = (
            g if g is None else g.view(*grad.shape[:-1], g.size(-1)) for g in (grad_x, grad_dropped)
        )
        return *of_inputs, None, None, up.T @ low, ctx.scaling * (flat.T @ down), None


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A dropout(x), with W and b frozen (Hu et al. 2021, §4.1).

    `lora_A` (r, in_features) starts Kaiming uniform and `lora_B` (out_features, r) starts at zero,
    so the output at the start is the plain layer's. Weight and bias are shared with `linear`.
    """

    def __init__(self, linear, config):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw a new weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling, self.r, self.dropout = config.scaling, config.r, nn.Dropout(config.dropout)
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        """(…, in_features) -> (…, out_features)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        matrices = (self.weight, self.bias, self.lora_A, self.lora_B)
        dropped = self.dropout(x) if self.dropout.p and self.training else None
        inputs = [None if t is None else t.to(dtype) for t in (x, dropped, *matrices)]
        with torch.autocast(device, enabled=False):
            return LowRankLinear.apply(*inputs, self.scaling)


def adapter_layers(model):
    """The LoRA layers of `model` by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def target_names(model, targets):
    """Full names of the linear layers that `targets` (keys of `LORA_TARGETS`) select."""
    in_layer = [LORA_TARGETS[target] for target in targets]  # as in encoder.layer.<i>.output.dense
    return [name for name, _ in model.named_modules() if name.split(".", 3)[-1] in in_layer]


def apply_lora(model, config):
    """Freeze `model` and replace its targeted linear layers by LoRA layers, in place.

    Returns the model. Raises `ValueError` where r exceeds a targeted layer's smaller side.
    """
    model.requires_grad_(False)
    for name in target_names(model, config.targets):
        linear = model.get_submodule(name)
        limit = min(linear.in_features, linear.out_features)
        if not 1 <= config.r <= limit:
            raise ValueError(f"r is {config.r}; expected 1 to {limit}, the smaller side of {name}")
        model.set_submodule(name, LoRALinear(linear, config))
    return model


@torch.no_grad()
def merge_lora(model):
    """Add each low-rank path to its weight and put plain linear layers back; returns the model."""
    for name, layer in adapter_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        update = layer.scaling * (layer.lora_B @ layer.lora_A)
        weight = layer.weight.float() + update.float()
        linear.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear)
    return model


def adapter_tensors(model):
    """The adapters' matrices by module and parameter name."""
    return {
        f"{name}.{matrix}": getattr(layer, matrix)
        for name, layer in adapter_layers(model).items()
        for matrix in ("lora_A", "lora_B")
    }


PEFT_PREFIX = "base_model.model."
# fmt: off
PEFT_SETTINGS = {  # of every adapter
    "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "bias": "none", "inference_mode": True,
    "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
}
UNSUPPORTED = (  # settings that change what the same matrices compute
    "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "alora_invocation_tokens",
)
# fmt: on


def save_adapter(model, folder, config, base_model, revision=None):
    """Write `adapter_config.json` and `adapter_model.safetensors` as `peft` reads them."""
    settings = PEFT_SETTINGS | {
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": target_names(model, config.targets),
    }
    text = json.dumps(settings, indent=2) + "\n"
    (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors = {f"{PEFT_PREFIX}{name}.weight": t for name, t in adapter_tensors(model).items()}
    write_tensors(Path(folder) / "adapter_model.safetensors", tensors)


def selected_targets(model, patterns):
    """The layers that `target_modules` of an adapter's file selects, as keys of `LORA_TARGETS`.

    `patterns` are full names or ends of names: `peft` itself shortens a long list to such ends.
    Layers outside the keys, or of a key that is selected in part only, appear by full name.
    """
    selected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{p}") for p in patterns)
    }
    layers = {target: set(target_names(model, (target,))) for target in LORA_TARGETS}
    whole = [target for target, names in layers.items() if names <= selected]
    return sorted([*whole, *selected.difference(*(layers[target] for target in whole))])


def load_adapter(model, folder, config):
    """Read an adapter written by `save_adapter` or `peft` into a model that has LoRA layers.

    Raises `UserError` where r, alpha or the targets differ from `config`, the file asks for another
    kind of low-rank path, or a tensor is missing, unexpected or of another shape.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        found = {name: settings.get(name) or None for name in ("r", *UNSUPPORTED)}
        found["alpha"] = float(settings["lora_alpha"])
        found["target_modules"] = selected_targets(model, settings["target_modules"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an adapter's configuration: {error!r}") from error
    wanted = {"r": config.r, "alpha": float(config.alpha)}
    wanted["target_modules"] = sorted(set(config.targets))
    problems = [
        f"{name} is {value}, expected {wanted.get(name)}"
        for name, value in found.items()
        if value != wanted.get(name)
    ]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    path = path.with_name("adapter_model.safetensors")
    tensors = {
        name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
        for name, tensor in read_tensors(path).items()
    }
    load_strictly(adapter_tensors(model), tensors, path)
