"""A case's patched model beside the unpatched: outputs, loss and gradients."""

import inspect
from typing import Any

import torch

from tests.hf.cases import Case, build, inputs


def compare(case: Case) -> None:
    """Outputs at real tokens, loss and all gradients of the patched model are the unpatched's."""
    model, patched = build(case)
    arguments, real = inputs(case, model)
    wants_logits = "MaskedLM" in case.kind or "PreTraining" in case.kind
    extra = (
        {"return_logits": True} if wants_logits and (case.seed % 2 or not case.return_dict) else {}
    )
    expected = _run(model, arguments, case)
    output = _run(patched, arguments | extra, case)
    missing = set(expected) - set(output)
    assert missing <= ({"logits", "prediction_logits"} if case.training else set()), missing
    compare_outputs(case, output, expected, real)
    gradients = [
        _gradients(m, out, arguments, real, case)
        for m, out in ((patched, output), (model, expected))
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        _close(case, f"gradient of {name}", gradient, gradients[1][name])


@torch.no_grad()
def compare_inference(case: Case) -> None:
    """Outputs at real tokens without gradients, call by call, of the batch and of other tokens."""
    model, patched = build(case)
    arguments, real = inputs(case, model)
    for number in range(3):
        if number and "input_ids" in arguments:
            changed = arguments["input_ids"].roll(number, 0 if number == 2 else 1)
            ids = torch.where(real, changed.clamp(min=5), arguments["input_ids"])
            arguments = {**arguments, "input_ids": ids}
        expected = _run(model, arguments, case)
        compare_outputs(case, _run(patched, arguments, case), expected, real)


def compare_outputs(
    case: Case, output: dict[str, Any], expected: dict[str, Any], real: torch.Tensor
) -> None:
    assert list(output) == [name for name in expected if name in output]
    if case.padding == "compute":
        real = torch.ones_like(real)
    has_same_pooler = case.side == "right" or case.mask == "none" or case.padding == "compute"
    for name, value in output.items():
        whole = {"loss", "pooler_output", "seq_relationship_logits"}
        if name == "pooler_output" and not has_same_pooler:
            continue
        if isinstance(value, tuple):
            for number, (a, b) in enumerate(zip(value, expected[name], strict=True)):
                _close(case, f"hidden state {number}", a[real], b[real])
        elif name in whole or (value.ndim < 3 and value.shape[:2] != real.shape):
            _close(case, name, value, expected[name])
        else:
            _close(case, name, value[real], expected[name][real])


def _close(case: Case, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}[case.dtype]
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def _run(model: Any, arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)[: case.positional]
    rest, by_place = dict(arguments), []
    for name in names:
        if name not in rest:
            break
        by_place.append(rest.pop(name))
    output = model(*by_place, **rest)
    if case.return_dict:
        return dict(output)
    assert isinstance(output, tuple)
    return {str(place): value for place, value in enumerate(output)}


def _gradients(model, output, arguments, real, case: Case) -> dict[str, torch.Tensor]:
    if not case.return_dict:
        return {}
    if "loss" in output:
        loss = output["loss"]
    else:
        generator = torch.Generator().manual_seed(1)
        x = output["last_hidden_state"][real]
        loss = (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
        if "pooler_output" in output and case.side == "right":
            loss = loss + output["pooler_output"].square().sum()
    leaves = dict(model.named_parameters())
    if case.from_embeddings:
        leaves["inputs_embeds"] = arguments["inputs_embeds"]
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return {
        name: zero if gradient is None else gradient.to_dense()
        for name, gradient, zero in zip(leaves, found, zeros, strict=True)
    }
