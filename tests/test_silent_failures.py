"""The failures that reach users without a word, each seen in the field; here each is a test.

The numbers are those of the drop-in contract's list. Kernels have tests of their own for what only
a GPU can show (2^31 elements, waits of the host): `pytest -m gpu`.
"""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert.data import Tokens, make_masking
from fastbert.data.text.tokenizer import SpecialTokens
from fastbert.ops.attention import attention_qkvpacked
from fastbert.ops.gather_rows import gather_rows

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
}
IDS = torch.randint(5, 37, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]])
PADDED = {"input_ids": IDS * MASK, "attention_mask": MASK}


def make(kind="BertForMaskedLM", **options):
    """transformers' model and its patched copy, with the same weights."""
    torch.manual_seed(1)
    model = getattr(transformers, kind)(transformers.BertConfig(**SHAPE | options))
    return model, fastbert.patch(copy.deepcopy(model))


def gradients(model, **arguments):
    model.zero_grad()
    model(**arguments).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_01_a_dropout_value_or_a_mask_that_changes_the_path_is_told():
    for dropout in (0.0, 0.1, 0.25):
        _, patched = make(attention_probs_dropout_prob=dropout)
        rows = fastbert.explain(patched, **PADDED, labels=IDS, show=False).rows
        told = {row.dropout for row in rows if row.operator.startswith("attention")}
        assert told - {""} == ({f"{dropout:g}"} if dropout else set())
    bias = torch.randn(3, 2, 7, 7)
    told = fastbert.explain(patched.eval(), input_ids=IDS, attention_mask=bias, show=False)
    assert "general mask" in str(told)
    told = fastbert.explain(patched, **PADDED, output_attentions=True, show=False)
    assert "output_attentions" in str(told)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_02_recomputation_replays_the_dropout_masks(use_reentrant):
    _, patched = make(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    patched.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            patched.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
        torch.manual_seed(5)
        found.append(gradients(patched, **PADDED, labels=IDS))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(6)
    assert not torch.equal(gradients(patched, **PADDED, labels=IDS)[0], found[0][0])


def test_02_masks_are_those_of_the_sequence_however_the_batch_is_laid_out():
    _, patched = make("BertModel", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    patched.train()
    left = torch.stack([row.roll(7 - int(mask.sum())) for row, mask in zip(IDS, MASK, strict=True)])
    left_mask = MASK.flip(1)
    positions = torch.arange(7).expand(3, 7)
    shifted = (positions - (7 - MASK.sum(1, keepdim=True))).clamp(min=0)
    torch.manual_seed(7)
    right = patched(**PADDED, position_ids=positions).last_hidden_state[MASK.bool()]
    torch.manual_seed(7)
    other = patched(left, left_mask, position_ids=shifted).last_hidden_state[left_mask.bool()]
    torch.testing.assert_close(right, other)


def test_03_nothing_to_attend_to_or_to_predict_is_a_finite_zero():
    _, patched = make()
    empty = MASK.clone()
    empty[1] = 0
    ignored = torch.full_like(IDS, -100)
    for mask, labels in ((empty, IDS), (MASK, ignored), (torch.zeros_like(MASK), IDS)):
        for training in (True, False):
            patched.train(training)
            output = patched(input_ids=IDS, attention_mask=mask, labels=labels)
            assert output.loss.isfinite()
            if (labels == -100).all() or not mask.any():
                assert output.loss == 0
            found = gradients(patched, input_ids=IDS, attention_mask=mask, labels=labels)
            assert all(gradient.isfinite().all() for gradient in found)
            if output.loss == 0:
                assert not any(gradient.any() for gradient in found)
    _, tokens = make("BertForTokenClassification")
    assert all(not g.any() for g in gradients(tokens, **PADDED, labels=ignored))
    assert tokens(**PADDED, labels=ignored).loss == 0


def test_04_rows_behind_two_to_the_31_elements_are_found():
    rows, columns = 2**21 + 3, 1024  # of untouched memory, but for the last row
    src = torch.empty(rows, columns, dtype=torch.uint8)
    src[-1] = torch.arange(columns).to(torch.uint8)
    index = torch.tensor([rows - 1], dtype=torch.int32)
    inverse = torch.full((rows,), -1, dtype=torch.int32)
    inverse[-1] = 0
    assert torch.equal(gather_rows(src, index, inverse)[0], src[-1])


def test_04_sequences_of_length_zero_are_legal():
    qkv = torch.randn(5, 3, 2, 8)
    cu_seqlens = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    expected = attention_qkvpacked(qkv, torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    assert torch.equal(attention_qkvpacked(qkv, cu_seqlens, 3), expected)


def test_05_padding_is_written_as_zeros_and_means_over_tokens_agree():
    model, patched = make("BertModel")
    model.eval()
    patched.eval()
    ours, theirs = patched(**PADDED).last_hidden_state, model(**PADDED).last_hidden_state
    assert not ours[MASK == 0].any()
    weights = MASK[..., None] / MASK.sum(1)[:, None, None]
    torch.testing.assert_close((ours * weights).sum(1), (theirs * weights).sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_06_autocast_gives_hugging_faces_dtypes_and_no_error(dtype):
    model, patched = make("BertForPreTraining")
    labels = {"labels": IDS, "next_sentence_label": torch.tensor([0, 1, 0])}
    dtypes = []
    for one in (model, patched):
        with torch.autocast("cpu", dtype):
            output = one(**PADDED, **labels, output_hidden_states=True)
        output.loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in one.parameters())
        dtypes.append(
            [output.seq_relationship_logits.dtype, *(h.dtype for h in output.hidden_states)]
        )
        with torch.autocast("cpu", dtype):
            bare = one.eval().bert(**PADDED)
        dtypes[-1] += [bare.last_hidden_state.dtype, bare.pooler_output.dtype]
    assert dtypes[0] == dtypes[1]


def test_07_a_batch_is_unpadded_once_and_a_packed_one_not_at_all():
    _, patched = make("BertModel")
    rows = fastbert.explain(patched, **PADDED, show=False).rows
    assert [row.calls for row in rows if row.operator == "compact"] == [1]
    packed = {
        "input_ids": IDS[:1],
        "cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
        "max_length_q": 4,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    rows = fastbert.explain(patched, **packed, show=False).rows
    assert "compact" not in {row.operator for row in rows}


def test_07_packed_documents_do_not_see_each_other():
    model, patched = make("BertModel")
    model.eval()
    patched.eval()
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    expected = [model(part) for part in IDS[:1].split([3, 4], 1)]
    for said in (
        {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 4},
        {},
    ):
        output = patched(IDS[:1], position_ids=positions, **said)
        states = torch.cat([one.last_hidden_state for one in expected], 1)
        torch.testing.assert_close(output.last_hidden_state, states)
        pooled = torch.cat([one.pooler_output for one in expected])
        torch.testing.assert_close(output.pooler_output, pooled)  # one row a document


def test_08_torch_compile_gives_the_eager_result():
    _, patched = make("BertModel", num_hidden_layers=1)
    patched.eval()
    expected = patched(**PADDED)
    output = torch.compile(patched)(**PADDED)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output)


def test_09_deterministic_algorithms_give_bitwise_equal_gradients():
    _, patched = make()
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            torch.manual_seed(2)
            found.append(gradients(patched, **PADDED, labels=IDS))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_10_a_checkpoint_means_the_same_to_both(tmp_path):
    model, patched = make("BertForPreTraining")
    patched.eval()
    patched.save_pretrained(tmp_path / "patched")
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "patched").eval()
    ours = fastbert.BertForPreTraining.from_pretrained(tmp_path / "patched")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.BertForPreTraining.from_pretrained(tmp_path / "ours").eval()
    expected = model.eval()(input_ids=IDS).prediction_logits
    for one in (patched, theirs, ours, again):
        torch.testing.assert_close(one(input_ids=IDS).prediction_logits, expected)
    written = json.loads((tmp_path / "patched" / "config.json").read_text())
    assert written["architectures"] == ["BertForPreTraining"]


def test_11_one_sequence_one_token_and_shapes_that_change_every_step():
    model, patched = make("BertModel")
    model.eval()
    patched.eval()
    for batch, seqlen in ((1, 1), (1, 7), (3, 1), (2, 5), (3, 7)):
        ids = IDS[:batch, :seqlen]
        expected, output = model(ids), patched(ids)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(output.pooler_output, expected.pooler_output)


def test_12_names_that_wrapping_goes_by_are_there_and_no_parameter_is_unused():
    _, patched = make()
    names = {type(module).__name__ for module in patched.modules()}
    assert {"BertEmbeddings", "BertLayer"} <= names
    assert {"BertEmbeddings", "BertLayer"} <= {
        type(module).__name__ for module in fastbert.BertModel(patched.config).modules()
    }
    patched(**PADDED, labels=IDS).loss.backward()
    assert [name for name, p in patched.named_parameters() if p.grad is None] == []
    ours = fastbert.BertForMaskedLM(patched.config)
    ours(**PADDED, labels=IDS).loss.backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_13_hidden_act_is_followed_exactly(hidden_act):
    model, patched = make("BertModel", hidden_act=hidden_act)
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # wide, so that erf and tanh differ by far more than noise
    model = model.double().eval()
    ours = fastbert.BertModel(fastbert.BertConfig(**SHAPE, hidden_act=hidden_act)).double()
    expected = model(IDS).last_hidden_state
    for one in (patched.double(), ours):
        one.load_state_dict(model.state_dict())
        output = one.eval()(IDS).last_hidden_state
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["bert", "whole-word", "span"])
def test_14_masking_takes_pieces_of_an_unspaced_sentence_and_heeds_seed_zero(scheme):
    specials = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
    tokens = 40_000  # one sentence without a space
    ids = np.arange(tokens) % 30 + 5
    masked = {}
    for seed in (0, 1):
        where = (np.zeros(tokens, np.int64), np.arange(tokens))
        every = np.ones(tokens, bool)
        masking = make_masking(scheme, specials, 37)
        masked[seed], labels = masking(Tokens(ids, *where, every, every), seed=seed, epoch=0)
        chosen = labels != -100
        assert chosen.mean() == pytest.approx(0.15)
        assert (masked[seed][chosen] == specials.mask).mean() == pytest.approx(0.8, abs=0.05)
        assert (masked[seed][chosen] == ids[chosen]).mean() == pytest.approx(0.1, abs=0.04)
    assert (masked[0] != masked[1]).any()
