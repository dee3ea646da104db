"""A Hugging Face model, fastbert's own of the same weights, and a batch with padding for both."""

import copy

import torch
import transformers
from torch.utils import _pytree as pytree

import fastbert

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 2,
}
MASK = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
IDS = torch.arange(3, 24).view(3, 7) * MASK
WORDS = torch.tensor([[1, 0, -100, 1, 1, 0, -100], [0, 1, 1] + [-100] * 4, [-100] * 7])
PAIRS = torch.tensor([0, 1, 1])
LABELS = {
    "Model": {},
    "ForSequenceClassification": {"labels": PAIRS},
    "ForTokenClassification": {"labels": WORDS},
    "ForQuestionAnswering": {},  # whose loss differs on purpose
    "ForMaskedLM": {"labels": WORDS},
    "ForPreTraining": {"labels": WORDS, "next_sentence_label": PAIRS},
    "ForNextSentencePrediction": {"labels": PAIRS},
    "ForMultipleChoice": {"labels": torch.tensor([1])},
}
UNWRAPPED = "attention.self.dropout"  # whose probability Hugging Face reads


def make(head, kind="own"):
    """Hugging Face's model, and fastbert's own of the same weights or the same model patched."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE)
    theirs = getattr(transformers, f"Bert{head}")(config)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if kind == "patched":
        return theirs, fastbert.patch(copy.deepcopy(theirs))
    own = getattr(fastbert, f"Bert{head}")(config)
    own.load_state_dict(theirs.state_dict())
    return theirs, own


def doubled(values):
    return pytree.tree_map(lambda x: x * 2 if torch.is_tensor(x) and x.is_floating_point() else x,
                           values)  # fmt: skip


def after(module, args, output):
    if isinstance(output, dict):
        for name in list(output):
            output[name] = doubled(output[name])
        return output
    return (doubled(output[0]), *output[1:]) if isinstance(output, tuple) else doubled(output)
