"""`torch.compile(fullgraph=True)`, over own and patched models: the eager result, in one graph."""

import functools

import pytest
import torch

import fastbert
from tests.hf.cases import IS_V4, Case, build
from tests.hf.contract_case import BERTS_OWN, HEADS, Subject, gradients

MODELS = [
    *(("own", "Bert", head) for head in (*HEADS, *BERTS_OWN)),
    *(("patched", "Bert", head) for head in (*HEADS, *BERTS_OWN)),
    *(("patched", family, "MaskedLM") for family in ("Roberta", "DistilBert", "Electra")),
]
one_graph = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
pytestmark = pytest.mark.skipif(IS_V4, reason="transformers 4.57 does not compile as one graph")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("model", MODELS, ids=" ".join)
def test_a_training_step_with_padding_is_the_eager_one(model):
    subject = Subject(model)
    expected = subject(num_items_in_batch=torch.tensor(9))
    wanted = gradients(subject.model, expected.loss)
    subject.model = one_graph(subject.model)
    actual = subject(num_items_in_batch=torch.tensor(9))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(gradients(subject.model._orig_mod, actual.loss), wanted)


def bare(kind):
    theirs, model = build(Case("Bert", "Model"))
    if kind == "own":
        model = fastbert.BertModel(theirs.config).double()
        model.load_state_dict(theirs.state_dict())
    return theirs.eval(), model.eval()


@pytest.fixture(params=["own", "patched"])
def both(request):
    return bare(request.param)


IDS = torch.arange(5, 19).view(2, 7)
REAL = torch.arange(7) < torch.tensor([[7], [4]])


MASKS = {
    "integers": REAL.long(),
    "numbers": REAL.double(),
    "4-D padding": REAL[:, None, None],
    "4-D": REAL[:, None, None].expand(2, 1, 7, 7),
    "ones": torch.ones(2, 7, dtype=torch.long),
}


@pytest.mark.parametrize("form", MASKS)
def test_every_form_of_a_mask_gives_the_eager_states(both, form):
    _, model = both
    with torch.no_grad():
        expected = model(IDS, MASKS[form]).last_hidden_state
        actual = one_graph(model)(IDS, MASKS[form]).last_hidden_state
    if form == "4-D":  # a trace does not read whether it is padding, so that is computed
        actual, expected = actual[REAL], expected[REAL]
    torch.testing.assert_close(actual, expected)


def test_numbers_that_are_no_mask_are_refused_when_the_graph_runs(both):
    _, model = both
    compiled = one_graph(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="attention_mask: expected zeros"):
        compiled(IDS, REAL.double() * 0.5)


@torch.no_grad()
def test_padding_that_is_computed_is_as_in_hugging_face():
    theirs, model = bare("patched")
    fastbert.patch(model, padding="compute")
    expected = theirs(IDS, REAL.long()).last_hidden_state
    for mask in (REAL.long(), torch.ones(2, 7, dtype=torch.long)):
        expected = theirs(IDS, mask).last_hidden_state
        actual = one_graph(model)(IDS, mask).last_hidden_state
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_positions_of_one_row_which_may_hold_documents(both):
    """A patched model takes Hugging Face's way; an own one names another way to tell them apart."""
    theirs, model = both
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    if type(model) is fastbert.BertModel:
        with pytest.raises(Exception, match="cu_seq_lens_q in place of position_ids"):
            one_graph(model)(IDS[:1], position_ids=positions)
    else:
        actual = one_graph(model)(IDS[:1], position_ids=positions).last_hidden_state
        expected = theirs(IDS[:1], position_ids=positions).last_hidden_state
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("others", [{}, {"max_length_q": 4}], ids=["boundaries", "and the longest"])
def test_documents_that_boundaries_tell_apart(both, others):
    _, model = both
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    others = others | {"cu_seq_lens_q": torch.tensor([0, 3, 7]).int()}
    expected = model(IDS[:1], position_ids=positions)
    actual = one_graph(model)(IDS[:1], position_ids=positions, **others)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_loss_is_exported(strict):
    """torch.export reads no values either, with Dynamo or without."""
    model = Subject(("own", "Bert", "MaskedLM"), training=False).model
    labels = torch.where(REAL, IDS, -100)
    exported = torch.export.export(model, (IDS,), {"labels": labels}, strict=strict)
    other = labels.clone()
    other[:, :3] = -100
    torch.testing.assert_close(
        exported.module()(IDS, labels=other)["loss"], model(IDS, labels=other).loss
    )


@torch.no_grad()
def test_without_fullgraph_padding_is_still_left_out(both):
    """In several graphs, whose tokens are the real ones alone."""
    _, model = both
    rows = []

    def seen(graph, inputs):
        found = [node for node in graph.graph.nodes if "gelu" in str(node.target)]
        rows.extend(node.meta["example_value"].shape[0] for node in found)
        return graph.forward

    expected = model(IDS, REAL.long())
    torch.testing.assert_close(torch.compile(model, backend=seen)(IDS, REAL.long()), expected)
    assert rows
    assert set(map(int, rows)) == {11}


def test_a_dynamo_with_other_names_is_taken_for_one_that_breaks_graphs(monkeypatch):
    monkeypatch.delattr(torch._dynamo.symbolic_convert.InstructionTranslator, "current_tx")
    assert not fastbert.ops.fused._is_one_graph()


@torch.no_grad()
def test_hooks_that_capture_outputs_sleep_in_one_graph_too():
    """A call with output_attentions leaves them on the layers of a patched model."""
    _, model = build(Case("Bert", "Model", attention="eager"))
    model.eval()(IDS, output_attentions=True)
    expected = model(IDS, REAL.long()).last_hidden_state
    actual = one_graph(model)(IDS, REAL.long()).last_hidden_state
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_hooks_that_capture_outputs_break_no_graph():
    _, model = build(Case("Bert", "Model", attention="eager"))
    assert torch._dynamo.explain(model.eval())(IDS).graph_count == 1
    model(IDS, output_attentions=True)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(IDS).graph_count == 1


@torch.no_grad()
@pytest.mark.parametrize("wanted", [False, True], ids=["", "hidden states"])
def test_an_encoder_alone_and_in_the_model_around_it(wanted):
    """transformers' model tells the encoder which states it collects, by a context variable."""
    theirs, _ = bare("own")
    theirs.encoder = fastbert.BertEncoder(theirs.config).double().eval()
    x, mask = theirs.embeddings(IDS), REAL.long()
    expected = theirs.encoder(x, mask, output_hidden_states=wanted)
    actual = one_graph(theirs.encoder)(x, mask, output_hidden_states=wanted)
    torch.testing.assert_close(tuple(actual.values()), tuple(expected.values()))
    expected = theirs(IDS, mask, output_hidden_states=wanted)
    actual = one_graph(theirs)(IDS, mask, output_hidden_states=wanted)
    assert actual.keys() == expected.keys()
    # a trace gets the mask in four dimensions, whose values would tell what is padding
    pairs = [(actual.last_hidden_state, expected.last_hidden_state)]
    pairs += zip(actual.hidden_states or (), expected.hidden_states or (), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one[REAL], other[REAL])
