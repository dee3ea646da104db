"""What embedding_layer_norm refuses, and what ids outside of the tables do."""

import pytest
import torch
from torch import Tensor

from fastbert import backend
from fastbert import rng as random
from fastbert.ops.embedding import embedding_layer_norm
from tests.ops.embedding.case import POSITIONS, TYPES, WORDS, inputs


@pytest.mark.usefixtures("triton")
def test_an_id_outside_its_table_shows_as_nan_and_writes_nowhere(device):
    case = inputs(40, 16, torch.float32, device)
    case.input_ids[:12] = 7
    case.position_ids = torch.arange(40, device=device)
    case.token_type_ids.zero_()
    expected = case.results()
    case.input_ids[3], case.input_ids[4] = -1, WORDS
    case.position_ids[5], case.position_ids[6] = -1, POSITIONS
    case.token_type_ids[7], case.token_type_ids[8] = -1, TYPES
    actual = case.results()
    is_wrong = torch.zeros(40, dtype=torch.bool, device=device)
    is_wrong[3:9] = True
    assert torch.equal(actual[0].isnan().all(1), is_wrong)
    assert torch.equal(actual[0][~is_wrong], expected[0][~is_wrong])
    is_other = torch.arange(WORDS, device=device) != 7
    assert torch.equal(actual[1][is_other], expected[1][is_other])
    assert torch.equal(actual[2][~is_wrong], expected[2][~is_wrong])
    assert not actual[3][1:].any()


def call(device, change, **options):
    """Of good arguments, some replaced by name."""
    case = inputs(4, 8, torch.float32, device)
    names = ("word", "position", "token_type", "weight", "bias")
    arguments = {
        "input_ids": case.input_ids,
        "position_ids": case.position_ids,
        "token_type_ids": case.token_type_ids,
        **dict(zip(names, case.parameters, strict=True)),
    }
    replaced = {name: replace(arguments[name]) for name, replace in change.items()}
    first, *rest = (arguments | replaced).values()
    return embedding_layer_norm(first, *rest, **options)


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (dict.fromkeys(("word", "position", "token_type"), Tensor.double), {}, "float64"),
        ({"position": Tensor.half}, {}, "tables of several dtypes"),
        ({"word": lambda t: t.t().contiguous().t()}, {}, "tables that are not contiguous"),
        ({"bias": Tensor.half}, {}, "parameters of several dtypes"),
        ({}, {"dtype": torch.float64}, "a result in torch.float64"),
        ({"token_type_ids": lambda t: t.to("meta")}, {}, "several devices"),
    ],
    ids=["double", "tables", "strides", "vectors", "result", "devices"],
)
@pytest.mark.usefixtures("triton")
def test_a_forced_backend_never_falls_back(change, options, reason, device):
    with pytest.raises(backend.BackendUnavailable, match=f"embedding_layer_norm.*{reason}"):
        call(device, change, **options)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"position_ids": lambda t: t[:3]}, {}, r"position_ids that broadcast to \(4,\), got \(3,"),
        ({"token_type_ids": lambda t: t[None]}, {}, r"token_type_ids that broadcast"),
        ({"position_ids": Tensor.short}, {}, "position_ids of dtype int64 or int32"),
        ({"word": lambda t: t[0]}, {}, "word table"),
        ({"position": lambda t: t[:, :5].clone()}, {}, r"position table of shape \(rows, 8\)"),
        ({"token_type": lambda t: t[0]}, {}, "token_type table"),
        ({"token_type": lambda t: None}, {}, "token_type table for token_type_ids"),
        ({"weight": lambda t: t[:5].clone()}, {}, r"weight of shape \(8,\), got \(5,\)"),
        ({}, {"padding_idx": WORDS}, f"padding_idx within {WORDS} words"),
        ({}, {"padding_idx": -WORDS - 1}, f"padding_idx within {WORDS} words"),
        ({}, {"dropout_p": 1.0}, "dropout_p in"),
        ({}, {"dropout_p": 0.5, "rng": random.fresh(3, torch.device("cpu"))}, r"got \(3,\)"),
    ],
    ids=[
        "positions", "types", "short", "words", "position", "type", "no types", "weight", "padding",
        "negative", "dropout", "keys",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("body")
def test_wrong_arguments_are_named(change, options, message, device):
    with pytest.raises(ValueError, match=message):
        call(device, change, **options)


def test_an_id_outside_its_table_is_an_error_in_the_reference():
    with backend.use("reference"), pytest.raises(IndexError):
        call("cpu", {"input_ids": lambda t: t + WORDS})
