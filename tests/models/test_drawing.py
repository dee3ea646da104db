"""What `from_pretrained` draws: the weights of a head that a checkpoint lacks, and no others."""

import pytest
import torch
from torch import nn

import fastbert
from fastbert.models.drawing import draw
from tests.models.elsewhere_case import SHAPE


class WithOwn(fastbert.BertForSequenceClassification):
    """A user's model, which draws what no checkpoint has."""

    def __init__(self, config):
        super().__init__(config)
        nn.init.zeros_(self.classifier.weight)
        nn.init.ones_(self.classifier.bias)
        self.register_buffer("directions", torch.zeros(4).normal_(), persistent=False)


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    model = fastbert.BertForMaskedLM(fastbert.BertConfig(**SHAPE, initializer_range=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_that_is_whole_leaves_the_generator_alone(directory):
    before = torch.get_rng_state()
    model = fastbert.BertForMaskedLM.from_pretrained(directory)
    assert torch.equal(torch.get_rng_state(), before)
    assert min(parameter.mean() for parameter in model.parameters()) > 0.5


@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_a_head_that_a_checkpoint_lacks_is_drawn_as_in_training_from_scratch(directory):
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(fastbert.BertForSequenceClassification.from_pretrained(directory))
    first, second = found
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    for linear in (first.classifier, first.bert.pooler.dense):
        assert linear.weight.std().item() == pytest.approx(0.3, rel=0.4)
        assert not linear.bias.any()
    assert first.bert.embeddings.word_embeddings.weight.mean() > 0.5


@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_a_users_own_class_draws_what_is_its_own(directory):
    models = [WithOwn.from_pretrained(directory) for _ in range(2)]
    directions = [model.directions for model in models]
    assert directions[0].any()
    assert not torch.equal(*directions)
    assert not models[0].classifier.weight.any()
    assert models[0].classifier.bias.all()


def test_a_bias_that_is_read_stays_where_its_weight_is_drawn():
    model = fastbert.BertForSequenceClassification(fastbert.BertConfig(**SHAPE))
    nn.init.ones_(model.classifier.bias)
    before = model.classifier.weight.clone()

    draw(model, ["classifier.weight"])
    assert model.classifier.bias.all()
    assert not torch.equal(model.classifier.weight, before)
