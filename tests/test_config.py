import json

import pytest
import transformers

import fastbert
from fastbert.check import InputError
from fastbert.config import BertConfig, PretrainConfig


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
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob in \[0, 1\)"),
    ],
    ids=["heads", "vocab", "dropout"],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**change)


@pytest.mark.parametrize("text", ["", "[1]", '{"hidden_size": "many"}', "{"])
def test_a_damaged_config_json_names_the_file(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        BertConfig.from_pretrained(tmp_path)


def test_a_run_s_options_survive_json():
    config = PretrainConfig(corpus=("a", "b"), tokenizer="c", steps=3)
    config = PretrainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert config == PretrainConfig.from_json(config.to_json())


def test_what_is_not_given_is_the_presets():
    config = PretrainConfig(preset="base", nsp_weight=0.0)
    assert (config.learning_rate, config.dropout, config.max_seq_len) == (1e-4, 0.1, 128)
    assert config.nsp_weight == 0.0


@pytest.mark.parametrize(
    "change",
    [
        *({"steps": 0}, {"mlm_probability": 1.5}, {"preset": "huge"}, {"dropout": 1.0}),
        *({"seed": -1}, {"nsp_weight": -0.5}, {"max_seq_len": 7}, {"precision": "fp8"}),
    ],
    ids=str,
)
def test_impossible_options_are_named(change):
    with pytest.raises(InputError, match=f"--{next(iter(change)).replace('_', '-')}:"):
        PretrainConfig(**change)
