"""Pre-training from raw text, and the training loop that other kinds of runs share with it."""

import contextlib
import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastbert import checkpoint
from fastbert.check import InputError, require_libraries
from fastbert.config.pretrain import PretrainConfig
from fastbert.data import loader
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining
from fastbert.modules.products import fp8
from fastbert.system.console import console
from fastbert.system.files import require_apart, write_json
from fastbert.train import distributed
from fastbert.train import state as run_state
from fastbert.train.distributed import Ranks
from fastbert.train.evaluate import evaluate
from fastbert.train.optimizer import make_optimizer
from fastbert.train.precision import resolve_precision
from fastbert.train.prepare import CHANGED, PreparedText, prepare_text
from fastbert.train.profiling import profiling
from fastbert.train.recipe import Pretraining, Recipe, training_row
from fastbert.train.report import LIBRARIES, Nothing, Reporter, environment, plot_losses
from fastbert.train.run_directory import SUMMARY, opened, precision_of, stoppable
from fastbert.train.step import EagerStep, as_graph

MOST_SKIPPED = 20  # skipped steps in a row; halving fp16's scale from 2^16 to 1 takes only 16


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    eager: bool = False,
    profile: bool = False,
    parallel: str = "ddp",
) -> dict[str, Any]:
    """Runs the pre-training that `config` describes in the directory `out`; `resume` continues it.

    Writes out/latest, a checkpoint that Hugging Face loads, loss.png, summary.json (whose contents
    are returned) and TensorBoard's files. The same config gives the same run, even after kills and
    resumptions: bit for bit on a CPU with the same number of threads. On a GPU, steps are replayed
    as a CUDA graph unless `eager`; `profile` writes out/profile, see `profiling`.

    Under torchrun each process trains on its share of each batch, with `parallel` "ddp" or "fsdp";
    all processes must see the directory `out`. A run may be resumed with another number of
    processes, which changes the losses by rounding only.

    Raises InputError for options or a corpus that cannot be used, for an `out` that already has a
    run, and after 20 steps in a row whose gradients are not finite; Stopped after Ctrl-C.
    """
    recipe = Pretraining(config, checkpoint.latest(out) if resume else None)
    return carry_out(recipe, out, resume=resume, eager=eager, profile=profile, parallel=parallel)


def carry_out(
    recipe: Recipe, out: Path, *, resume: bool, eager: bool, profile: bool, parallel: str
) -> dict[str, Any]:
    """Trains the model of a recipe; arguments, results and errors are those of `pretrain`."""
    require_libraries(recipe.command, LIBRARIES, "train")
    config = recipe.config
    models = () if recipe.directory is None else (recipe.directory,)
    for option, directory in (("--out", out), ("--cache", config.cache)):
        if directory is not None:
            require_apart(option, directory, config.corpus, models)
    with distributed.joined() as ranks, ranks.claimed(out), stoppable(recipe, out):
        precision = resolve_precision(precision_of(config, out, resume=resume), trains=True)
        config = recipe.config = dataclasses.replace(config, precision=precision)
        distributed.require_kind(parallel)
        torch.manual_seed(config.seed)
        opening = opened(config, out, resume=resume) if ranks.is_first else contextlib.nullcontext()
        with opening:
            with ranks.first_goes_ahead():
                if ranks.is_first:
                    run_state.discard_partial(out)
                text = prepare_text(recipe.reading(), out, ranks.size)
            run = _set_up(recipe, text, out, ranks, parallel)
        _describe(run, parallel)
        _train(run, eager=eager, profile=profile)
        return _finish(run)


class _Run(NamedTuple):
    """A run that is set up; a checkpoint restores the fields from `model` on."""

    recipe: Recipe
    text: PreparedText
    out: Path
    ranks: Ranks
    model: BertForPreTraining | BertForMaskedLM
    step: EagerStep
    state: run_state.TrainingState

    def evaluated(self, objective: nn.Module) -> dict[str, float]:
        """`evaluate` of an objective's model on the held-out text."""
        batches, precision = self.text.heldout, self.recipe.config.precision
        return evaluate(objective, batches, precision, self.state.step, self.ranks)


def _set_up(recipe: Recipe, text: PreparedText, out: Path, ranks: Ranks, parallel: str) -> _Run:
    """Sets up a new run, or restores it from its last checkpoint."""
    config = recipe.config
    begun = checkpoint.latest(out)  # not the link, which may change before everything is read
    model = recipe.make_model(text.tokenizer.get_vocab_size()).to(ranks.device)
    if begun is not None:
        checkpoint.load_weights(model, checkpoint.read_weights(begun), begun)
    if config.precision == "fp8":
        fp8.enable(model)
    objective = distributed.parallelised(recipe.make_objective(model), parallel, ranks)
    optimizer = make_optimizer(model, config.weight_decay, config.optimizer)
    step = EagerStep(objective, optimizer, config, ranks.device, ranks.size)
    state = run_state.TrainingState(text.fingerprint, recipe.teacher)
    if begun is not None:
        state = run_state.load(begun, model, optimizer, step.scaler)
        if state.text != text.fingerprint:
            raise InputError(CHANGED.format(out))
        if state.teacher != recipe.teacher:
            raise InputError(f"{out}: the teacher has changed since the run began")
        console.print(f"resuming {out} at step {state.step} of {config.steps}")
    return _Run(recipe, text, out, ranks, model, step, state)


