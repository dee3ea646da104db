"""A patched model is built, copied, moved, resized, saved and compiled like any other."""

import copy
import io
import logging
import pickle

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import fastbert
from tests.hf.training_case import SHAPE, assert_same_gradients, gradients, make_batch, make_pair

KIND = transformers.BertForMaskedLM


def assert_same_model(ours, theirs, tolerance=1e-5):
    """Patched, with the same logits, and the same loss and gradients in training."""
    assert fastbert.is_patched(ours)
    batch = make_batch()
    real = batch["attention_mask"].bool()
    logits = [model.eval()(**batch).logits[real] for model in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
    assert ours(**batch).logits is None  # so the fused head ran
    assert_same_gradients(gradients(ours), gradients(theirs), tolerance)


def is_tied(model) -> bool:
    return model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_patched_model_of_its_own(how):
    ours, theirs = make_pair(KIND)
    copied = COPIES[how](ours)
    assert type(copied) is type(ours)
    assert is_tied(copied)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_same_model(copied, theirs)


class Doubled(fastbert.patched_class(transformers.BertModel)):
    """A user's own class of patched models."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_users_subclass_is_one(how):
    model = Doubled(make_pair(KIND)[1].config).eval()
    copied = COPIES[how](model)
    assert type(copied) is Doubled
    assert fastbert.is_patched(copied)
    batch = make_batch()
    del batch["labels"]
    states = [one(**batch).last_hidden_state for one in (copied, model)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_to_another_dtype_and_back():
    ours, theirs = make_pair(KIND)
    assert_same_model(ours.double(), theirs.double())
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float64}
    assert_same_model(ours.to(torch.float32), theirs.to(torch.float32))
    half = ours.to(torch.bfloat16).eval()(**make_batch()).logits
    assert half.dtype == torch.bfloat16
    expected = theirs.to(torch.bfloat16).eval()(**make_batch()).logits
    real = make_batch()["attention_mask"].bool()
    torch.testing.assert_close(half[real], expected[real], rtol=0.1, atol=0.1)


def test_on_the_meta_device_shapes_are_hugging_faces():
    batch = {name: value.to("meta") for name, value in make_batch().items()}
    del batch["attention_mask"]  # Hugging Face reads its values too
    for training in (False, True):
        ours, theirs = (model.to("meta").train(training) for model in make_pair(KIND))
        found, expected = ours(**batch), theirs(**batch)
        assert found.loss.shape == expected.loss.shape
        assert found.loss.is_meta
        if not training:
            assert found.logits.shape == expected.logits.shape


def test_tensors_without_values_give_hugging_faces_shapes():
    """As where a tool counts memory or operations."""
    batch, config = make_batch(), make_pair(KIND)[1].config
    with FakeTensorMode():
        ours = fastbert.patch(KIND(config)).train()
        fake = {name: torch.ones(one.shape, dtype=one.dtype) for name, one in batch.items()}
        ours(**fake).loss.backward()
        assert all(one.grad.shape == one.shape for one in ours.bert.encoder.parameters())
        assert ours.eval()(**fake).logits.shape == (*batch["input_ids"].shape, SHAPE["vocab_size"])


@pytest.mark.parametrize("order", ["patch, load", "load, patch"])
def test_a_meta_model_takes_its_weights_by_assignment(order):
    _, theirs = make_pair(KIND)
    with torch.device("meta"):
        ours = KIND(theirs.config)
    if order == "patch, load":
        fastbert.patch(ours)
    weights = copy.deepcopy(theirs.state_dict())
    ours.load_state_dict(weights, strict=True, assign=True)
    ours.tie_weights()
    # buffers that no state dict has
    for name, buffer in theirs.named_buffers():
        module, _, leaf = name.rpartition(".")
        ours.get_submodule(module).register_buffer(leaf, buffer.clone(), persistent=False)
    if order == "load, patch":
        fastbert.patch(ours)
    assert_same_model(ours.train(), theirs)


@pytest.mark.parametrize("size", [80, 50], ids=["more", "fewer"])
def test_resized_embeddings_train(size):
    pair = make_pair(KIND)
    for model in pair:
        torch.manual_seed(4)
        model.resize_token_embeddings(size, mean_resizing=False)
    ours, theirs = pair
    assert is_tied(ours)
    batch = make_batch()
    batch["input_ids"] %= size
    batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] % size, -100)
    batch["input_ids"][0, 1] = batch["labels"][0, 1] = size - 1
    for _ in range(2):
        for model in pair:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        assert_same_gradients(gradients(ours), gradients(theirs))
    assert gradients(ours)["bert.embeddings.word_embeddings.weight"][size - 1].any()


def test_a_patched_class_saves_and_loads(tmp_path):
    ours, theirs = make_pair(KIND)
    patched = fastbert.patched_class(KIND)
    ours.save_pretrained(tmp_path)
    assert_same_model(patched.from_pretrained(tmp_path).train(), theirs)
    loaded = KIND.from_pretrained(tmp_path).train()
    assert not fastbert.is_patched(loaded)
    assert_same_model(fastbert.patch(loaded), theirs)
    assert_same_model(patched.from_pretrained(tmp_path, dtype=torch.float64), theirs.double())


def test_a_patched_class_makes_models_of_a_config():
    config = transformers.BertConfig(**SHAPE)
    patched = fastbert.patched_class(KIND)
    for model in (patched(config), patched._from_config(config)):
        assert fastbert.is_patched(model.bert.encoder)
        assert isinstance(model, KIND)


def test_unpatched_after_training_it_is_hugging_faces_again():
    ours, theirs = make_pair(KIND)
    names = [type(module) for module in theirs.modules()]
    ours(**make_batch()).loss.backward()
    fastbert.unpatch(ours)
    assert [type(module) for module in ours.modules()] == names
    torch.testing.assert_close(ours(**make_batch()).logits, theirs(**make_batch()).logits)


def losses_and_gradients(model, run, batch):
    model.zero_grad()
    loss = run(**batch)
    loss.backward()
    return loss.detach(), gradients(model)


def documents():
    """The sequences of `make_batch` as documents in one row."""
    batch = make_batch()
    real = batch.pop("attention_mask").bool()
    lengths = real.sum(1)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return {name: values[real][None] for name, values in batch.items()} | {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
    }


LONGEST = {"max_length_q": 16, "max_length_k": 16}


def assert_one_graph_is_the_same(model, run, batch):
    torch.compiler.reset()
    results = []
    for one in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        results.append(losses_and_gradients(model, one, batch))
    (loss, grads), (compiled_loss, compiled_grads) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(compiled_grads, grads)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_packed_documents_compile_to_one_graph(training):
    dropout = 0.2 if training else 0.0
    ours, _ = make_pair(transformers.BertModel, dropout=dropout, num_hidden_layers=1)
    ours.train(training)
    packed = documents() | LONGEST
    del packed["labels"], packed["token_type_ids"]

    def run(**batch):
        output = ours(**batch)
        return output.last_hidden_state.square().mean() + output.pooler_output.square().mean()

    assert_one_graph_is_the_same(ours, run, packed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining", "RobertaForMaskedLM"])
def test_training_on_packed_documents_compiles_to_one_graph(kind):
    """RoBERTa's head has a built-in function of torch as its activation."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")
    model = getattr(transformers, kind)(config(**SHAPE | {"num_hidden_layers": 1}))
    ours = fastbert.patch(model).train()
    packed = documents() | LONGEST
    if kind == "BertForPreTraining":
        packed["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
    packed["token_type_ids"].zero_()

    def run(**batch):
        return ours(**batch).loss

    assert_one_graph_is_the_same(ours, run, packed)


@pytest.mark.parametrize("batch", [make_batch, documents], ids=["padded", "documents"])
@pytest.mark.parametrize("is_own", [False, True], ids=["patched", "own"])
def test_numbers_are_read_without_warnings_of_torch_compile(is_own, batch, caplog, monkeypatch):
    """It logs many lines on the first `item()` that breaks a graph, in Trainer's runs too."""
    model, theirs = make_pair(KIND, num_hidden_layers=1)
    if is_own:
        model = fastbert.BertForMaskedLM(theirs.config).train()
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(logging.getLogger("torch._dynamo"), "handlers", [caplog.handler])
    compiled = torch.compile(lambda **batch: model(**batch).loss, backend="aot_eager")
    batch = batch()
    expected = model(**batch).loss
    torch.testing.assert_close(compiled(**batch), expected, rtol=1e-5, atol=1e-6)
    breaks = counters["graph_break"]  # the log has only a process's first `item()`
    assert breaks
    assert not [reason for reason in breaks if "item()" in reason]
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.slow
def test_padded_batches_compile_with_breaks():
    """The lengths of each batch are read once, to pack it."""
    ours, _ = make_pair(KIND, num_hidden_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(lambda **batch: ours(**batch).loss, backend="eager")
    for lengths in ((11, 1, 16, 7), (3, 16, 2, 9)):
        batch = make_batch(lengths)
        loss, grads = losses_and_gradients(ours, lambda **batch: ours(**batch).loss, batch)
        compiled_loss, compiled_grads = losses_and_gradients(ours, compiled, batch)
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
        assert_same_gradients(compiled_grads, grads)
