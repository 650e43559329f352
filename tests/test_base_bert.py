"""Weights in and out: names of published files, strict loading, saving."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from base_bert import load_encoder, read_tensors, write_tensors
from bert import BertModel
from config import UserError
from runtime.hub import resolve_encoder

IDS = torch.tensor([[2, 9, 14, 22, 3], [2, 30, 11, 3, 0]])
MASK = (IDS != 0).long()


def change_tensors(folder, change):
    """Rewrite the weights of a folder after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_saving_and_loading_changes_no_output(tiny_config, tiny_folder):
    torch.manual_seed(2)
    expected = BertModel(tiny_config).eval()(IDS, MASK)
    model = BertModel.from_pretrained(str(tiny_folder))
    assert (model.config, model.training) == (tiny_config, False)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, tensor in model(IDS, MASK).items():
        assert torch.equal(tensor, expected[name])


def test_a_model_knows_the_encoder_it_was_loaded_from(tiny_config, tiny_folder):
    """A saved LoRA adapter names it. A folder is never looked up on the hub."""
    encoder = resolve_encoder(str(tiny_folder))
    assert BertModel.from_pretrained(encoder).origin is encoder
    assert BertModel.from_pretrained(tiny_folder).origin == encoder
    assert BertModel(tiny_config).origin is None
    with pytest.raises(UserError, match="not an encoder's folder"):
        BertModel.from_pretrained("bert-base-uncased")


def test_weights_in_another_precision_load_as_fp32(tiny_folder):
    expected = load_file(tiny_folder / "model.safetensors")
    change_tensors(tiny_folder, lambda t: t.update({name: t[name].half() for name in t}))
    for name, tensor in BertModel.from_pretrained(tiny_folder).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float())


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_published_names_of_every_age_are_accepted(tiny_folder, prefix):
    """`bert-base-uncased` itself has the prefix, gamma and beta, and the pre-training heads."""
    expected = BertModel.from_pretrained(tiny_folder)(IDS, MASK)["pooler_output"]

    def age(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[prefix + old] = tensors.pop(name)
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(40)[None]
        tensors["cls.predictions.bias"] = torch.zeros(7)
        tensors["cls.seq_relationship.weight"] = torch.zeros(2, 32)

    change_tensors(tiny_folder, age)
    assert torch.equal(BertModel.from_pretrained(tiny_folder)(IDS, MASK)["pooler_output"], expected)


def test_row_51_what_is_not_used_is_left_out_and_named(tiny_folder, capsys):
    """No pooler, other heads and the prefix of `DataParallel`, all in one file."""
    expected = BertModel.from_pretrained(tiny_folder)(IDS, MASK)["last_hidden_state"]

    def change(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if not name.startswith("pooler."):
                tensors[f"module.bert.{name}"] = tensor
        tensors["module.classifier.weight"] = torch.zeros(2, 32)
        tensors["module.classifier.bias"] = torch.zeros(2)
        tensors["cls.predictions.bias"] = torch.zeros(7)

    capsys.readouterr()
    change_tensors(tiny_folder, change)
    outputs = BertModel.from_pretrained(tiny_folder)(IDS, MASK)
    assert torch.equal(outputs["last_hidden_state"], expected)
    assert not outputs["pooler_output"].any()
    assert capsys.readouterr().out == (
        f"{tiny_folder / 'model.safetensors'}: classifier (2 tensors) left out, cls (1 "
        "tensors) left out, no pooler (its output will be 0)\n"
    )


LAYER = "encoder.layer.{}.output.dense.bias"  # of an encoder with the layers 0 and 1


@pytest.mark.parametrize(
    ("message", "name", "replacement"),
    [
        (f"missing {LAYER.format(1)}", LAYER.format(1), None),
        ("missing pooler.dense.weight", "pooler.dense.weight", None),  # of a pooler with a bias
        (f"unexpected {LAYER.format(2)}", LAYER.format(2), torch.zeros(32)),
        ("pooler.dense.bias is (33,), expected (32,)", "pooler.dense.bias", torch.zeros(33)),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(
    tiny_folder, message, name, replacement
):
    def change(tensors):
        tensors.pop(name, None)
        if replacement is not None:
            tensors[name] = replacement

    change_tensors(tiny_folder, change)
    with pytest.raises(UserError, match=re.escape(message)):
        BertModel.from_pretrained(tiny_folder)


def test_of_many_problems_four_are_named(tiny_folder):
    change_tensors(tiny_folder, dict.clear)
    with pytest.raises(UserError, match=r"does not fit: (missing \S+;? ){4}and \d+ more$"):
        BertModel.from_pretrained(tiny_folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_weights_are_an_error(tiny_folder, keep):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path}: not a complete safetensors file"):
        BertModel.from_pretrained(tiny_folder)


def test_written_tensors_are_readable_by_everyone_who_may_read_the_folder(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2, 3).T}, {"step": "3"})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["a"], torch.ones(3, 2))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_tokenizers_limit_is_at_most_the_number_of_positions(tiny_folder):
    settings = {"do_lower_case": True, "model_max_length": 512}
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_encoder(str(tiny_folder))[1].model_max_length == 40
