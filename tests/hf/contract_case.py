"""A model of either kind, a batch with labels at padding, and the loss that it should have.

The expected loss is written out here, from an unpatched model in float64 that sees each sequence
alone, without padding.
"""

from typing import Any

import torch
import torch.nn.functional as F

import fastbert
from tests.hf.cases import Case, build

LENGTHS, WIDTH = (7, 3, 5, 4), 7
HEADS = (
    *("MaskedLM", "TokenClassification", "QuestionAnswering", "SequenceClassification"),
    *("regression", "multi_label_classification", "MultipleChoice"),
)
BERTS_OWN = ("PreTraining", "NextSentencePrediction")
BY_TOKEN = ("MaskedLM", "TokenClassification", "QuestionAnswering", "Discriminator")


class Subject:
    """A model, the unpatched one with the same weights, and a batch for both."""

    def __init__(self, model, side="right", training=True):
        self.kind, family, self.head = model
        kind, problem = f"For{self.head}", None
        if self.head in HEADS[4:6]:
            kind, problem = "ForSequenceClassification", self.head
        kind = kind.replace("Discriminator", "PreTraining")
        self.theirs, self.model = build(Case(family, kind, problem=problem, training=training))
        if self.kind == "own":
            config = fastbert.BertConfig.from_dict(self.theirs.config.to_dict())
            self.model = getattr(fastbert, f"Bert{kind}")(config).double().train(training)
            self.model.load_state_dict(self.theirs.state_dict())
        torch.manual_seed(1)
        self.side, self.family = side, family
        lengths = torch.tensor(LENGTHS)[:, None]
        column = torch.arange(WIDTH)
        self.real = column < lengths if side == "right" else column >= WIDTH - lengths
        pad = self.theirs.config.pad_token_id
        self.inputs = {
            "input_ids": torch.randint(5, 37, self.real.shape).masked_fill(~self.real, pad),
            "attention_mask": self.real.long(),
        }
        self.targets = self.make_targets()

    def make_targets(self) -> dict[str, torch.Tensor]:
        words = torch.randint(0, 3, self.real.shape)
        words[torch.rand(words.shape) < 0.3] = -100
        pairs = torch.tensor([0, 1, -100, 1])
        if self.head == "QuestionAnswering":  # real, at padding, before the first and beyond
            starts, ends = [2, 4, -1, 3], [9, 1, 4, 5]
            return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
        if self.head == "PreTraining":
            return {"labels": words, "next_sentence_label": pairs}
        labels: dict[str, Any] = {
            "Discriminator": torch.randint(0, 2, self.real.shape),
            "SequenceClassification": torch.tensor([2, 0, -100, 1]),
            "NextSentencePrediction": pairs,
            "regression": torch.randn(4, 3).double(),
            "multi_label_classification": torch.randint(0, 2, (4, 3)).double(),
            "MultipleChoice": torch.tensor([1, 0]),
        }
        return {"labels": labels.get(self.head, words)}

    def __call__(self, rows=slice(None), targets=None, **options):
        """The model on some rows of the batch, with its targets or others."""
        arguments = self.inputs
        if self.head == "MultipleChoice":
            arguments = {name: x.unflatten(0, (2, 2)) for name, x in arguments.items()}
        arguments = arguments | (self.targets if targets is None else targets)
        return self.model(**{name: x[rows] for name, x in arguments.items()}, **options)

    def scores(self) -> list[dict[str, torch.Tensor]]:
        """The unpatched model's output of each sequence alone."""
        found = []
        for row, real in enumerate(self.real):
            ids = self.inputs["input_ids"][row, real]
            options = {}
            if self.side == "left" and self.family in ("Bert", "Electra", "DistilBert"):
                options["position_ids"] = torch.arange(WIDTH)[real][None]
            if self.head == "MultipleChoice":
                ids = ids[None]
            found.append(dict(self.theirs(ids[None], **options)))
        return found

    def terms(self) -> list[torch.Tensor]:
        """The losses (n,) of all labelled items; two lists of them for pairs and for spans."""
        scores = self.scores()

        def nll(rows, targets):
            kept = [(x, y) for x, y in zip(rows, targets, strict=True) if y != -100]
            return torch.stack([-x.log_softmax(-1)[y] for x, y in kept])

        if self.head == "QuestionAnswering":
            return [self.span_term(scores, name) for name in ("start", "end")]
        labels = self.targets["labels"]
        if self.head == "MultipleChoice":
            return [nll(torch.cat([s["logits"] for s in scores]).view(2, 2), labels)]
        if self.head in ("MaskedLM", "TokenClassification", "PreTraining", "Discriminator"):
            name = "prediction_logits" if self.head == "PreTraining" else "logits"
            by_token = torch.cat([s[name].flatten(0, 1) for s in scores])
            if self.head == "Discriminator":
                by_token = torch.cat([s["logits"].flatten() for s in scores])
                targets = labels[self.real].double()
                return [F.binary_cross_entropy_with_logits(by_token, targets, reduction="none")]
            words = nll(by_token, labels[self.real])
            if self.head != "PreTraining":
                return [words]
            pairs = [s["seq_relationship_logits"][0] for s in scores]
            return [words, nll(pairs, self.targets["next_sentence_label"])]
        logits = torch.cat([s["logits"] for s in scores])
        if self.head == "regression":
            return [((logits - labels) ** 2).flatten()]
        if self.head == "multi_label_classification":
            p = logits.sigmoid()
            return [-(labels * p.log() + (1 - labels) * (1 - p).log()).flatten()]
        return [nll(logits, labels)]

    def span_term(self, scores, name):
        """The answers at real tokens; padding has no part in the softmax."""
        found = []
        for row, column in enumerate(self.targets[f"{name}_positions"].clamp(min=0)):
            if column >= WIDTH or not self.real[row, column]:
                continue
            if self.side == "left":
                column = column - (WIDTH - LENGTHS[row])
            found.append(-scores[row][f"{name}_logits"][0].log_softmax(0)[column])
        return torch.stack(found)

    def expected(self, terms, num_items=None) -> torch.Tensor:
        """The loss that these terms make; num_items counts labels at padding too."""
        if num_items and self.head in (*BY_TOKEN[:2], "Discriminator", "PreTraining"):
            counted = self.targets["labels"] != -100
            num_items = num_items * (counted & self.real).sum().double() / counted.sum()
        if num_items is None:
            loss = sum(term.mean() for term in terms)
        elif self.head == "PreTraining":
            words, pairs = terms
            loss = (words.sum() + pairs.mean() * len(words)) / max(float(num_items), 1)
        else:
            loss = sum(term.sum() for term in terms) / max(float(num_items), 1)
        return loss / len(terms) if self.head == "QuestionAnswering" else loss

    def nothing(self) -> list[dict[str, torch.Tensor]]:
        """Targets of which none counts, in the ways there are."""
        if self.head == "QuestionAnswering":
            beyond = {name: torch.full_like(x, WIDTH) for name, x in self.targets.items()}
            padding = (~self.real).long().argmax(1) + WIDTH * self.real.all(1)
            return [beyond, dict.fromkeys(self.targets, padding)]
        ignored = {name: torch.full_like(x, -100) for name, x in self.targets.items()}
        if self.head not in BY_TOKEN and self.head != "PreTraining":
            return [ignored]
        return [ignored, ignored | {"labels": torch.ones(self.real.shape).long() - 101 * self.real}]

    def assert_near(self, found, expected, name="loss"):
        """ELECTRA's discriminator, alone, has a loss that Hugging Face makes in float32."""
        rtol = 1e-6 if self.head == "Discriminator" else 1e-9
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=rtol, atol=rtol / 10,
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip

    def gradients(self, loss) -> dict[str, torch.Tensor]:
        """Of the model that is tested."""
        return gradients(self.model, loss)

    def assert_same_gradients(self, found, expected):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            self.assert_near(gradient, expected[name], name)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Of all parameters, zeros where there is none; `loss` may be differentiated again."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name: torch.zeros_like(x) if x.grad is None else x.grad.clone()
        for name, x in model.named_parameters()
    }
