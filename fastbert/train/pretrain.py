"""Pre-training from raw text: MLM and next-sentence prediction over packed batches."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.config import PRESETS, BertConfig, PretrainConfig
from fastbert.data import loader
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining
from fastbert.packing import PackedBatch
from fastbert.train import state as run_state
from fastbert.train.objective import Metrics, PretrainingObjective
from fastbert.train.optimizer import make_optimizer
from fastbert.train.prepare import TEXT, PreparedText, prepare_text
from fastbert.train.profiling import Unprofiled, profiling
from fastbert.train.report import Reporter, console, environment, plot_losses
from fastbert.train.step import make_step

RUN = "run.json"
SUMMARY = "summary.json"


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    eager: bool = False,
    profile: bool = False,
) -> dict[str, Any]:
    """Runs, or with `resume` continues, the pre-training that `config` describes, in `out`.

    Leaves out/latest, a checkpoint that Hugging Face loads, loss.png, summary.json (which is
    returned) and TensorBoard's files. The same config gives the same run, bit for bit on a CPU at
    the same number of threads, also through any number of kills and resumptions. On a GPU steps
    are replayed as a CUDA graph, unless `eager`; `profile` leaves out/profile, see `profiling`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(config, precision=_precision(config.precision))
    is_new = _open_run(config, out, resume=resume)
    run_state.discard_partial(out)
    torch.manual_seed(config.seed)
    try:
        text = prepare_text(config, out)
    except InputError:
        if is_new:
            _abandon(out)
        raise
    kind = BertForPreTraining if config.objective == "mlm+nsp" else BertForMaskedLM
    model = kind(
        BertConfig(
            **PRESETS[config.preset].shape,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            vocab_size=text.tokenizer.get_vocab_size(),
            max_position_embeddings=max(512, config.max_seq_len),
        )
    ).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    state = run_state.TrainingState(text.fingerprint)
    if (
        out / checkpoint.LATEST
    ).is_symlink():  # a dangling link is a lost checkpoint, not a new run
        state = run_state.load(out, model, optimizer)
        if state.text != text.fingerprint:
            raise InputError(f"{out}: the corpus or the tokenizer has changed since the run began")
        console.print(f"resuming {out} at step {state.step} of {config.steps}")
    _describe(model, config, device)
    _train(model, optimizer, config, text, state, out, device, eager=eager, profile=profile)
    return _finish(state, config, text, out, device)


