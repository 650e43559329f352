"""Low-rank adaptation of linear layers (Hu et al. 2021), and DoRA (Liu et al. 2024).

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
        source = x if dropped is None else dropped
        down = source @ lora_A.T  # (…, r)
        y = F.linear(x, weight, bias)
        y.view(-1, y.size(-1)).addmm_(down.view(-1, down.size(-1)), lora_B.T, alpha=scaling)
        ctx.save_for_backward(source, down, weight, lora_A, lora_B)
        ctx.scaling, ctx.is_dropped = scaling, dropped is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of the arguments of `forward`, in their order; None for those without one."""
        source, down, weight, lora_A, lora_B = ctx.saved_tensors
        source, down, flat = (t.reshape(-1, t.size(-1)) for t in (source, down, grad))
        up = ctx.scaling * (flat @ lora_B)  # (…, r)
        grad_x = flat @ weight if ctx.needs_input_grad[0] else None
        grad_dropped = up @ lora_A if ctx.is_dropped else None
        if grad_x is not None and not ctx.is_dropped:
            grad_x.addmm_(up, lora_A)
        shape = (*grad.shape[:-1], weight.size(1))
        grad_inputs = (None if g is None else g.view(shape) for g in (grad_x, grad_dropped))
        return *grad_inputs, None, None, up.T @ source, ctx.scaling * (flat.T @ down), None


class LoRALinear(nn.Linear):
    """y = W x + b + scaling · B A dropout(x), with W and b frozen (Hu et al. 2021, §4.1).

    `lora_A` (r, in_features) starts Kaiming uniform, as in the authors' code, and `lora_B`
    (out_features, r) at zero, so the output at the start is the plain layer's. Weight and bias are
    shared with `linear`.
    """

    def __init__(self, linear, config):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw a new weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling, self.dropout = config.scaling, nn.Dropout(config.dropout)
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
            return self.output(inputs)

    def output(self, inputs):
        """The arguments of `LowRankLinear.forward` up to the scaling, of one dtype -> y."""
        return LowRankLinear.apply(*inputs, self.scaling)

    @torch.no_grad()
    def updated_weight(self, weight):
        """W + scaling · B A (out_features, in_features) in fp32 or a larger dtype."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(dtype) + (self.scaling * (self.lora_B @ self.lora_A)).to(dtype)

    def merged_weight(self):
        """The weight with which a plain linear layer computes the same, without dropout."""
        return self.updated_weight(self.weight)


class DoRALinear(LoRALinear):
    """y = m / ‖V‖ · V x + b with V = W + scaling · B A, by rows (Liu et al. 2024, eq. 5).

    `lora_magnitude_vector` m (out_features,) starts as the norms of W's rows, so the output at the
    start is the plain layer's. The norms count as constants in the backward pass (§4.3). With
    dropout, the authors' code and `peft` compute W x + b + (m / ‖V‖ - 1) W dropout(x) +
    m / ‖V‖ · scaling · B A dropout(x); so does this one.
    """

    def __init__(self, linear, config):
        super().__init__(linear, config)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms(self.weight))

    def row_norms(self, weight):
        """The norms of V's rows (out_features,), with `weight` as W."""
        return torch.linalg.vector_norm(self.updated_weight(weight), dim=1)

    def output(self, inputs):
        """LoRA's output plus (m / ‖V‖ - 1) · V x, since bf16 would round off small steps of m."""
        _, dropped, weight, bias, lora_A, lora_B = inputs
        y = super().output(inputs)
        if dropped is not None:
            product = LowRankLinear.apply(dropped, None, weight, None, lora_A, lora_B, self.scaling)
        else:
            product = y - bias.detach()
        excess = self.lora_magnitude_vector / self.row_norms(weight) - 1
        return torch.addcmul(y, excess.to(y.dtype), product)

    @torch.no_grad()
    def merged_weight(self):
        """The weight with which a plain linear layer computes the same, without dropout."""
        weight = self.updated_weight(self.weight)
        return (self.lora_magnitude_vector / self.row_norms(self.weight))[:, None] * weight


