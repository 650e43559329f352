"""Configurations: what an encoder's file may say, and how a score is printed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from config import TASKS, BertConfig, UserError


def test_the_defaults_are_those_of_bert_base_uncased():
    config = BertConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (30522, 768, 12)
    assert (config.num_attention_heads, config.intermediate_size) == (12, 3072)
    assert (config.layer_norm_eps, config.max_position_embeddings) == (1e-12, 512)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_act", "gelu_new"), ("position_embedding_type", "relative_key")]
)
def test_an_encoder_that_would_compute_other_numbers_is_refused(tmp_path, name, value):
    """So is another architecture: test_hub.py."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=f"{path}.*{name} is '{value}'"):
        BertConfig.from_file(path)


def test_a_written_configuration_reads_back(tmp_path, tiny_config):
    """It names the architecture for other tools; keys that are not used here are ignored."""
    path = tmp_path / "config.json"
    assert tiny_config.to_dict()["architectures"] == ["BertModel"]
    path.write_text(json.dumps(tiny_config.to_dict() | {"use_cache": True, "ONLY": {}}))
    assert BertConfig.from_file(path) == tiny_config
    path.write_text('{"hidden_size": 24}')
    assert BertConfig.from_file(path) == replace(BertConfig(), hidden_size=24)


NOT_CONFIGURATIONS = ["", "{", "[]", "3", "null", '{"hidden_size": null}', '{"hidden_size": "big"}']
NOT_CONFIGURATIONS += ['{"num_attention_heads": 0}', '{"num_attention_heads": -12}']
NOT_CONFIGURATIONS += ['{"num_hidden_layers": 2.5}', '{"intermediate_size": "3072"}', None]
NOT_CONFIGURATIONS += ['{"hidden_size": 33}']  # row 27: no multiple of the 12 heads


@pytest.mark.parametrize("text", NOT_CONFIGURATIONS)
def test_a_damaged_or_missing_file_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        BertConfig.from_file(path)


def test_a_score_is_printed_with_every_digit_it_has():
    assert float(TASKS["sts"].format(np.float32(1) / 3)) == pytest.approx(1 / 3, rel=1e-7)
