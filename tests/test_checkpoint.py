import json
import os
import resource
import signal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.system import files
from tests import processes

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


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_decoder_that_is_not_tied_has_its_own_bias(kind, tmp_path):
    """transformers 5 then has two parameters, of which it computes with that of the decoder."""
    config = transformers.BertConfig(**SHAPE, tie_word_embeddings=False)
    theirs = getattr(transformers, kind)(config).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        theirs.cls.predictions.decoder.bias.normal_()
    theirs.save_pretrained(tmp_path)
    ours = getattr(fastbert, kind).from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        ours.cls.predictions.bias.normal_()
    ours.save_pretrained(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(ids)[0], ours(ids)[0], rtol=1e-4, atol=1e-4)
    again = getattr(fastbert, kind).from_pretrained(tmp_path)
    assert torch.equal(again(ids)[0], ours(ids)[0])


def test_a_run_with_other_files_in_it_is_still_a_run(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    for place in (tmp_path, tmp_path / "checkpoint-1"):
        (place / "config.json").write_text("{}")
    (tmp_path / "latest").symlink_to("checkpoint-1")
    assert checkpoint.resolve(tmp_path) == tmp_path / "checkpoint-1"


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


def test_weights_are_read_back_in_the_dtype_that_they_were_written_in(tmp_path):
    """transformers 5 reads it from config.json, where the checkpoint's own was."""
    theirs = transformers.BertModel(transformers.BertConfig(**SHAPE)).half()
    theirs.save_pretrained(tmp_path / "half")
    ours = fastbert.BertModel.from_pretrained(tmp_path / "half")
    ours.save_pretrained(tmp_path / "whole")
    again = transformers.BertModel.from_pretrained(tmp_path / "whole", dtype="auto")
    assert again.dtype == ours.dtype == torch.float32
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


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


def test_a_decoder_that_is_not_the_embeddings_is_not_dropped(saved):
    """transformers 5 computes with it, 4 with the embeddings."""
    _, directory = saved
    other = torch.randn(50, 16)
    rewrite(directory, lambda weights: weights.update({"cls.predictions.decoder.weight": other}))
    kind = fastbert.BertForMaskedLM
    with pytest.raises(InputError, match=r"decoder\.weight is not bert\..*; set tie_word_emb"):
        kind.from_pretrained(directory)
    ours = kind.from_pretrained(directory, tie_word_embeddings=False)
    assert torch.equal(ours.get_output_embeddings().weight, other)
    fastbert.BertModel.from_pretrained(directory)


def test_weights_without_a_configuration_are_told(saved):
    model, directory = saved
    (directory / "config.json").unlink()  # as Trainer saves a model that is not transformers' own
    with pytest.raises(InputError, match=r"; model\.config\.save_pretrained writes it"):
        fastbert.BertForPreTraining.from_pretrained(directory)
    model.config.save_pretrained(directory)
    fastbert.BertForPreTraining.from_pretrained(directory)


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


@pytest.mark.parametrize("found", [[1, 2], {1: IDS}, {"bert.pooler.dense.bias": 3}])
def test_a_pickle_of_something_else_is_named(saved, found):
    _, directory = saved
    (directory / checkpoint.WEIGHTS).unlink()
    torch.save(found, directory / checkpoint.LEGACY_WEIGHTS)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: .* not tensors by name alone"):
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
    with files.new_directory(target) as writing:
        (writing / "a").write_text("first")
        assert not target.exists()

    def stop_while_writing():
        with files.new_directory(target) as writing:
            (writing / "a").write_text("second")
            raise KeyError

    with pytest.raises(KeyError):
        stop_while_writing()
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def fill_the_disk(directory):
    """Saves a model, and fails to twice more; says how often it is told why."""
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    with files.new_directory(directory) as writing:
        model.save_pretrained(writing)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    for save in (model.save_pretrained, lambda d: torch.save(model.state_dict(), d / "x.pt")):
        try:
            with files.new_directory(directory) as writing:
                save(writing)
        except InputError as error:
            print(str(error).count("cannot be written"))


def test_a_full_disk_leaves_the_previous_checkpoint_loadable(tmp_path):
    """The file-size limit of a process fails writes as a full disk does, without needing one."""
    _, said = processes.run(fill_the_disk, tmp_path / "model")
    assert said.split() == ["1", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    fastbert.BertModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_checkpoints_are_read_and_a_missing_shard_is_named(kind, tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    if kind == "bin":  # which transformers no longer writes
        text = (tmp_path / "model.safetensors.index.json").read_text()
        for shard in shards:
            bin_name = shard.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            text = text.replace(shard.name, bin_name)
            torch.save(load_file(shard), tmp_path / bin_name)
            shard.unlink()
        (tmp_path / "model.safetensors.index.json").unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        shards = sorted(tmp_path.glob("pytorch_model-*.bin"))
    ours = fastbert.BertForPreTraining.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(IDS).prediction_logits, theirs(IDS).prediction_logits)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{shards[1].name}: missing, but .*index.json lists it"):
        fastbert.BertForPreTraining.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(text, saved):
    _, directory = saved
    (directory / checkpoint.WEIGHTS).unlink()
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: not an index"):
        fastbert.BertModel.from_pretrained(directory)


def test_an_index_reads_no_file_outside_its_directory(saved, tmp_path):
    _, directory = saved
    inner = directory / "inner"
    inner.mkdir()
    (directory / "config.json").rename(inner / "config.json")
    index = {"weight_map": {"a": f"../{checkpoint.WEIGHTS}"}}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"inner/model\.safetensors: missing"):
        fastbert.BertModel.from_pretrained(inner)


def test_downloads_include_shards_and_their_index(monkeypatch):
    from fnmatch import fnmatch

    asked = {}
    monkeypatch.setattr(
        checkpoint, "snapshot_download", lambda name, allow_patterns: asked.setdefault(
            name, allow_patterns
        ) and "there"
    )  # fmt: skip
    checkpoint.resolve("some/model")
    for name in (
        *("config.json", "vocab.txt", "model.safetensors", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"),
    ):
        assert any(fnmatch(name, pattern) for pattern in asked["some/model"]), name


HEADS = {
    "SequenceClassification": "classifier",
    "TokenClassification": "classifier",
    "MultipleChoice": "classifier",
    "QuestionAnswering": "qa_outputs",
    "NextSentencePrediction": "cls.seq_relationship",
}


@pytest.mark.parametrize(
    ("source", "head"),
    [
        *(("BertModel", head) for head in HEADS),
        *(("BertForMaskedLM", head) for head in HEADS),
        ("BertForTokenClassification", "QuestionAnswering"),
        ("BertForTokenClassification", "NextSentencePrediction"),
    ],
)
def test_a_head_is_drawn_anew_over_another_models_encoder(source, head, tmp_path):
    theirs = getattr(transformers, source)(transformers.BertConfig(**SHAPE))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"{HEADS[head]}\.weight.*drawn anew"):
        model = getattr(fastbert, f"BertFor{head}").from_pretrained(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.bert.get_parameter(name), theirs.base_model.get_parameter(name))


def test_classifiers_go_both_ways_with_their_labels(tmp_path):
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}}
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, **labels))
    theirs.save_pretrained(tmp_path)
    ours = fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    assert ours.config.id2label == labels["id2label"]
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits)
    ours.classifier.weight.data += 1
    ours.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.id2label == labels["id2label"]
    torch.testing.assert_close(ours(IDS).logits, again(IDS).logits)


