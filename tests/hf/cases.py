"""One case is a tiny model, patched and unpatched, a batch, and how it is called."""

import copy
import dataclasses
from typing import Any

import torch
import transformers

import fastbert
from tests.hf.changes import CHANGES
from tests.versions import IS_V4

# 4.57 has no sdpa for ELECTRA, takes no 4-D mask, and no list of layers as output_hidden_states
_SHAPES = {
    "vocab_size": 37,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 24,
}
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert")
KINDS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
BERT_KINDS = (*KINDS, "ForPreTraining", "ForNextSentencePrediction")
MASKS = ("none", "int", "bool", "float", "4-D bool", "4-D additive", "causal", "bias")
# What these read from the first column is not the first token under left padding: a difference that
# is meant where there is a pooler, and of no use to anybody where there is none.
_FIRST_COLUMN = ("Sequence", "Multiple", "PreTraining", "NextSentence")


@dataclasses.dataclass(frozen=True)
class Case:
    """lengths: real tokens of each sequence; side: where the padding is, "right" or "left"; change:
    what the user does to both models, by its name in CHANGES; positional: how many arguments at
    most are given by place; leftover: whether a key of the tokenizer's is left in the batch."""

    family: str = "Bert"
    kind: str = "Model"
    heads: int = 2
    head_dim: int = 8
    layers: int = 2
    hidden_act: str = "gelu"
    lengths: tuple[int, ...] = (7, 3, 5)
    side: str = "right"
    mask: str = "int"
    dtype: torch.dtype = torch.float64
    training: bool = True
    checkpointing: bool = False
    attention: str = "sdpa"
    from_embeddings: bool = False
    token_types: bool = True
    positions: bool = False
    states: bool = False
    return_dict: bool = True
    problem: str | None = None
    change: str | None = None
    padding: str = "skip"
    positional: int = 0
    leftover: bool = False
    seed: int = 0


