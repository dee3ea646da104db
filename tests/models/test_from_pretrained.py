"""What `from_pretrained` of fastbert's own models takes of transformers' options, and refuses."""

import pytest
import torch
import transformers

import fastbert
from tests.models.elsewhere_case import SHAPE, own


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


def test_from_pretrained_reads_a_configuration_and_a_folder_inside(directory):
    (directory.parent / "other").mkdir(exist_ok=True)
    other = fastbert.BertConfig(**SHAPE, hidden_act="relu")
    other.save_pretrained(directory.parent / "other")
    model = fastbert.BertModel.from_pretrained(
        directory.parent, subfolder=directory.name, config=directory.parent / "other"
    )
    assert model.config.hidden_act == "relu"


@pytest.mark.parametrize(
    "option",
    [
        {"low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True},
        {"variant": None, "output_loading_info": False, "subfolder": None},
    ],
)
def test_options_that_ask_for_nothing_are_taken(option, directory):
    fastbert.BertModel.from_pretrained(directory, **option, add_pooling_layer=False)


def test_a_constructor_of_a_users_own_gets_all_other_options(directory):
    class Own(fastbert.BertModel):
        def __init__(self, config, **options):
            super().__init__(config)
            self.options = options

    model = Own.from_pretrained(directory, pools=False, margin=0.5, use_safetensors=True)
    assert model.options == {"pools": False, "margin": 0.5}


def test_options_of_a_download_are_the_hubs(monkeypatch, directory):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(directory.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fastbert.BertModel.from_pretrained(
        "some/model", subfolder=directory.name, revision="v2", cache_dir="/somewhere"
    )
    assert f"{directory.name}/*.json" in asked["allow_patterns"]
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
        ({"attn_implementation": "eager"}, r"only options .*, got attn_implementation; leave it"),
        ({"output_loading_info": True}, "BertModel.from_pretrained: .*got output_loading_info"),
    ],
)
def test_from_pretrained_refuses(options, message, directory):
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(directory, **options)