def test_another_number_of_labels_names_the_fix(tmp_path):
    three = fastbert.BertForSequenceClassification(fastbert.BertConfig(**SHAPE, num_labels=3))
    three.save_pretrained(tmp_path)
    load = fastbert.BertForSequenceClassification.from_pretrained
    with pytest.raises(InputError, match=r"classifier\.bias has shape.*num_labels=3, or with"):
        load(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias not in"):
        model = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(IDS).logits.shape == (2, 5)
    rewrite(tmp_path, lambda w: w.update({QUERY: torch.ones(3, 3)}))
    with pytest.raises(InputError, match=f"{QUERY} has shape"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_an_interrupted_save_leaves_the_previous_files(saved, monkeypatch):
    model, directory = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def stop(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", stop)
    model.cls.predictions.bias.data += 1
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_the_fix_for_a_head_that_does_not_follow_num_labels(tmp_path):
    fastbert.BertForTokenClassification(fastbert.BertConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"asks for \(1,\); load it with ignore_mismatched_sizes"):
        fastbert.BertForMultipleChoice.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionError(13, "Permission denied"), InputError, r"cannot be read \(Permission de"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "^DefaultCPU"),
    ],
)
def test_a_file_that_is_whole_is_not_called_truncated(saved, monkeypatch, error, kind, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "load_file", fail)
    with pytest.raises(kind, match=message):
        checkpoint.read_weights(saved[1])


def test_a_bare_models_names_beside_a_head_get_the_prefix(tmp_path):
    config = fastbert.BertConfig(**SHAPE, num_labels=3)
    theirs, ours = (fastbert.BertForSequenceClassification(config) for _ in range(2))
    weights = {n.removeprefix("bert."): t for n, t in theirs.state_dict().items()}
    assert checkpoint.load_weights(ours, weights, tmp_path) == []
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])


def test_a_transposed_parameter_is_written(tmp_path):
    """Which safetensors refuses."""
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    weight = model.pooler.dense.weight
    weight.data = weight.data.T.contiguous().T
    model.save_pretrained(tmp_path)
    assert torch.equal(fastbert.BertModel.from_pretrained(tmp_path).pooler.dense.weight, weight)
