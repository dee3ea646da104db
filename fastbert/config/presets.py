"""Named architectures for pre-training, with training options that suit them."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """An architecture, with training options that suit it.

    The small presets are for runs of minutes on a few million tokens. Such runs need no dropout,
    cannot learn from long contexts, and a next-sentence loss at full weight adds too much noise.
    """

    shape: dict[str, Any]
    learning_rate: float
    dropout: float
    max_seq_len: int
    nsp_weight: float


def _shape(layers: int, hidden: int) -> dict[str, Any]:
    # every published BERT has a head_dim of 64 and a feed-forward layer four times as wide
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }


PRESETS = {
    "tiny": Preset(_shape(2, 128), 1e-3, dropout=0.0, max_seq_len=32, nsp_weight=0.1),
    "mini": Preset(_shape(4, 256), 1e-3, dropout=0.0, max_seq_len=32, nsp_weight=0.1),
    "base": Preset(_shape(12, 768), 1e-4, dropout=0.1, max_seq_len=128, nsp_weight=1.0),
    "large": Preset(_shape(24, 1024), 1e-4, dropout=0.1, max_seq_len=128, nsp_weight=1.0),
}


def nearest(width: int) -> str:
    """The preset whose hidden size is the nearest."""
    return min(PRESETS, key=lambda name: abs(PRESETS[name].shape["hidden_size"] - width))
