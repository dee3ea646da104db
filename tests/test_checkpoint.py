import json
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import checkpoint
from fastbert.check import InputError

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    model = fastbert.BertForPreTraining(fastbert.BertConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_hugging_face_loads_it_with_no_missing_or_unexpected_key(saved):
    model, directory = saved
    theirs, report = transformers.BertForPreTraining.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    output, expected = model(IDS), theirs.eval()(IDS)
    torch.testing.assert_close(output.prediction_logits, expected.prediction_logits)
    assert json.loads((directory / "config.json").read_text())["architectures"] == [
        "BertForPreTraining"
    ]


def test_loads_what_hugging_face_saves(tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastbert.BertForPreTraining.from_pretrained(tmp_path)
    assert not ours.training
    torch.testing.assert_close(ours(IDS).prediction_logits, theirs(IDS).prediction_logits)


def test_a_tied_parameter_is_written_once_and_stays_tied(saved):
    _, directory = saved
    names = load_file(directory / checkpoint.WEIGHTS).keys()
    assert "cls.predictions.decoder.weight" not in names
    assert "cls.predictions.decoder.bias" not in names
    again = fastbert.BertForPreTraining.from_pretrained(directory)
    embeddings = again.bert.embeddings.word_embeddings.weight
    assert again.cls.predictions.decoder.weight is embeddings
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias


def test_of_a_tied_parameters_names_the_first_counts(saved):
    _, directory = saved
    name, alias = "cls.predictions.bias", "cls.predictions.decoder.bias"
    bias = torch.arange(50.0)

    def loaded_bias(weights):
        save_file({**load_file(directory / checkpoint.WEIGHTS), **weights}, directory / "x")
        (directory / "x").replace(directory / checkpoint.WEIGHTS)
        return fastbert.BertForPreTraining.from_pretrained(directory).cls.predictions.bias

    assert torch.equal(loaded_bias({name: bias, alias: torch.ones(50)}), bias)
    rewrite(directory, lambda weights: weights.pop(name))
    assert torch.equal(loaded_bias({alias: bias}), bias)


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_other_models_take_their_part(saved, cls):
    model, directory = saved
    other = getattr(fastbert, cls).from_pretrained(directory)
    own = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, own.get(name, own.get(f"bert.{name}"))), name


def test_a_bare_encoder_gets_new_heads_with_a_warning(tmp_path):
    base = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"cls\.seq_relationship\.weight.*drawn anew"):
        model = fastbert.BertForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(model.bert.pooler.dense.weight, base.pooler.dense.weight)


def test_first_releases_names_and_pickles(saved):
    model, directory = saved
    weights = load_file(directory / checkpoint.WEIGHTS)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in weights.items()
    }
    (directory / checkpoint.WEIGHTS).unlink()
    torch.save(old, directory / checkpoint.LEGACY_WEIGHTS)
    again = fastbert.BertForPreTraining.from_pretrained(directory)
    assert torch.equal(again(IDS).prediction_logits, model(IDS).prediction_logits)


def test_a_pickle_that_runs_code_is_refused(saved):
    class Malicious:
        def __reduce__(self):
            return os.system, ("touch /tmp/fastbert-was-here",)

    _, directory = saved
    (directory / checkpoint.WEIGHTS).unlink()
    torch.save({"a": Malicious()}, directory / checkpoint.LEGACY_WEIGHTS)
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        fastbert.BertModel.from_pretrained(directory)


def rewrite(directory, change):
    weights = load_file(directory / checkpoint.WEIGHTS)
    change(weights)
    save_file(weights, directory / checkpoint.WEIGHTS)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(QUERY), f"lacks {QUERY}"),
        (lambda w: w.update({"bert.encoder.gate": torch.ones(1)}), "unknown bert.encoder.gate"),
        (lambda w: w.update({QUERY: torch.ones(3, 3)}), rf"{QUERY} has shape \(3, 3\)"),
    ],
    ids=["missing", "unknown", "reshaped"],
)
def test_weights_that_do_not_fit_are_refused(saved, change, message):
    _, directory = saved
    rewrite(directory, change)
    with pytest.raises(InputError, match=message):
        fastbert.BertForPreTraining.from_pretrained(directory)


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_truncated_file_is_named(saved, size):
    _, directory = saved
    path = directory / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or corrupt"):
        fastbert.BertForPreTraining.from_pretrained(directory)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no-such/model: neither a directory nor") as raised:
        fastbert.BertModel.from_pretrained("no-such/model")
    assert "\n" not in str(raised.value)


def test_new_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with checkpoint.new_directory(target) as writing:
        (writing / "a").write_text("first")
        assert not target.exists()

    def stop_while_writing():
        with checkpoint.new_directory(target) as writing:
            (writing / "a").write_text("second")
            raise KeyError

    with pytest.raises(KeyError):
        stop_while_writing()
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_the_previous_checkpoint_loadable(tmp_path):
    """The file-size limit of a process fails writes as a full disk does, without needing one."""
    script = f"""
        import resource, signal, torch, fastbert
        from fastbert import checkpoint
        from fastbert.check import InputError
        model = fastbert.BertModel(fastbert.BertConfig(**{SHAPE}))
        with checkpoint.new_directory({str(tmp_path / "model")!r}) as writing:
            model.save_pretrained(writing)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY}))
        for save in (model.save_pretrained, lambda d: torch.save(model.state_dict(), d / "x.pt")):
            try:
                with checkpoint.new_directory({str(tmp_path / "model")!r}) as writing:
                    save(writing)
            except InputError as error:
                print(str(error).count("cannot be written"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "1"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    fastbert.BertModel.from_pretrained(tmp_path / "model")
