"""Configurations: what they refuse, what they read, and the table of tasks."""

import json
from dataclasses import replace

import numpy as np
import pytest

from config import (
    LEARNING_RATES,
    LORA_TARGETS,
    MODES,
    TASKS,
    BertConfig,
    LoRAConfig,
    MultitaskConfig,
    UserError,
)

# ---------------------------------------------------------------------------------- the encoder


def test_the_defaults_are_those_of_bert_base_uncased():
    config = BertConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (30522, 768, 12)
    assert (config.num_attention_heads, config.intermediate_size) == (12, 3072)
    assert (config.layer_norm_eps, config.max_position_embeddings) == (1e-12, 512)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("model_type", "roberta"),
    ],
)
def test_an_encoder_that_would_compute_other_numbers_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        BertConfig(**{name: value})
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


@pytest.mark.parametrize("text", NOT_CONFIGURATIONS)
def test_a_damaged_or_missing_file_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        BertConfig.from_file(path)


# ---------------------------------------------------------------------------- LoRA, tasks, heads


def test_lora_scaling_is_alpha_over_r():
    assert LoRAConfig(r=32, alpha=16).scaling == 0.5
    assert LoRAConfig(r=4, alpha=16).scaling == 4.0
    assert LoRAConfig().targets == tuple(LORA_TARGETS)  # all six kinds by default


def test_every_mode_has_learning_rates():
    assert set(LEARNING_RATES) == set(MODES) == {"last-linear-layer", "full-model", "LoRA", "PAL"}
    assert LEARNING_RATES["last-linear-layer"][0] == 0.0  # its encoder is frozen


@pytest.mark.parametrize(
    ("name", "is_pair", "metric", "files"),
    [
        ("sst", False, "accuracy", "ids-sst-{}.csv"),
        ("para", True, "accuracy", "quora-{}.csv"),
        ("sts", True, "pearson", "sts-{}.csv"),
        ("cfimdb", False, "accuracy", "ids-cfimdb-{}.csv"),
    ],
)
def test_the_tasks(name, is_pair, metric, files):
    task = TASKS[name]
    assert (task.name, task.is_pair, task.metric) == (name, is_pair, metric)
    assert task.file_name("train") == files.format("train")
    assert task.file_name("test") == files.format("test-student")
    assert task.default == (name != "cfimdb")  # the leaderboard has three tasks


def test_predictions_print_as_the_course_prints_them():
    """A class as an integer, a binary label as `1.0`, a score with every digit it has."""
    assert TASKS["sst"].format(np.int64(3)) == "3"
    assert TASKS["para"].format(np.float32(1)) == "1.0"
    assert TASKS["para"].format(np.float32(0)) == "0.0"
    assert TASKS["sts"].format(np.float32(3.25)) == "3.25"
    assert float(TASKS["sts"].format(np.float32(1) / 3)) == pytest.approx(1 / 3, rel=1e-7)


def test_a_task_has_its_default_head_and_a_joint_pair_the_linear_one():
    config = MultitaskConfig(tasks=("sst", "para", "sts"), heads={"para": "dot"}, joint=("sts",))
    assert [config.head(name) for name in config.tasks] == ["ffn", "dot", "linear"]
    assert replace(config, joint=("para",)).head("para") == "linear"


def test_the_roles_of_a_tasks_sequences():
    config = MultitaskConfig(joint=("sts",), both=("para",))
    assert config.roles("sst") == ("first",)
    assert config.roles("para") == ("pair", "first", "second")
    assert config.roles("sts") == ("pair",)
    assert MultitaskConfig().roles("para") == ("first", "second")


def test_either_contrastive_loss_uses_simcse():
    assert not MultitaskConfig().uses_simcse
    assert MultitaskConfig(simcse_tasks=("sst",)).uses_simcse
    assert MultitaskConfig(supervised_simcse=True).uses_simcse
