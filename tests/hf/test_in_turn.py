"""Programs of users' actions, in any order, on a model of Hugging Face and on fastbert's.

What fastbert keeps from one call to the next must never be stale, whatever a user did in between.
FASTBERT_FUZZ=2000 draws that many programs.
"""

import copy
import os
import random

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call

import fastbert
from fastbert.modules import request, sequences
from tests.hf.actions import ACTIONS, WIDTH, Twin
from tests.modules.graphs.case import Repeats, use

pytest.importorskip("peft", reason="adapters need peft")

VOCABULARY = 61
HEADS = "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"
SEEDS = st.integers(0, 2**16)


def batch_of(model, generator):
    """Arguments, places that are no padding, and labels; None for a bare model."""
    count, longest = generator.randint(1, 4), generator.randint(1, 9)
    lengths = [longest, *(generator.randint(1, longest) for _ in range(count - 1))]
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    numbers = torch.Generator().manual_seed(generator.randrange(2**30))
    ids = torch.randint(4, VOCABULARY, real.shape, generator=numbers)
    options = {"input_ids": ids.where(real, torch.tensor(1)), "attention_mask": real.long()}
    if generator.random() < 0.2:
        del options["attention_mask"]
        real = torch.ones_like(real)
    name, labels = type(model).__name__, None
    if "MaskedLM" in name:
        labels = ids.where(real & (ids % 3 == 0), -100)
        labels[0, 0] = 5
    elif "Sequence" in name:
        labels = ids[:, 0] % 3
    elif "Token" in name:
        labels = (ids % 3).where(real, -100)
    return options, real, labels


def found_in(output, real):
    """What an output has at real tokens, by name."""
    found = dict(output)
    states = found.pop("hidden_states", None) or ()
    found |= {f"state {number}": state for number, state in enumerate(states)}
    return {name: x[real] if x.ndim == 3 else x for name, x in found.items() if torch.is_tensor(x)}


def gradients_of(parameters):
    named = dict(parameters).items()
    return {f"gradient of {name}": p.grad.clone() for name, p in named if p.grad is not None}


def infer(model, generator):
    options, real, labels = batch_of(model, generator)
    how = generator.choice([torch.no_grad, torch.inference_mode])
    if generator.random() < 0.3:
        options["output_hidden_states"] = True
    if labels is not None and generator.random() < 0.3:
        options["labels"] = labels
    with how():
        if generator.random() < 0.2:
            ids = options.pop("input_ids")
            options["inputs_embeds"] = model.get_input_embeddings()(ids)
        return found_in(model(**options), real)


def loss_of(model, generator):
    options, real, labels = batch_of(model, generator)
    if labels is not None:
        return model(**options, labels=labels).loss
    return (model(**options).last_hidden_state[real] ** 2).mean()


def backpropagate(*losses):
    for loss in losses:
        if loss.requires_grad:
            loss.backward()


def step(model, generator):
    model.zero_grad()
    loss = loss_of(model, generator)
    backpropagate(loss)
    found = {"loss": loss.detach().clone(), **gradients_of(model.named_parameters())}
    if generator.random() < 0.5:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    return found


def two_forwards_and_their_backwards(model, generator):
    model.zero_grad()
    losses = [loss_of(model, generator)]
    infer(model, generator)
    losses.append(loss_of(model, generator))
    backpropagate(*(losses if generator.random() < 0.5 else losses[::-1]))
    return gradients_of(model.named_parameters())


def with_other_parameters(model, generator):
    options, real, _ = batch_of(model, generator)
    named = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    found = found_in(functional_call(model, named, (), options), real)
    backpropagate(sum((x**2).mean() for x in found.values()))
    return found | gradients_of(named)


CALLS = {
    call.__name__: call
    for call in (infer, step, two_forwards_and_their_backwards, with_other_parameters)
}


def model_of(family, head, attention, dtype):
    options = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 1}
    options |= {"num_labels": 3, "attn_implementation": attention}
    if family == "DistilBert":
        options |= {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
        options |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    else:
        options |= {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
        options |= {"intermediate_size": 24, "hidden_dropout_prob": 0.0}
        options["attention_probs_dropout_prob"] = 0.0
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}{head}")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def difference(x, y, precision):
    """ "" if x is y within rounding; else in which way it is not."""
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return f"{x.dtype} {tuple(x.shape)} for {y.dtype} {tuple(y.shape)}"
    error, size = (x - y).norm().item(), y.norm().item()
    is_near = error <= precision * (size + 0.1)
    both_lack = bool(x.isnan().any()) and x.isnan().equal(y.isnan())
    return "" if is_near or both_lack else f"an error of {error:.1e}, of {size:.1e}"


def run(program, theirs, ours):
    """Does the program to both models; where Hugging Face's raises an error, it ends."""
    is_exact = True
    for name, seed in program:
        done = []
        for twin in (theirs, ours):
            torch.manual_seed(1)
            try:
                if name in ACTIONS:
                    ACTIONS[name](twin, random.Random(seed))
                else:
                    done.append(CALLS[name](twin.model, random.Random(seed)))
            except Exception:
                if twin is theirs:
                    return
                raise
        parameters = [*theirs.model.parameters()]
        is_exact &= all(parameter.dtype == torch.float64 for parameter in parameters)
        if done:
            expected, found = done
            assert found.keys() >= expected.keys() - {"logits"}, name  # words' may be left out
            for key, x in found.items():
                told = difference(x, expected[key], 1e-9 if is_exact else 2e-4)
                assert not told, f"{key} of {name}: {told}"


@pytest.mark.parametrize("kind", ["patched", "patched, with graphs", "own"])
@settings(
    max_examples=int(os.environ.get("FASTBERT_FUZZ", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    family=st.sampled_from(["Bert", "Roberta", "DistilBert"]),
    head=st.sampled_from(HEADS),
    attention=st.sampled_from(["sdpa", "eager"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    counts=st.booleans(),
    program=st.lists(
        # about as many calls as changes
        st.tuples(st.sampled_from(sorted(ACTIONS)) | st.sampled_from(sorted(CALLS)), SEEDS),
        min_size=2,
        max_size=20,
    ),
)
def test_whatever_users_do_in_turn_it_stays_hugging_faces(
    kind, family, head, attention, dtype, counts, program
):
    theirs = model_of("Bert" if kind == "own" else family, head, attention, dtype)
    if kind == "own":
        ours = getattr(fastbert, type(theirs).__name__)(theirs.config).to(dtype).eval()
        ours.load_state_dict(theirs.state_dict())
    else:
        ours = fastbert.patch(copy.deepcopy(theirs))
    with pytest.MonkeyPatch.context() as patch:
        if kind == "patched, with graphs":
            use(Repeats(), patch)
        if not counts:  # as for small batches on a GPU
            patch.setattr(request, "_waits", lambda *_: False)
            patch.setattr(sequences, "LEAST_COUNTED", 2**30)
        run(program, Twin(theirs), Twin(ours))
