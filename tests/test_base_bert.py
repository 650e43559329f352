"""Weights in and out: names of published files, strict loading, saving."""

import json
import os

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
    """A loaded model knows its encoder, which a LoRA adapter names."""
    torch.manual_seed(2)
    expected = BertModel(tiny_config).eval()(IDS, MASK)
    encoder = resolve_encoder(str(tiny_folder))
    for source in (str(tiny_folder), encoder):
        model = BertModel.from_pretrained(source)
        assert (model.config, model.training, model.origin) == (tiny_config, False, encoder)
        for name, tensor in model(IDS, MASK).items():
            assert torch.equal(tensor, expected[name])


def test_a_folder_is_never_looked_up_on_the_hub():
    with pytest.raises(UserError, match="not an encoder's folder"):
        BertModel.from_pretrained("bert-base-uncased")


def test_weights_in_another_precision_load_as_fp32(tiny_folder):
    expected = load_file(tiny_folder / "model.safetensors")
    change_tensors(tiny_folder, lambda t: t.update({name: t[name].half() for name in t}))
    for name, tensor in BertModel.from_pretrained(tiny_folder).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float())


def test_row_51_what_is_not_used_is_left_out_and_named(tiny_folder, capsys):
    """No pooler, other heads, the prefix of `DataParallel` and old names, all in one file."""
    expected = BertModel.from_pretrained(tiny_folder)(IDS, MASK)["last_hidden_state"]

    def change(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            if not name.startswith("pooler."):
                tensors[f"module.bert.{old}"] = tensor
        tensors["module.bert.embeddings.position_ids"] = torch.arange(40)[None]
        tensors["module.classifier.weight"] = torch.zeros(2, 32)
        tensors["module.classifier.bias"] = torch.zeros(2)
        tensors["cls.predictions.bias"] = torch.zeros(7)

    capsys.readouterr()
    change_tensors(tiny_folder, change)
    outputs = BertModel.from_pretrained(tiny_folder)(IDS, MASK)
    assert torch.equal(outputs["last_hidden_state"], expected)
    assert not outputs["pooler_output"].any()
    assert capsys.readouterr().out == (
        f"{tiny_folder / 'model.safetensors'}: classifier (2 tensors) outside the encoder, "
        "cls (1 tensors) outside the encoder, no pooler (its output will be 0)\n"
    )


BIAS = "encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(BIAS), f"missing {BIAS}"),
        (lambda t: t.pop("pooler.dense.weight"), "missing pooler.dense.weight"),
        (lambda t: t.update({"pooler.x": torch.zeros(3)}), "unexpected pooler.x"),
        (lambda t: t.update({BIAS: torch.zeros(9)}), rf"{BIAS} is \(9,\), expected \(32,\)"),
        (dict.clear, r"(missing \S+;? ){4}and \d+ more"),
    ],
)
def test_tensors_that_do_not_fit_are_named_four_at_most(tiny_folder, change, message):
    change_tensors(tiny_folder, change)
    with pytest.raises(UserError, match=f"does not fit: {message}$"):
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
