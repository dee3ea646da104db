"""Two processes under torchrun's agent, with gloo on the CPU, train as one process does."""

import json

import pytest
import torch.distributed

import fastbert
from tests import processes
from tests.hf import distributed_case
from tests.hf.training_case import make_batch, make_model

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
pytest.importorskip("torch.distributed.run", reason="this torch has no torchrun")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What two processes made of `distributed_case`, in one start of torchrun's agent."""
    path = tmp_path_factory.mktemp("distributed") / "report.json"
    work = (processes.torchrun, 0, distributed_case.main, path)
    status, said = processes.run(*work, OMP_NUM_THREADS="1")
    assert status == 0, said[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def alone():
    return {name: distributed_case.losses(make()) for name, make in distributed_case.MODELS.items()}


@pytest.mark.parametrize("model", distributed_case.MODELS)
@pytest.mark.parametrize("wrapper", distributed_case.WRAPPERS)
def test_two_processes_have_the_losses_of_one(report, alone, wrapper, model):
    """Also where one of them has nothing to predict, and the shares' counts differ."""
    found = report[f"{wrapper} {model}"]
    assert found["losses"] == pytest.approx(alone[model], rel=1e-5)
    assert found["routes"] >= distributed_case.STEPS
    assert found["slow"] == []


@pytest.mark.parametrize("model", distributed_case.MODELS)
def test_two_processes_that_replay_graphs_have_them_too(report, alone, model):
    """By a stand-in; the two layers have a backward graph each, whose gradients DDP exchanges."""
    found = report[f"graphs {model}"]
    assert found["losses"] == pytest.approx(alone[model], rel=1e-5)
    assert found["recorded"] % 3 == 0
    assert found["replayed"] == 3 * distributed_case.STEPS


def test_the_steps_have_changed_the_losses():
    """The comparison above would hold for processes that never exchange a gradient, otherwise."""
    case = distributed_case.MaskedLM()
    trained = distributed_case.losses(case)
    untrained = distributed_case.MaskedLM()
    whole = distributed_case.step_batch(distributed_case.STEPS - 1)
    loss = untrained.loss(untrained.module, whole, whole).item()
    assert abs(loss - trained[-1]) > 1e-3 * loss


@pytest.mark.parametrize("options", distributed_case.DDP_OPTIONS)
def test_an_unused_pooler_fails_no_sooner_than_hugging_faces(report, options):
    theirs, ours = report[f"unused pooler {options}"]
    assert ours or not theirs
    assert theirs or options == "plain", "Hugging Face's has changed: choose other options"


def test_a_class_derived_by_fsdp_is_still_patched():
    """FSDP2 gives each module that it shards a class derived from its own, of another module."""
    model = fastbert.patch(make_model())
    batch = make_batch()
    expected = model(**batch).loss
    for part in (model, *model.bert.encoder.layer):
        part.__class__ = type(f"FSDP{type(part).__name__}", (type(part),), {})
    assert fastbert.is_patched(model)
    assert fastbert.patch(model) is model
    routes = fastbert.explain(model, show=False, **batch).routes
    assert all(route.layout.startswith(("packed", "no logits")) for route in routes)
    torch.testing.assert_close(model(**batch).loss, expected)