def build(case: Case) -> tuple[Any, Any]:
    """The unpatched model and its patched copy."""
    torch.manual_seed(case.seed)
    attention = "eager" if IS_V4 and case.family == "Electra" else case.attention
    options: dict[str, Any] = {"attn_implementation": attention, "num_labels": 3}
    if case.kind == "ForQuestionAnswering":
        options["num_labels"] = 2
    if case.problem:
        options["problem_type"] = case.problem
    if case.family == "DistilBert":
        options |= {
            "vocab_size": 37,
            "dim": case.heads * case.head_dim,
            "n_heads": case.heads,
            "n_layers": case.layers,
            "hidden_dim": 20,
            "activation": case.hidden_act,
            "max_position_embeddings": 24,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "qa_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        }
    else:
        options |= _SHAPES | {
            "hidden_size": case.heads * case.head_dim,
            "num_attention_heads": case.heads,
            "num_hidden_layers": case.layers,
            "intermediate_size": 20,
            "hidden_act": case.hidden_act,
        }
    if case.family in ("Roberta", "XLMRoberta", "Camembert"):
        options["pad_token_id"] = 1
    if case.family == "Electra":
        options |= {"embedding_size": 6, "summary_last_dropout": 0.0}
    config = getattr(transformers, f"{case.family}Config")(**options)
    model = getattr(transformers, case.family + case.kind)(config)
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    model = model.to(case.dtype).train(case.training)
    patched = fastbert.patch(copy.deepcopy(model), padding=case.padding)
    if case.change is not None:
        for one in (model, patched):
            CHANGES[case.change](one)
    if case.checkpointing:
        for one in (model, patched):
            one.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    return model, patched


def inputs(case: Case, model: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """The arguments of a call, and where its tokens are real, (B, S)."""
    batch, seqlen = len(case.lengths), max(case.lengths)
    column = torch.arange(seqlen)
    lengths = torch.tensor(case.lengths)[:, None]
    real = column < lengths if case.side == "right" else column >= seqlen - lengths
    if case.mask == "none":
        real = torch.ones_like(real)
    pad = model.config.pad_token_id or 0
    ids = torch.randint(5, 37, (batch, seqlen)).masked_fill(~real, pad)
    arguments: dict[str, Any] = {"input_ids": ids}
    if case.from_embeddings:
        words = model.get_input_embeddings()
        table = getattr(words, "inner", words).weight.detach()
        arguments = {"inputs_embeds": table[ids].clone().requires_grad_()}
    if case.token_types and case.family in ("Bert", "Electra"):
        arguments["token_type_ids"] = torch.randint(0, 2, (batch, seqlen))
    if case.positions and "Multiple" not in case.kind:
        arguments["position_ids"] = torch.randint(2, 24, (batch, seqlen))
    attention_mask = _mask(case, real, model)
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    arguments |= _labels(case, real)
    if case.kind == "ForMultipleChoice":
        choices = {"input_ids", "inputs_embeds", "token_type_ids", "attention_mask"}
        arguments = {
            name: value[None] if name in choices else value for name, value in arguments.items()
        }
    if case.states:
        arguments["output_hidden_states"] = True
    if not case.return_dict:
        arguments["return_dict"] = False
    if case.leftover:
        arguments["special_tokens_mask"] = (~real).long()
    return arguments, real


def _mask(case: Case, real: torch.Tensor, model: Any) -> torch.Tensor | None:
    batch, seqlen = real.shape
    kinds = {"none": None, "int": real.long(), "bool": real, "float": real.to(case.dtype)}
    if case.mask in kinds:
        return kinds[case.mask]
    square = real[:, None, None].expand(batch, 1, seqlen, seqlen)
    lowest = torch.finfo(case.dtype).min
    if case.mask == "4-D bool":
        return square
    if case.mask == "4-D additive":
        return torch.zeros(square.shape, dtype=case.dtype).masked_fill(~square, lowest)
    if case.mask == "causal":
        # each token sees itself, so that no row is empty
        keep = square & torch.ones(seqlen, seqlen).tril().bool() | torch.eye(seqlen).bool()
        return torch.zeros(keep.shape, dtype=case.dtype).masked_fill(~keep, lowest)
    bias = torch.randn(batch, case.heads, seqlen, seqlen, dtype=case.dtype)
    return bias.masked_fill(~square, lowest)


def _labels(case: Case, real: torch.Tensor) -> dict[str, torch.Tensor]:
    batch = real.shape[0]
    by_token = torch.where(
        (torch.rand(real.shape) < 0.4) & real, torch.randint(0, 3, real.shape), -100
    )
    # one at least: of none at all, Hugging Face's mean is NaN and ours 0
    by_token.view(-1)[real.flatten().nonzero()[0]] = 1
    if case.kind == "Model":
        return {}
    if case.kind in ("ForMaskedLM", "ForTokenClassification"):
        return {"labels": by_token}
    if case.kind == "ForPreTraining":
        return {"labels": by_token, "next_sentence_label": torch.randint(0, 2, (batch,))}
    if case.kind == "ForQuestionAnswering":
        return {name: torch.zeros(batch).long() for name in ("start_positions", "end_positions")}
    if case.kind == "ForMultipleChoice":
        return {"labels": torch.tensor([batch - 1])}
    if case.kind == "ForNextSentencePrediction":
        return {"labels": torch.randint(0, 2, (batch,))}
    if case.problem == "regression":
        return {"labels": torch.randn(batch, 3, dtype=case.dtype)}
    if case.problem == "multi_label_classification":
        return {"labels": torch.randint(0, 2, (batch, 3)).to(case.dtype)}
    return {"labels": torch.randint(0, 3, (batch,))}


def is_comparable(case: Case) -> bool:
    """Whether all that the call gives is meant to be Hugging Face's."""
    skips = case.mask != "none" and len(set(case.lengths)) > 1 and case.padding == "skip"
    if case.side == "left" and skips and any(name in case.kind for name in _FIRST_COLUMN):
        return False
    if case.side == "left" and skips and case.kind == "Model" and not case.return_dict:
        return False  # its pooler's output has no name to be left out by
    if "QuestionAnswering" in case.kind and skips:
        return False  # Hugging Face's softmax runs over the padded places too
    if IS_V4 and (
        case.leftover or case.mask in MASKS[4:] or (case.positions and case.family == "DistilBert")
    ):
        return False
    if case.mask == "4-D bool" and case.attention == "eager":
        return False  # Hugging Face adds the zeros and ones to the scores
    return not (case.kind == "ForMultipleChoice" and case.mask not in MASKS[:4])
