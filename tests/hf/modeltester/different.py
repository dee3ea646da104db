"""The tests of transformers that a patched class fails on purpose, and why.

All for padding, of which the mixin's batch has some. The suite runs each once more without any, as
`<name>_without_padding`, and that must pass.
"""

DIFFERENT = {
    "test_feed_forward_chunking": (
        "compares with chunk_size_feed_forward=1, which is Hugging Face's own forward: the packed "
        "one has zeros at padded positions"
    ),
    "test_torch_fx": (
        "4.57 only: compares with a traced graph, which is of Hugging Face's own forward: the "
        "packed one has zeros at padded positions"
    ),
    "test_torch_fx_output_loss": "as test_torch_fx",
}

# 4.57 only. torch.fx rewrites the code of a forward that takes **kwargs, as this one's does, and so
# cannot trace one with any wrapper around it: "co_varnames is too small". `unpatch` before tracing.
UNTRACEABLE = ("BertForNextSentencePrediction",)
