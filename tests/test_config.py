"""Configurations: what they refuse, what they read, and the rows of the task table."""

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

# ------------------------------------------------------------------------------- the encoder's


def test_defaults_are_those_of_bert_base_uncased():
    config = BertConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (30522, 768, 12)
    assert (config.num_attention_heads, config.intermediate_size) == (12, 3072)
    assert (config.layer_norm_eps, config.max_position_embeddings) == (1e-12, 512)


def test_hidden_size_must_divide_among_the_heads():
    with pytest.raises(ValueError, match="10 is not divisible by num_attention_heads 3"):
        BertConfig(hidden_size=10, num_attention_heads=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("model_type", "roberta"),
    ],
)
def test_what_the_encoder_would_compute_otherwise_is_refused(tmp_path, name, value):
    """Another activation or architecture would load and give other numbers in silence."""
    with pytest.raises(ValueError, match=name):
        BertConfig(**{name: value})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=f"{path}.*{name} is '{value}'"):
        BertConfig.from_file(path)


def test_a_written_configuration_reads_back_and_names_its_architecture(tmp_path, tiny_config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config.to_dict()))
    assert BertConfig.from_file(path) == tiny_config
    assert tiny_config.to_dict()["architectures"] == ["BertModel"]


def test_keys_of_no_use_are_left_aside(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 24, "use_cache": True, "ONLY": {}, "id2label": {}}))
    assert BertConfig.from_file(path) == replace(BertConfig(), hidden_size=24)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"hidden_size": null}',
        '{"hidden_size": "wide"}',
        '{"num_attention_heads": 0}',
        '{"num_attention_heads": -12}',
        '{"num_hidden_layers": 2.5}',
        '{"intermediate_size": "3072"}',
    ],
)
def test_a_damaged_file_is_the_users_mistake_and_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        BertConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        BertConfig.from_file(tmp_path / "config.json")


# ------------------------------------------------------------------- LoRA, tasks, what is on top


def test_lora_scaling_is_alpha_over_r():
    assert LoRAConfig(r=32, alpha=16).scaling == 0.5
    assert LoRAConfig(r=4, alpha=16).scaling == 4.0
    assert LoRAConfig().targets == tuple(LORA_TARGETS)  # all six kinds by default


def test_every_mode_has_learning_rates():
    assert set(LEARNING_RATES) == set(MODES) == {"last-linear-layer", "full-model", "LoRA"}
    assert LEARNING_RATES["last-linear-layer"][0] == 0.0  # its encoder is frozen


def test_the_three_leaderboard_tasks_are_the_default_ones():
    assert [name for name, task in TASKS.items() if task.default] == ["sst", "para", "sts"]
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize(
    ("name", "is_pair", "metric", "train", "test"),
    [
        ("sst", False, "accuracy", "ids-sst-train.csv", "ids-sst-test-student.csv"),
        ("para", True, "accuracy", "quora-train.csv", "quora-test-student.csv"),
        ("sts", True, "pearson", "sts-train.csv", "sts-test-student.csv"),
        ("cfimdb", False, "accuracy", "ids-cfimdb-train.csv", "ids-cfimdb-test-student.csv"),
    ],
)
def test_task_rows(name, is_pair, metric, train, test):
    task = TASKS[name]
    assert (task.is_pair, task.metric) == (is_pair, metric)
    assert (task.file_name("train"), task.file_name("test")) == (train, test)


def test_predictions_print_as_the_course_prints_them():
    """A class as an integer, a binary label as `1.0`, a score with every digit it has."""
    assert TASKS["sst"].format(np.int64(3)) == "3"
    assert TASKS["para"].format(np.float32(1)) == "1.0"
    assert TASKS["para"].format(np.float32(0)) == "0.0"
    assert TASKS["sts"].format(np.float32(3.25)) == "3.25"
    assert float(TASKS["sts"].format(np.float32(1) / 3)) == pytest.approx(1 / 3, rel=1e-7)


def test_a_task_without_a_named_head_takes_its_default_and_a_joint_pair_the_linear_one():
    config = MultitaskConfig(tasks=("sst", "para", "sts"), heads={"para": "dot"}, joint=("sts",))
    assert [config.head(name) for name in config.tasks] == ["ffn", "dot", "linear"]
    assert replace(config, joint=("para",)).head("para") == "linear"


def test_the_roles_of_a_tasks_sequences():
    config = MultitaskConfig(joint=("sts",), both=("para",))
    assert [config.roles(name) for name in ("sst", "para", "sts")] == [
        ("first",),
        ("pair", "first", "second"),
        ("pair",),
    ]
    assert MultitaskConfig().roles("para") == ("first", "second")


def test_either_contrastive_loss_needs_the_projection():
    assert not MultitaskConfig().uses_simcse
    assert MultitaskConfig(simcse_tasks=("sst",)).uses_simcse
    assert MultitaskConfig(supervised_simcse=True).uses_simcse
