"""fastbert's own models as transformers has its own: configuration, pipelines, hooks, states."""

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers

import fastbert
from tests.models.elsewhere_case import SHAPE, masked_lm, own


def test_weights_are_drawn_as_hugging_face_does():
    words = own(vocab_size=999).get_input_embeddings().weight
    assert not words[0].any()  # of padding
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.05)


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
    for given, expected in ((None, False), ({"use_reentrant": True}, True)):
        model.gradient_checkpointing_enable(given)
        for layer in model.bert.encoder.layer:
            assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": expected}
    with pytest.raises(ValueError, match="every_n_layers of at least 1, got 0"):
        model.gradient_checkpointing_enable(every_n_layers=0)
    with pytest.raises(ValueError, match=r"offload=False, got True; use torch\.autograd\.graph"):
        model.gradient_checkpointing_enable(offload=True)


def test_adapters_train_under_reentrant_checkpointing_of_frozen_embeddings():
    """Whose output has no gradient unless it is asked for, as peft and trl ask."""
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE)).train().requires_grad_(False)
    hooks = model.embeddings.word_embeddings._forward_hooks
    model.encoder.layer[-1].output.dense.weight.requires_grad_()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(torch.ones(2, 7, dtype=torch.int64))[0].sum().backward()
    assert model.encoder.layer[-1].output.dense.weight.grad is not None
    model.disable_input_require_grads()
    assert not hooks


def test_checkpointing_has_two_names():
    """Transformers' up to 5.23, and from 5.24 on, of whose Trainer the first get a warning."""
    model = own()
    model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    assert model.is_activation_checkpointing
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_activation_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ".", "##s"]
LABELS = {
    "id2label": {0: "entailment", 1: "neutral", 2: "contradiction"},
    "label2id": {"entailment": 0, "neutral": 1, "contradiction": 2},
}


def numbers(found):
    """All numbers in what a pipeline gives, in order."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [number for one in found for number in numbers(one)]
    return [] if isinstance(found, str) or found is None else [float(found)]


@pytest.mark.parametrize(
    ("task", "head", "asked"),
    [
        ("fill-mask", "ForMaskedLM", (["the cat [MASK] on", "the [MASK]"],)),
        ("text-classification", "ForSequenceClassification", (["the cat", "mats on the mat ."],)),
        ("token-classification", "ForTokenClassification", (["the cat sat", "mats"],)),
        ("zero-shot-classification", "ForSequenceClassification", ("the cat sat", ["mat", "on"])),
        ("feature-extraction", "Model", (["the cat sat", "mats on"],)),  # of one length
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipelines_of_transformers_run_them(task, head, asked, batch_size, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE | LABELS | {"vocab_size": len(WORDS)})
    theirs = getattr(transformers, f"Bert{head}")(config).eval()
    theirs.save_pretrained(tmp_path)
    # what feature extraction reads by number it has made a plain dict of before
    options = {"return_dict": False} if task == "feature-extraction" else {}
    ours = getattr(fastbert, f"Bert{head}").from_pretrained(tmp_path, **options)
    expected, found = [], []
    for model, given in ((theirs, expected), (ours, found)):
        pipeline = transformers.pipeline(
            task, model=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu"
        )
        given += numbers(pipeline(*asked))
        assert "ipeline" in repr(pipeline)
    assert len(found) > 1
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_hook_of_the_word_embeddings_sees_the_batch():
    """Trainer's neftune_noise_alpha sets one that reads three dimensions."""
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    ours = fastbert.BertModel(fastbert.BertConfig(**SHAPE)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(5, 99, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    for model in (ours, theirs):
        model.get_input_embeddings().register_forward_hook(
            lambda module, ids, output: output + 1 / (output.size(1) * output.size(2))
        )
    found, expected = (model(ids, mask)[0][mask] for model in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_a_call_that_is_traced_or_exported_is_refused():
    ids, mask = torch.ones(2, 2, 7, dtype=torch.int64)
    for call in (
        lambda: torch.jit.trace(own().eval(), (ids, mask), strict=False),
        lambda: torch.export.export(own().eval(), (ids, mask), strict=False),
    ):
        with pytest.raises(ValueError, match=r"a call with values.*patched by fastbert\.patch"):
            call()


def test_a_tensor_without_values_of_its_own_is_refused_by_name():
    """Values are what a batch is packed by; those of torch.func.grad are there."""
    model = masked_lm().eval()
    ids, mask = torch.ones(2, 2, 7, dtype=torch.int64)
    hidden = torch.ones(2, 7, model.config.hidden_size)
    expected = r"expected values.*got a tensor of a trace, vmap or meta; leave it out"

    def loss(ids, mask=None, labels=None):
        output = model(ids[None], None if mask is None else mask[None], labels=labels)
        return output.logits.sum() if labels is None else output.loss

    with pytest.raises(ValueError, match=f"attention_mask: {expected}"):
        torch.func.vmap(loss)(ids, mask)
    with pytest.raises(ValueError, match=f"labels: {expected}"):
        torch.func.vmap(lambda ids: loss(ids, labels=ids[None]))(ids)
    with pytest.raises(ValueError, match=f"attention_mask: {expected}"):
        fastbert.BertModel(model.config).to("meta")(ids.to("meta"), mask.to("meta"))
    with pytest.raises(ValueError, match=f"attention_mask: {expected}"):
        torch.jit.trace(lambda x, mask: model.bert.encoder(x, mask)[0], (hidden, mask))
    embeds = model.get_input_embeddings()(ids[0]).detach()

    def of_embeds(embeds, mask):
        return model(None, mask[None], inputs_embeds=embeds[None]).logits.sum()

    expected = torch.autograd.functional.jacobian(lambda x: of_embeds(x, mask[0]), embeds)
    torch.testing.assert_close(torch.func.grad(of_embeds)(embeds, mask[0]), expected)


def test_a_state_has_hugging_faces_names_and_each_tensor_its_own_memory():
    model = masked_lm()
    state = model.state_dict()
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE)).state_dict()
    assert set(state) >= {name for name in theirs if "position_ids" not in name}
    memory = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(memory)) == len(memory)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is dict(model.named_parameters(remove_duplicate=False))[name]


@pytest.mark.parametrize("kind", ["a BertConfig", "Hugging Face's configuration"])
@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.tensor([0.5, 2.0]), "regression"),
        (3, torch.tensor([2, 0]), "single_label_classification"),
        (3, torch.eye(3)[:2], "multi_label_classification"),
    ],
)
def test_the_problem_that_labels_tell_is_kept_for_pipelines(
    kind, num_labels, labels, problem, tmp_path
):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(WORDS), "num_labels": num_labels}
    config = transformers.BertConfig(**shape)
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    given = None if kind == "a BertConfig" else copy.deepcopy(config)
    ours = fastbert.BertForSequenceClassification.from_pretrained(tmp_path, config=given)
    assert ours.config.problem_type is None
    scores = []
    for model in (theirs, ours):
        model(torch.tensor([[2, 5, 3], [2, 6, 3]]), labels=labels)
        assert model.config.problem_type == problem
        assert model.bert.config is model.config
        pipeline = transformers.pipeline(
            "text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu"
        )
        scores.append(numbers(pipeline(["the cat", "mats on the mat ."])))
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    ours.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert saved.problem_type == problem
