"""LAMB and AdamW with sixteen times the default batch: a tiny BERT, five learning rates each."""

import dataclasses
import tempfile
from pathlib import Path

from benchmarks.results import Options, Results
from fastbert.check import InputError
from fastbert.config.pretrain import PretrainConfig
from fastbert.train.pretrain import pretrain

TIMES = 16  # PretrainConfig's default batch_tokens
RATES = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "lamb": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
}


def run(options: Options, results: Results) -> None:
    """Measures the part "large_batch": the final held-out loss by optimizer and learning rate."""
    base = PretrainConfig(
        preset="tiny",
        steps=200,
        eval_every=200,
        log_every=100,
        save_every=200,
        precision=options.precision,
    )
    base = dataclasses.replace(base, batch_tokens=TIMES * base.batch_tokens)
    if options.quick:
        base = dataclasses.replace(
            base, steps=3, eval_every=3, eval_batches=2, batch_tokens=2048, vocab_size=1000
        )
    for optimizer, rates in RATES.items():
        for rate in rates:
            config = dataclasses.replace(base, optimizer=optimizer, learning_rate=rate)
            case = {"optimizer": optimizer, "learning_rate": rate, "steps": base.steps}
            case |= {"batch_tokens": base.batch_tokens, "preset": base.preset}
            with tempfile.TemporaryDirectory() as directory:
                try:
                    summary = pretrain(config, Path(directory))
                except InputError as error:  # diverged: gradients are not finite, step after step
                    results.add("large_batch", case, final=None, reason=str(error))
                    continue
            results.add(
                "large_batch",
                case,
                final=summary["heldout_mlm_loss"],
                baseline=summary["unigram_baseline"],
                skipped_steps=summary["skipped_steps"],
                seconds=summary["seconds"],
            )
