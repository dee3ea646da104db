"""fastbert's own models in other people's loops: Trainer, and transformers' arguments."""

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers

import fastbert

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "num_labels": 3,
}


def own(**options):
    torch.manual_seed(0)
    config = fastbert.BertConfig(**{**SHAPE, **options})
    return fastbert.BertForSequenceClassification(config)


def rows():
    torch.manual_seed(1)
    one = {"attention_mask": torch.ones(10, dtype=torch.long)}
    return [
        {**one, "input_ids": torch.randint(5, 99, (10,)), "labels": torch.tensor(number % 3)}
        for number in range(16)
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_evaluates_saves_and_goes_on(checkpointing, tmp_path):
    def trainer(model):
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
            seed=3,
        )
        return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())

    model = own(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    loop = trainer(model)
    loop.train()
    loss = loop.evaluate()["eval_loss"]
    again = own(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other = trainer(again)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert model.is_gradient_checkpointing == checkpointing


def test_what_transformers_sets_on_a_configuration_is_kept_and_fields_are_not_changed():
    config = fastbert.BertConfig(**SHAPE)
    config.use_cache = False
    for one in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert one.use_cache is False
        assert one.to_dict()["use_cache"] is False
        assert one._commit_hash is None
        assert not hasattr(one, "hidden_sizes")
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"hidden_size.*replace"):
        config.hidden_size = 3


def test_every_so_many_layers_are_computed_again():
    model = own()
    model.gradient_checkpointing_enable(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.bert.encoder.layer] == [
        True,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="every_n_layers of at least 1, got 0"):
        model.gradient_checkpointing_enable(every_n_layers=0)
    with pytest.raises(ValueError, match=r"offload=False, got True; use torch\.autograd\.graph"):
        model.gradient_checkpointing_enable(offload=True)


@pytest.fixture
def directory(tmp_path):
    own().bfloat16().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
    ],
)
def test_from_pretrained_takes_a_dtype(option, dtype, directory):
    model = fastbert.BertForSequenceClassification.from_pretrained(directory, **option)
    assert model.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}, None])
def test_from_pretrained_takes_one_device(device_map, directory):
    model = fastbert.BertModel.from_pretrained(directory, device_map=device_map)
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert model.device.type == expected


def test_from_pretrained_takes_a_configuration(directory):
    for config in (
        fastbert.BertConfig(**SHAPE, hidden_act="relu"),
        transformers.BertConfig(**SHAPE, hidden_act="relu"),
    ):
        model = fastbert.BertModel.from_pretrained(
            directory, config=config, output_attentions=False
        )
        assert model.config.hidden_act == "relu"


def test_options_of_a_download_are_the_hubs(monkeypatch, directory):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(directory)

    monkeypatch.setattr("fastbert.checkpoint.snapshot_download", download)
    fastbert.BertModel.from_pretrained("some/model", revision="v2", cache_dir="/somewhere")
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == (
        "some/model",
        "v2",
        "/somewhere",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int64"}, "dtype: expected a floating-point dtype"),
        ({"dtype": "half precision"}, "dtype: expected a floating-point dtype"),
        ({"device_map": {"bert": 0, "classifier": 1}}, "device_map: expected one device"),
    ],
)
def test_from_pretrained_refuses(options, message, directory):
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(directory, **options)
