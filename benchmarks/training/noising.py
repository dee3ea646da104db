"""Masking schemes compared: the same small pre-training run with each, on the default corpus.

Only the masking of the training data differs; all are measured on the same held-out text under
BERT's own masking.
"""

import dataclasses
import tempfile
from pathlib import Path

import torch

from benchmarks.results import Options, Results
from fastbert.config.pretrain import PretrainConfig
from fastbert.train import state
from fastbert.train.pretrain import pretrain

SCHEMES = ("bert", "blank", "unigram", "bigram-kn")

# The share of targets that is changed; for bigram-kn a factor, which changes 72 % of them on the
# default corpus of Python 3.11.
GAMMA = {"blank": 0.8, "unigram": 0.8, "bigram-kn": 4.0}


def heldout_losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of each validation of a finished run."""
    history = torch.load(run / "latest" / state.STATE)["state"]["history"]
    return [(row["step"], row["heldout_mlm_loss"]) for row in history if "heldout_mlm_loss" in row]


def run(options: Options, results: Results) -> None:
    """Measures the part "noising": held-out losses of the schemes, for several seeds each."""
    base = PretrainConfig(preset="mini", steps=1500, eval_every=150, log_every=150, save_every=1500)
    seeds = 3
    if options.quick:
        base = PretrainConfig(
            preset="tiny", steps=6, eval_every=3, eval_batches=2, batch_tokens=512, vocab_size=1000
        )
        seeds = 1
    for seed in range(seeds):
        for scheme in SCHEMES:
            config = dataclasses.replace(
                base,
                seed=seed,
                masking=scheme,
                gamma=GAMMA.get(scheme, base.gamma),
                precision=options.precision,
            )
            with tempfile.TemporaryDirectory() as directory:
                summary = pretrain(config, Path(directory))
                losses = heldout_losses(Path(directory))
            results.add(
                "noising",
                {"scheme": scheme, "gamma": GAMMA.get(scheme), "seed": seed, "steps": base.steps},
                heldout=losses,
                final=losses[-1][1],
                baseline=summary["unigram_baseline"],
                seconds=summary["seconds"],
            )