def _train(run: _Run, *, eager: bool, profile: bool) -> None:
    recipe, text, out, ranks, model, by_host, state = run
    config, device = recipe.config, ranks.device
    train_step = by_host if eager else as_graph(by_host, text.training)
    batches = loader(
        text.training,
        state.step,
        config.steps,
        rank=ranks.rank,
        world_size=ranks.size,
        micro_batches=config.accumulation,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    # since the last report: the sums, and the longest series of skipped steps
    totals = torch.zeros(len(dataclasses.fields(recipe.metrics)) + 1, device=device)
    sums, longest = totals[:-1], totals[-1]
    in_a_row = torch.zeros_like(longest)  # the current series of skipped steps
    tokens = 0
    before = state.seconds
    profiled = profile and ranks.is_first
    with (
        Reporter(out, state.step, config.steps) if ranks.is_first else Nothing() as reporter,
        profiling(out, config.steps - state.step, device) if profiled else Nothing() as profiler,
    ):

        def validate() -> None:
            state.history.append(run.evaluated(by_host.objective))
            reporter.validation(state.history[-1])

        if config.model is not None and not state.step:
            validate()  # what the model knows before it is trained further
        started = reported = time.perf_counter()
        for step, parts in zip(range(state.step, config.steps), batches, strict=True):
            found = train_step(step, parts, text.training.targets(step))
            sums += found
            in_a_row.add_(1).mul_(found[-1])
            torch.maximum(longest, in_a_row, out=longest)
            tokens += sum(part.num_tokens for part in parts)
            profiler.step()

            state.step = step + 1
            reporter.advance()
            done = state.step == config.steps
            saving = done or state.step % config.save_every == 0
            # report before each checkpoint, so that the sums need not be saved and the logs of a
            # resumed run match
            if saving or state.step % config.log_every == 0:
                ranks.sum(sums[:-1])  # not the skipped steps, because all ranks skip the same ones
                tokens = int(ranks.sum(torch.tensor(tokens, device=device)))
                # only here does the host wait for the GPU
                *values, skipped, skipped_in_a_row = totals.tolist()
                metrics = recipe.metrics(*values, skipped_steps=skipped)
                now = time.perf_counter()
                row = training_row(recipe, state.step, metrics, tokens / (now - reported))
                if skipped_in_a_row >= MOST_SKIPPED:
                    raise InputError(
                        f"the gradients of {skipped_in_a_row:.0f} steps in a row before step "
                        f"{state.step} were not finite; start a new run with a smaller "
                        "--learning-rate"
                    )
                state.history.append(row)
                state.skipped_steps += int(metrics.skipped_steps)
                state.real_tokens += tokens
                state.seconds = before + now - started
                per_step = state.seconds / state.step
                reporter.training(row, per_step * (config.steps - state.step))
                totals.zero_()
                tokens, reported = 0, now
            if done or state.step % config.eval_every == 0:
                evaluating = time.perf_counter()
                validate()
                reported += time.perf_counter() - evaluating
            if saving:
                state.seconds = before + time.perf_counter() - started
                optimizer, scaler = by_host.optimizer, by_host.scaler
                run_state.save(out, model, text.tokenizer, optimizer, scaler, state, ranks)


def _finish(run: _Run) -> dict[str, Any]:
    """Writes plot and summary of a finished run, prints its result, and returns the summary."""
    text, out, ranks, state = run.text, run.out, run.ranks, run.state
    validations = [row for row in state.history if "heldout_mlm_loss" in row]
    verdict = run.recipe.verdict(run.model, validations, run.evaluated)
    heldout = validations[-1]
    summary = {
        "heldout_mlm_loss": heldout["heldout_mlm_loss"],
        "unigram_baseline": text.baseline,
        "mlm_accuracy": heldout["mlm_accuracy"],
        "nsp_accuracy": heldout.get("nsp_accuracy"),
        "real_tokens_per_second": state.real_tokens / state.seconds,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "seconds": state.seconds,
        "checkpoint": f"checkpoint-{state.step}",
        "processes": ranks.size,
        **verdict.figures,
        **environment(ranks.device),
    }
    if not ranks.is_first:
        return summary
    write_json(out / SUMMARY, summary)
    levels = {"unigram baseline": text.baseline, **verdict.levels}
    plot_losses(state.history, levels, out / "loss.png", run.recipe.title)
    gained = text.baseline - summary["heldout_mlm_loss"]
    console.print(
        f"held-out MLM loss {summary['heldout_mlm_loss']:.3f} nats, unigram baseline "
        f"{text.baseline:.3f}: {abs(gained):.3f} {'below' if gained >= 0 else 'ABOVE'} it\n"
        f"{verdict.said}"
        f"{state.step} steps in {state.seconds:.0f} s; checkpoint, plot and summary are in {out}\n"
        f"try: fastbert fill-mask --model {shlex.quote(str(out))} "
        "'a short text with one [MASK] in it'"
    )
    return summary


def _describe(run: _Run, parallel: str) -> None:
    config, ranks = run.recipe.config, run.ranks
    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    together = f", {ranks.size} processes by {parallel}" if ranks.size > 1 else ""
    console.print(
        f"{run.recipe.name()}: {size:.1f} M parameters, {config.batch_tokens} tokens a step, on "
        f"{ranks.device.type} in {config.precision}{together}"
    )
