"""Projected attention layers, one set for each task (Stickland & Murray 2019).

`model.pals = apply_pals(model.bert, PALConfig(), tasks)` rewrites a finished model, after its
weights are loaded. The encoder's own code does not know about PALs.
"""

from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from bert import BertLayer, BertSelfAttention


class PAL(nn.Module):
    """TS(h) = V^D g(V^E h), what a task adds to each encoder layer; g is the layer's own.

    V^E (hidden -> size) and V^D (size -> hidden) serve all layers; g is multi-head self-attention
    without an output matrix. As in the authors' code, GELU follows V^D, and weights are normal
    with standard deviation 0.02. Unlike there, V^D starts at zero, so that the model starts as the
    plain encoder.
    """

    def __init__(self, bert, config):
        super().__init__()
        hidden, layers = bert.config.hidden_size, bert.encoder["layer"]
        size = config.size_for(hidden)
        narrow = replace(
            bert.config,
            hidden_size=size,
            num_attention_heads=config.heads,
            attention_probs_dropout_prob=layers[0].attention["self"].dropout.p,
        )
        self.V_E, self.V_D = nn.Linear(hidden, size), nn.Linear(size, hidden)
        self.attention = nn.ModuleList(BertSelfAttention(narrow) for _ in layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 or name == "V_D.weight":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden_states, rows, layer):
        """(N, hidden) -> (N, hidden), the tokens of a list of `Rows` in layer number `layer`."""
        return F.gelu(self.V_D(self.attention[layer](self.V_E(hidden_states), rows)))


class PALLayer(BertLayer):
    """A `BertLayer` with LN(FFN(a) + a + TS_t(h)) as output, where a = LN(h + SA(h)).

    It takes over the modules of `layer`. The PALs are no submodules of it: they belong to
    `MultitaskBERT.pals`, which is trained and saved with the heads.
    """

    def __init__(self, layer, number, pals):
        nn.Module.__init__(self)  # not BertLayer's: it would draw new weights
        self.attention, self.intermediate = layer.attention, layer.intermediate
        self.output, self.number = layer.output, number
        self.pals = dict(pals.items())  # a plain dict, in which PyTorch sees no modules

    def forward(self, hidden_states, rows):
        """(N, D) -> (N, D). Each of `rows` belongs to a group: the name of its task."""
        context = self.attention["self"](hidden_states, rows)
        attended = self.attention["output"](context, hidden_states)
        inner = F.gelu(self.intermediate["dense"](attended))
        return self.output(inner, attended + self.projected(hidden_states, rows))

    def projected(self, hidden_states, rows):
        """TS_t(h), (N, D) -> (N, D): the rows of each task by its own PAL."""
        groups = [(task, list(part)) for task, part in groupby(rows, lambda r: r.group)]
        sizes = [sum(r.input_ids.numel() for r in part) for _, part in groups]
        parts = zip(groups, hidden_states.split(sizes), strict=True)
        return torch.cat([self.pals[task](x, part, self.number) for (task, part), x in parts])


def apply_pals(bert, config, tasks):
    """Give every layer of an encoder a PAL of each task, in place; `config` is a `PALConfig`.

    Returns the PALs, an `nn.ModuleDict` by task, for the model to hold beside the encoder.
    """
    pals, layers = nn.ModuleDict({task: PAL(bert, config) for task in tasks}), bert.encoder["layer"]
    for number, layer in enumerate(layers):
        layers[number] = PALLayer(layer, number, pals)
    return pals


def train_layer_norms_only(bert):
    """Freeze an encoder but for its LayerNorms, which mode PAL trains beside the PALs."""
    for name, parameter in bert.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
