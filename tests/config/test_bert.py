import dataclasses
import json
from pathlib import Path

import pytest
import transformers

import fastbert
from fastbert.check import InputError
from fastbert.config.bert import ACTIVATIONS, BertConfig
from fastbert.config.pretrain import PretrainConfig
from fastbert.modules import activations


def test_defaults_are_hugging_faces():
    ours, theirs = BertConfig().to_dict(), transformers.BertConfig().to_dict()
    assert {key: theirs[key] for key in ours} == ours


def test_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match="unknown option 'hiden_size'; did you mean 'hidden_size'"):
        BertConfig(hiden_size=3)


def test_config_json_keeps_keys_it_has_no_use_for(tmp_path):
    written = {"hidden_size": 12, "num_attention_heads": 3, "use_cache": True, "my_key": [1, "a"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = BertConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.extra) == (12, {"use_cache": True, "my_key": [1, "a"]})
    config.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert written.items() <= again.items()
    assert BertConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    "change",
    [
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"model_type": "roberta"},
        {"pruned_heads": {"1": [0]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_values_that_change_the_mathematics_are_refused(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(InputError, match=f"{next(iter(change))}.*mathematics"):
        BertConfig.from_pretrained(tmp_path)


def test_fields_that_calls_read_may_be_set_later_and_are_checked():
    config = BertConfig(hidden_size=8, num_attention_heads=2)
    config.hidden_size = 8  # as it is
    config.label2id, config.id2label = {"bad": 0, "good": 1}, {"0": "bad", "1": "good"}
    config.residual_in_fp32, config.output_hidden_states = True, True
    config.problem_type = "multi_label_classification"
    again = BertConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert (again.id2label, again.label2id) == ({0: "bad", 1: "good"}, {"bad": 0, "good": 1})
    for name, value, message in (
        ("id2label", {0: "a", 1: "b", 2: "c"}, "num_labels = 3"),
        ("problem_type", "rank", "problem_type to be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(config, name, value)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"hidden_size.*replace"):
        config.hidden_size = 16
    assert again == config


def test_other_libraries_find_what_they_read():
    ours, theirs = BertConfig(), transformers.BertConfig()
    assert ours.model_type == theirs.model_type
    assert ours.get_text_config(decoder=False) is ours
    assert json.loads(ours.to_json_string()) == json.loads(json.dumps(ours.to_dict()))
    with pytest.raises(ValueError, match="cannot hold a function as hidden_act"):
        BertConfig(hidden_act=abs).to_json_string()


def test_a_hugging_face_config_is_kept_by_reference_and_checked():
    config = transformers.BertConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
    )
    assert fastbert.BertEncoder(config).config is config
    config.is_decoder = True
    with pytest.raises(ValueError, match="is_decoder"):
        fastbert.BertEncoder(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "multiple of num_attention_heads"),
        ({"vocab_size": 0}, "vocab_size of at least 1, got 0"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob in \[0, 4095/4096\]"),
        ({"attention_probs_dropout_prob": 0.9999}, r"attention_probs_dropout_prob in \[0, 4095"),
        ({"hidden_dropout_prob": -0.1}, r"hidden_dropout_prob in \[0, 4095/4096\]"),
        ({"hidden_size": 128.0}, "a whole hidden_size of at least 1, got 128.0"),
        ({"num_hidden_layers": 2.5}, "a whole num_hidden_layers of at least 0, got 2.5"),
        ({"layer_norm_eps": "a"}, "layer_norm_eps of at least 0, got 'a'"),
        ({"pad_token_id": 30522}, "pad_token_id below the vocab_size 30522, or None, got 30522"),
        ({"id2label": ["a", "b"]}, "id2label to be a mapping, got"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**change)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", '{"hidden_size": "many"}', "{", "[" * 10**6, '{"hidden_act": "mish"}'],
    ids=["empty", "list", "size", "half", "deep", "activation"],
)
def test_a_damaged_config_json_names_the_file(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"^{tmp_path}/config\.json: "):
        BertConfig.from_pretrained(tmp_path)


def test_the_activations_are_those_that_there_are():
    assert set(ACTIVATIONS) == activations.ACTIVATIONS.keys()


def test_a_run_s_options_survive_json():
    config = PretrainConfig(corpus=("a", "b"), tokenizer="c", cache="d", steps=3)
    config = PretrainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert config == PretrainConfig.from_json(config.to_json())
    assert config.cache == Path("d")


def test_a_run_goes_on_with_other_processes_and_another_cache():
    config = PretrainConfig(steps=3)
    free = {"tokenize_workers": 2, "cache": Path("d"), "workers": 1, "log_every": 5}
    assert config.same_run(**free) == PretrainConfig(steps=3, **free)
    with pytest.raises(InputError, match="--steps 4: the run was started with 3"):
        config.same_run(steps=4)
    assert PretrainConfig(precision="bf16").same_run(precision="auto").precision == "bf16"


def test_what_is_not_given_is_the_presets():
    config = PretrainConfig(preset="base", nsp_weight=0.0)
    assert (config.learning_rate, config.dropout, config.max_seq_len) == (1e-4, 0.1, 128)
    assert config.nsp_weight == 0.0


@pytest.mark.parametrize(
    "change",
    [
        *({"steps": 0}, {"mlm_probability": 1.5}, {"preset": "huge"}, {"dropout": 1.0}),
        *(
            {"seed": -1},
            {"tokenize_workers": -1},
            {"nsp_weight": -0.5},
            {"max_seq_len": 7},
            {"precision": "fp4"},
            {"optimizer": "lion"},
        ),
    ],
    ids=str,
)
def test_impossible_options_are_named(change):
    with pytest.raises(InputError, match=f"--{next(iter(change)).replace('_', '-')}:"):
        PretrainConfig(**change)


def test_labels_follow_num_labels_or_id2label():
    assert BertConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    config = BertConfig(num_labels=3)
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config = dataclasses.replace(config, num_labels=1)
    assert (config.num_labels, config.label2id) == (1, {"LABEL_0": 0})
    config = BertConfig(id2label={"0": "no", "1": "yes", "2": "both"})
    assert (config.num_labels, config.label2id["both"]) == (3, 2)
    with pytest.raises(ValueError, match="expected num_labels = 3"):
        dataclasses.replace(config, num_labels=2)
    with pytest.raises(ValueError, match="problem_type to be one of regression"):
        BertConfig(problem_type="ranking")
    with pytest.raises(ValueError, match="at least 2 for single_label_classification"):
        BertConfig(problem_type="single_label_classification", num_labels=1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_labels": 3},
        {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"problem_type": "regression", "num_labels": 1, "classifier_dropout": 0.3},
    ],
    ids=["default", "number", "names", "regression"],
)
def test_a_classifiers_config_json_reads_alike_on_both_sides(fields, tmp_path):
    names = ("num_labels", "id2label", "label2id", "problem_type", "classifier_dropout")
    theirs, ours = transformers.BertConfig(**fields), BertConfig(**fields)
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    theirs.save_pretrained(tmp_path)
    read = BertConfig.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    back = transformers.BertConfig.from_pretrained(tmp_path)
    for name in names:
        assert getattr(read, name) == getattr(theirs, name), name
        assert getattr(back, name) == getattr(theirs, name), name
    assert "num_labels" not in json.loads((tmp_path / "config.json").read_text())


def test_a_checkpoints_config_is_read_with_other_labels(tmp_path):
    BertConfig(id2label={0: "a", 1: "b", 2: "c"}, hidden_size=24).save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path, num_labels=2)
    assert (config.id2label, config.hidden_size) == ({0: "LABEL_0", 1: "LABEL_1"}, 24)
    config = BertConfig.from_pretrained(tmp_path, id2label={0: "x"})
    assert (config.num_labels, config.label2id) == (1, {"x": 0})
