"""Outputs behave as Hugging Face's ModelOutput does, which is run beside them."""

import copy
import pickle

import pytest
import torch
import transformers.modeling_outputs as theirs
from torch.utils import _pytree as pytree

from fastbert import outputs as ours
from tests.versions import IS_V4

FIELDS = {"loss": torch.tensor(1.5), "hidden_states": (torch.ones(2), torch.zeros(2))}


@pytest.mark.parametrize("module", [ours, theirs], ids=["fastbert", "transformers"])
def test_reads_as_mapping_object_and_tuple(module):
    output = module.MaskedLMOutput(**FIELDS)
    assert list(output.keys()) == ["loss", "hidden_states"]
    assert output.loss is output["loss"] is output[0]
    assert output[1:] == (FIELDS["hidden_states"],) == output.to_tuple()[1:]
    assert output.logits is None
    assert "logits" not in output
    with pytest.raises(KeyError):
        output["logits"]
    if module is theirs and IS_V4:  # which forgets what is set later
        return
    output.logits = torch.zeros(3)
    assert output["logits"] is output.logits
    output["loss"] = torch.tensor(2.0)
    assert output.loss == 2.0


@pytest.mark.parametrize("module", [ours, theirs], ids=["fastbert", "transformers"])
def test_another_attribute_is_no_part_of_the_mapping_but_another_item_is(module):
    output = module.MaskedLMOutput(**FIELDS)
    output.seconds = 5
    assert output.seconds == 5
    assert list(output) == ["loss", "hidden_states"]
    assert len(output.to_tuple()) == 2
    assert len(pytree.tree_leaves(output)) == 3
    output["tokens"] = 7
    assert output["tokens"] == output.tokens == 7
    assert list(output) == ["loss", "hidden_states", "tokens"]


@pytest.mark.parametrize("module", [ours, theirs], ids=["fastbert", "transformers"])
@pytest.mark.parametrize("change", ["pop", "update", "setdefault"])
def test_fields_cannot_be_removed(module, change):
    output = module.MaskedLMOutput(**FIELDS)
    with pytest.raises(Exception, match="MaskedLMOutput"):
        getattr(output, change)("loss")
    with pytest.raises(Exception, match="MaskedLMOutput"):
        del output["loss"]
    assert list(output) == ["loss", "hidden_states"]


@pytest.mark.parametrize(
    "clone",
    [
        copy.copy,
        copy.deepcopy,
        lambda o: pickle.loads(pickle.dumps(o)),
        lambda o: type(o)(dict(o)),
        lambda o: pytree.tree_map(torch.clone, o),
    ],
    ids=["copy", "deepcopy", "pickle", "from a mapping", "pytree"],
)
def test_survives_what_libraries_do_to_it(clone):
    output = ours.MaskedLMOutput(**FIELDS)
    other = clone(output)
    assert type(other) is ours.MaskedLMOutput
    assert list(other.keys()) == ["loss", "hidden_states"]
    assert other.loss == 1.5
    assert other.logits is None
    assert torch.equal(other.hidden_states[0], torch.ones(2))


def test_a_mapping_beside_other_fields_is_a_field():
    first = {"logits": torch.zeros(3)}
    output = ours.MaskedLMOutput(first, hidden_states=FIELDS["hidden_states"])
    assert output.loss is first
    assert output.logits is None


def test_field_names_are_hugging_faces():
    def names(output):
        return [name for name in output.__dataclass_fields__ if not name.startswith("cross")]

    from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

    assert names(ours.BertForPreTrainingOutput) == names(BertForPreTrainingOutput)
    assert names(ours.MaskedLMOutput) == names(theirs.MaskedLMOutput)
    pooling = names(theirs.BaseModelOutputWithPooling)
    assert names(ours.BaseModelOutputWithPooling) == pooling