def _open_run(config: PretrainConfig, out: Path, *, resume: bool) -> bool:
    """Claims the directory `out`; True unless it holds a run already, which is to be continued."""
    path = out / RUN
    if not path.exists():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: {error.strerror}") from None
        run_state.write_json(path, config.to_json())
        return True
    if not resume:
        raise InputError(f"--out {out}: holds a run already; --resume continues it")
    earlier = read_run(out)
    assert earlier is not None
    earlier.same_run(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    return False


def _abandon(out: Path) -> None:
    """Takes back a claim on a directory in which nothing was trained."""
    (out / RUN).unlink()
    shutil.rmtree(out / TEXT, ignore_errors=True)
    with contextlib.suppress(OSError):  # the directory was there before, with other things in it
        out.rmdir()


def read_run(out: Path) -> PretrainConfig | None:
    """The options of the run in `out`, None if there is none."""
    path = out / RUN
    if not path.exists():
        return None
    try:
        return PretrainConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a run's options ({error})") from None


def _train(
    model: BertForPreTraining | BertForMaskedLM,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    text: PreparedText,
    state: run_state.TrainingState,
    out: Path,
    device: torch.device,
    *,
    eager: bool,
    profile: bool,
) -> None:
    objective = PretrainingObjective(model, config.nsp_weight)
    precision = _autocast(config.precision, device)
    train_step = make_step(objective, optimizer, config, text.training, device, eager=eager)
    batches = loader(
        text.training,
        state.step,
        config.steps,
        micro_batches=config.accumulation,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    sums = torch.zeros(len(Metrics._fields), device=device)
    tokens = 0
    before = state.seconds
    started = reported = time.perf_counter()
    with (
        Reporter(out, start=state.step, steps=config.steps) as reporter,
        profiling(out, config.steps - state.step, device) if profile else Unprofiled() as profiler,
    ):
        for step, parts in zip(range(state.step, config.steps), batches, strict=True):
            sums += train_step(step, parts, text.training.targets(step))
            tokens += sum(part.num_tokens for part in parts)
            profiler.step()

            state.step = step + 1
            reporter.advance()
            done = state.step == config.steps
            saving = done or state.step % config.save_every == 0
            # what is reported before a checkpoint need not be in it, so a resumed run reports alike
            if saving or state.step % config.log_every == 0:
                metrics = Metrics(*sums.tolist())  # the only place where the host waits
                now = time.perf_counter()
                row = _row(state.step, metrics, config.nsp_weight, tokens / (now - reported))
                if not math.isfinite(row["loss"]):
                    raise InputError(
                        f"the loss is not finite at step {state.step}, and the last checkpoint is "
                        "from before; start a new run with a smaller --learning-rate"
                    )
                state.history.append(row)
                state.real_tokens += tokens
                state.seconds = before + now - started
                per_step = state.seconds / state.step
                reporter.training(row, per_step * (config.steps - state.step))
                sums.zero_()
                tokens, reported = 0, now
            if done or state.step % config.eval_every == 0:
                evaluating = time.perf_counter()
                state.history.append(_evaluate(objective, text.heldout, precision, state, device))
                reporter.validation(state.history[-1])
                reported += time.perf_counter() - evaluating
            if saving:
                state.seconds = before + time.perf_counter() - started
                run_state.save(out, model, text.tokenizer, optimizer, state)


def _row(
    step: int, metrics: Metrics, nsp_weight: float, tokens_per_second: float
) -> dict[str, float]:
    return {
        "step": step,
        "loss": metrics.mlm_loss + nsp_weight * metrics.nsp_loss,
        "mlm_loss": metrics.mlm_loss,
        "mlm_accuracy": metrics.mlm_accuracy,
        **_of_pairs(metrics),
        "real_tokens_per_second": tokens_per_second,
    }


def _of_pairs(metrics: Metrics) -> dict[str, float]:
    if not metrics.num_pairs:
        return {}
    return {"nsp_loss": metrics.nsp_loss, "nsp_accuracy": metrics.nsp_accuracy}


@torch.no_grad()
def _evaluate(
    objective: PretrainingObjective,
    batches: list[PackedBatch],
    precision: contextlib.AbstractContextManager,
    state: run_state.TrainingState,
    device: torch.device,
) -> dict[str, float]:
    """The metrics of the held-out batches, every one of them once."""
    objective.eval()
    sums = torch.zeros(len(Metrics._fields), device=device)
    for batch in batches:
        with precision:
            sums += objective(batch.to(device), 1, 1).sums
    objective.train()
    metrics = Metrics(*sums.tolist())
    return {
        "step": state.step,
        "heldout_mlm_loss": metrics.mlm_loss,
        "mlm_accuracy": metrics.mlm_accuracy,
        **_of_pairs(metrics),
    }


def _finish(
    state: run_state.TrainingState,
    config: PretrainConfig,
    text: PreparedText,
    out: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Writes the plot and the summary of a finished run and prints its result."""
    heldout = next(row for row in reversed(state.history) if "heldout_mlm_loss" in row)
    summary = {
        "heldout_mlm_loss": heldout["heldout_mlm_loss"],
        "unigram_baseline": text.baseline,
        "mlm_accuracy": heldout["mlm_accuracy"],
        "nsp_accuracy": heldout.get("nsp_accuracy"),
        "real_tokens_per_second": state.real_tokens / state.seconds,
        "steps": state.step,
        "seconds": state.seconds,
        "checkpoint": f"checkpoint-{state.step}",
        **environment(device),
    }
    run_state.write_json(out / SUMMARY, summary)
    plot_losses(state.history, text.baseline, out / "loss.png")
    gained = text.baseline - summary["heldout_mlm_loss"]
    console.print(
        f"held-out MLM loss {summary['heldout_mlm_loss']:.3f} nats, unigram baseline "
        f"{text.baseline:.3f}: {abs(gained):.3f} {'below' if gained >= 0 else 'ABOVE'} it\n"
        f"{state.step} steps in {state.seconds:.0f} s; checkpoint, plot and summary are in {out}\n"
        f'try: fastbert fill-mask --model {out} "a short text with one [MASK] in it"'
    )
    return summary


def _describe(model: nn.Module, config: PretrainConfig, device: torch.device) -> None:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{config.preset}: {size:.1f} M parameters, {config.batch_tokens} tokens a step, on "
        f"{device.type} in {config.precision}"
    )


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _precision(wanted: str) -> str:
    """What `auto` stands for: bf16 where this machine multiplies in it, else fp32."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"
