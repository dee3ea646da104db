"""A small Hugging Face model, a batch for it, and how near ours must come."""

import torch
import transformers

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
LENGTHS = (13, 1, 29, 7)
# relative to the largest entry of the tensor compared
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_batch(side: str = "right", seqlen: int = 29) -> dict[str, torch.Tensor]:
    size = (len(LENGTHS), seqlen)
    mask = torch.arange(seqlen) < torch.tensor(LENGTHS)[:, None]
    if side == "left":
        mask = mask.flip(1)
    labels = torch.randint(0, 99, size)
    masked = mask & (torch.rand(size) < 0.3)
    masked[2] |= mask[2]  # the loss must not be empty
    return {
        "input_ids": torch.randint(1, 99, size) * mask,
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(0, 2, size),
        "labels": labels.where(masked, -100),
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }


def hugging_face(dtype: torch.dtype, **changes) -> transformers.BertForPreTraining:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, **changes, attn_implementation="eager")
    model = transformers.BertForPreTraining(config).to(dtype)
    for parameter in model.parameters():  # biases and LayerNorm too, so that none can be dropped
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def assert_same(ours, theirs, dtype: torch.dtype, name: str, scale=0.0) -> None:
    error, scale = (ours - theirs).abs().max(), max(theirs.abs().max(), scale)
    assert error <= TOLERANCE[dtype] * scale, f"{name}: off by {error:.3g} of {scale:.3g}"


def assert_same_gradients(ours, theirs, dtype: torch.dtype, shifts=("key.bias",)) -> None:
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        # softmax ignores what all keys share, so the gradient of a key bias is 0 but for rounding
        source = name.replace("bias", "weight") if name.endswith(shifts) else name
        scale = expected[source].abs().max()
        assert_same(gradient, expected[name], dtype, name, scale)