def adapter_layers(model):
    """The LoRA layers of `model` by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def target_names(model, targets, layers=None):
    """Full names of the linear layers that `targets` (keys of `LORA_TARGETS`) select.

    `layers`: in the encoder layers of these numbers only.
    """
    numbers = range(model.config.num_hidden_layers) if layers is None else layers
    kinds = [name for target, name in LORA_TARGETS.items() if target in targets]
    return [f"encoder.layer.{number}.{name}" for number in numbers for name in kinds]


def apply_lora(model, config):
    """Freeze `model` and replace its targeted linear layers by LoRA layers, in place.

    Returns the model. Raises `ValueError` where r exceeds a targeted layer's smaller side, and for
    layers that the model does not have.
    """
    model.requires_grad_(False)
    last = model.config.num_hidden_layers - 1
    if config.layers and max(config.layers) > last:
        raise ValueError(f"layers is {max(config.layers)}; expected 0 to {last} in this encoder")
    kind = DoRALinear if config.variant == "dora" else LoRALinear
    for name in target_names(model, config.targets, config.layers):
        linear = model.get_submodule(name)
        limit = min(linear.in_features, linear.out_features)
        if not 1 <= config.r <= limit:
            raise ValueError(f"r is {config.r}; expected 1 to {limit}, the smaller side of {name}")
        model.set_submodule(name, kind(linear, config))
    return model


@torch.no_grad()
def merge_lora(model):
    """Put plain linear layers with the merged weights back, in place; returns the model."""
    for name, layer in adapter_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        weight = layer.merged_weight().to(layer.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear)
    return model


def adapter_tensors(model):
    """The adapters' matrices, and DoRA's magnitudes, by module and parameter name."""
    return {
        f"{name}.{key}": parameter
        for name, layer in adapter_layers(model).items()
        for key, parameter in layer.named_parameters()
        if key.startswith("lora_")
    }


PEFT_PREFIX = "base_model.model."
# fmt: off
PEFT_SETTINGS = {  # of every adapter
    "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "bias": "none", "inference_mode": True,
    "fan_in_fan_out": False, "init_lora_weights": True,
}
# fmt: on


def adapter_settings(model, config):
    """The settings, under `peft`'s names, that change what the same matrices compute."""
    return {
        "r": config.r,
        "lora_alpha": config.alpha,
        "use_rslora": config.variant == "rslora",
        "use_dora": config.variant == "dora",
        "target_modules": target_names(model, config.targets, config.layers),
    }


def save_adapter(model, folder, config, base_model, revision=None):
    """Write `adapter_config.json` and `adapter_model.safetensors` as `peft` reads them."""
    settings = PEFT_SETTINGS | adapter_settings(model, config)
    settings |= {
        "base_model_name_or_path": base_model,
        "revision": revision,
        "lora_dropout": config.dropout,
    }
    if config.layers:  # `peft` has no need of it, since the names above are whole; readers do
        settings["layers_to_transform"] = list(config.layers)
    text = json.dumps(settings, indent=2) + "\n"
    (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors = {
        f"{PEFT_PREFIX}{name}" + ("" if name.endswith("magnitude_vector") else ".weight"): tensor
        for name, tensor in adapter_tensors(model).items()
    }
    write_tensors(Path(folder) / "adapter_model.safetensors", tensors)


def load_adapter(model, folder, config):
    """Read what `save_adapter` wrote into a model that has the same LoRA layers.

    Raises `UserError` where r, alpha, the variant or the layers differ from `config`, or a tensor
    is missing, unexpected or of another shape.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = adapter_settings(model, config)
        others = found["target_modules"] != wanted.pop("target_modules")
        problems = [f"{n} is {found[n]}, expected {v}" for n, v in wanted.items() if found[n] != v]
        problems += ["other layers have adapters"] if others else []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not an adapter's configuration: {error!r}") from error
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    path = path.with_name("adapter_model.safetensors")
    load_strictly(adapter_tensors(model), read_adapter_tensors(path), path)


def read_adapter_tensors(path):
    """The tensors of an `adapter_model.safetensors`, as `adapter_tensors` names them."""
    tensors = read_tensors(path)
    return {n.removeprefix(PEFT_PREFIX).removesuffix(".weight"): t for n, t in tensors.items()}
