"""Each task's models with the same weights, and its batch padded right or left, or packed."""

import torch
import torch.nn.functional as F
import transformers

import fastbert
from tests.models.parity import SHAPE

LENGTHS = (13, 1, 29, 7)
WIDTH = 29
REAL = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
POSITIONS = torch.arange(WIDTH).expand_as(REAL)

SINGLE = {"labels": torch.tensor([2, 0, -100, 1])}
NUMBERS = {"labels": torch.tensor([[0.5, 1.0, -2.0]] * 3 + [[1.0, 0.0, 3.0]])}
BINARY = {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])}
GENERATOR = torch.Generator().manual_seed(0)
MASKED = REAL & (torch.rand(REAL.shape, generator=GENERATOR) < 0.4)
WORDS = {"labels": torch.randint(0, 3, REAL.shape, generator=GENERATOR).where(MASKED, -100)}
CASES = {
    "single label": ("SequenceClassification", {"problem_type": "single_label"}, SINGLE),
    "single label, inferred": ("SequenceClassification", {}, SINGLE),
    "multi-label": ("SequenceClassification", {"problem_type": "multi_label"}, BINARY),
    "multi-label, inferred": ("SequenceClassification", {}, BINARY),
    "regression": ("SequenceClassification", {"problem_type": "regression"}, NUMBERS),
    "regression, inferred": (
        *("SequenceClassification", {"num_labels": 1}),
        {"labels": torch.tensor([0.5, 2.0, -1.0, 0.0])},
    ),
    "tokens": ("TokenClassification", {}, WORDS),
    "next sentence": ("NextSentencePrediction", {}, {"labels": torch.tensor([0, 1, 1, -100])}),
    "choice": ("MultipleChoice", {}, {"labels": torch.tensor([1, 0])}),
    "words": ("MaskedLM", {}, WORDS),
    "pre-training": (
        *("PreTraining", {}),
        {**WORDS, "next_sentence_label": torch.tensor([0, 1, -100, 0])},
    ),
    "span": (
        *("QuestionAnswering", {"num_labels": 2}),
        {
            "start_positions": torch.tensor([3, 0, 40, -1]),
            "end_positions": torch.tensor([12, 0, 28, 6]),
        },
    ),
}


def make_models(name: str, dtype: torch.dtype = torch.float32):
    """Hugging Face's and ours, with the same weights, in training mode without dropout."""
    head, changes, _ = CASES[name]
    changes = {"num_labels": 3, **changes}
    if changes.get("problem_type", "").endswith("label"):
        changes["problem_type"] += "_classification"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SHAPE, **changes, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )
    theirs = getattr(transformers, f"BertFor{head}")(config).to(dtype).train()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = getattr(fastbert, f"BertFor{head}")(fastbert.BertConfig.from_dict(config.to_dict()))
    ours = ours.to(dtype).train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(1, 99, REAL.shape) * REAL,
        "attention_mask": REAL.long(),
        "token_type_ids": torch.randint(0, 2, REAL.shape),
    }


def to_the_right(x: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """The same sequences, padded on the left."""
    rows = [F.pad(row[:n], (WIDTH - n, 0), value=fill) for row, n in zip(x, LENGTHS, strict=True)]
    return torch.stack(rows)


def in_form(form: str, name: str, inputs, targets):
    """The arguments for our model, and what makes of its token scores those of real tokens."""
    if form == "packed":
        by_token = {k: v[REAL] for k, v in targets.items() if v.shape == REAL.shape}
        pair = {"next_sentence_label"} & targets.keys()
        batch = fastbert.PackedBatch(
            input_ids=inputs["input_ids"][REAL],
            token_type_ids=inputs["token_type_ids"][REAL],
            position_ids=POSITIONS[REAL],
            cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
            max_seqlen=WIDTH,
            **by_token,
            **{key: targets[key] for key in pair},
        )
        rest = {k: v for k, v in targets.items() if k not in by_token and k not in pair}
        rest |= {"num_choices": 2} if name == "choice" else {}
        return {"input_ids": batch, **rest}, lambda x: x
    real = REAL
    if form == "left":
        inputs = {k: to_the_right(v) for k, v in inputs.items()}
        inputs["position_ids"] = to_the_right(POSITIONS)
        real = inputs["attention_mask"].bool()
        targets = {
            k: to_the_right(v, -100) if v.shape == REAL.shape else v for k, v in targets.items()
        }
        if name == "span":
            shift = WIDTH - torch.tensor(LENGTHS)
            targets = {k: (v.clamp(min=0) + shift) for k, v in targets.items()}
    if name == "choice":
        inputs = {k: v.unflatten(0, (2, 2)) for k, v in inputs.items()}
    return {**inputs, **targets}, lambda x: x[real]
