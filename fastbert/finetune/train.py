"""Fine-tuning, from a pre-trained BERT and labelled examples to the best epoch's checkpoint."""

import dataclasses
import math
import shlex
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from fastbert import checkpoint
from fastbert.check import InputError, stopping
from fastbert.checkpoint import RUN
from fastbert.config.bert import BertConfig
from fastbert.config.finetune import FinetuneConfig
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.data.streams import Purpose, stream
from fastbert.finetune.features import Feature, collate, parts
from fastbert.finetune.infer import TASK_OF, encoder_of, run, warn_of_words
from fastbert.finetune.metrics import Report, require_metrics
from fastbert.finetune.report import print_report, shown
from fastbert.finetune.task import Settings, Task
from fastbert.system import locks
from fastbert.system.console import console, tracked
from fastbert.system.files import new_directory, require_apart, write_json
from fastbert.train.optimizer import clipped_step, finetuning_optimizer, linear_schedule
from fastbert.train.precision import autocast, resolve_precision
from fastbert.train.report import environment

SUMMARY = "summary.json"


class _Labelled(NamedTuple):
    """Examples, and the features that were made from them."""

    examples: list[Any]
    features: list[Feature]


class _Data(NamedTuple):
    train: _Labelled
    dev: _Labelled
    test: _Labelled | None


def finetune(config: FinetuneConfig, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Runs the fine-tuning that `config` describes in the directory `out`.

    Writes `out`/latest, the best epoch's checkpoint with its tokenizer and finetune.json, which
    Hugging Face loads too, and summary.json, which is returned. Both are written last: a stopped
    run has only checkpoints. The same config gives the same run, bit for bit on a CPU with the same
    number of threads. overwrite: replaces a run in `out`, which is removed once the data are read.
    Raises InputError for unusable data and options, Stopped after Ctrl-C.
    """
    require_metrics(config.task)
    directory = checkpoint.resolve(config.model)
    require_apart("--out", out, (), (Path(config.model), directory))
    with locks.claimed(out), stopping(lambda: _kept(out)):
        if (out / RUN).exists() and not overwrite:
            held = "a run already" if (out / SUMMARY).exists() else "a run that was not finished"
            raise InputError(
                f"--out {out}: holds {held}; name another directory, or replace the run with "
                "--overwrite"
            )
        return _run(config, out, directory)


def _kept(out: Path) -> str:
    """Tells the user what is left after Ctrl-C."""
    kept = sorted(path.name for path in out.glob("checkpoint-*"))
    what = f"{kept[0]}, the best epoch so far, is kept" if kept else "no checkpoint is written"
    return f"{out}: {what}; the same command with --overwrite starts again"


def _run(config: FinetuneConfig, out: Path, directory: Path) -> dict[str, Any]:
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(config, precision=resolve_precision(config.precision))
    shape = BertConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model_vocab_size=shape.vocab_size)
    task, data = _read(config, tokenizer, shape.max_position_embeddings)

    torch.manual_seed(config.seed)
    with warnings.catch_warnings():  # the checkpoint is expected to lack the head
        warnings.filterwarnings("ignore", message=".*newly initialized", category=UserWarning)
        model = task.model_class.from_pretrained(
            directory, ignore_mismatched_sizes=True, **task.model_options()
        ).to(device)
    _remove_run(out)
    write_json(out / RUN, config.to_json())
    console.print(
        f"{config.task}: {len(data.train.features)} training sequences, "
        f"{len(data.dev.features)} to choose the best epoch, on {device.type} in {config.precision}"
    )
    trainer = _Trainer(config, out, task, model, tokenizer, data, device)
    trainer.train()
    return trainer.finish(time.perf_counter() - started)


def _remove_run(out: Path) -> None:
    """Removes the files of an earlier run from `out`, and no others."""
    for path in (out / checkpoint.LATEST, out / SUMMARY, out / RUN):
        path.unlink(missing_ok=True)
    for path in (*out.glob("checkpoint-*"), *out.glob(".checkpoint-*")):
        shutil.rmtree(path)


def _read(config: FinetuneConfig, tokenizer: Tokenizer, longest: int) -> tuple[Task, _Data]:
    max_seq_len = longest if config.max_seq_len is None else config.max_seq_len
    if max_seq_len > longest:
        raise InputError(f"--max-seq-len: the model reads at most {longest}, got {max_seq_len}")
    task = TASK_OF[config.task](Settings.of(config, max_seq_len))
    if config.metric is not None and config.metric not in task.metrics:
        raise InputError(
            f"--metric: expected one of {', '.join(task.metrics)}, got {config.metric!r}"
        )
    train, dev = _examples(task, config)
    test = [] if config.test is None else task.read(config.test)
    task.learn(train if config.dev is not None else [*train, *dev])
    task.check([*dev, *test])
    task.weigh(config, train)
    encoder = encoder_of(task.settings, tokenizer)
    of_train, of_dev, of_test = (
        _Labelled(examples, task.features(examples, encoder)) for examples in (train, dev, test)
    )
    warn_of_words("--train", of_train.features, encoder)
    return task, _Data(of_train, of_dev, of_test if test else None)


def _examples(task: Task, config: FinetuneConfig) -> tuple[list[Any], list[Any]]:
    """Examples for training and for evaluation; --dev-share draws the latter from --train."""
    train = task.read(config.train)
    if config.dev is not None:
        return train, task.read(config.dev)
    assert config.dev_share is not None
    count = round(len(train) * config.dev_share)
    if not 0 < count < len(train):
        raise InputError(
            f"--dev-share {config.dev_share:g}: takes {count} of the {len(train)} example(s) in "
            f"{config.train}; give another share, or a file with --dev"
        )
    order = stream(config.seed, Purpose.SPLIT).permutation(len(train))
    chosen = set(order[:count].tolist())
    rest = [example for number, example in enumerate(train) if number not in chosen]
    return rest, [train[number] for number in sorted(chosen)]


class _Trainer:
    """The training loop, with the history and the best epoch so far."""

    def __init__(
        self,
        config: FinetuneConfig,
        out: Path,
        task: Task,
        model: Any,
        tokenizer: Tokenizer,
        data: _Data,
        device: torch.device,
    ) -> None:
        self.config, self.out, self.task = config, out, task
        self.model, self.tokenizer, self.data, self.device = model, tokenizer, data, device
        self.autocast = autocast(config.precision, device)
        self.optimizer = finetuning_optimizer(
            model, model.config.num_hidden_layers, config.weight_decay, config.layer_decay
        )
        self.metric = config.metric or task.metrics[0]
        self.step = 0
        self.total = config.epochs * math.ceil(len(data.train.features) / config.batch_size)
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, int, Report] | None = None

    def train(self) -> None:
        for epoch in range(1, self.config.epochs + 1):
            loss = self._epoch(epoch)
            if not math.isfinite(loss):
                raise InputError(
                    f"loss or gradients are not finite in epoch {epoch}; start a new run with a "
                    "smaller --learning-rate"
                )
            report = self._evaluate(self.model, self.data.dev)
            self.history.append({"epoch": epoch, "step": self.step, "loss": loss, **report.metrics})
            value = self._value(report)
            if self.best is None or value > self.best[0]:
                self.best = value, epoch, report
                self._save(epoch)
            about = [f"epoch {epoch}/{self.config.epochs}", f"loss {loss:.4f}", *shown(report)]
            console.print("  ".join(about))
            if self.config.patience and epoch - self.best[1] >= self.config.patience:
                console.print(f"no better epoch in {self.config.patience}: stopping")
                break

    def _value(self, report: Report) -> float:
        """The metric to maximise; error metrics are negated, because they should fall."""
        return report.metrics[self.metric] * (-1 if self.metric in ("mse", "mae") else 1)

    def _epoch(self, epoch: int) -> float:
        """Trains on all features once, in random order; returns the mean loss of the steps."""
        self.model.train()
        features = self.data.train.features
        order = stream(self.config.seed, Purpose.SHUFFLE, epoch).permutation(len(features)).tolist()
        losses = []
        begins = range(0, len(order), self.config.batch_size)
        for begin in tracked(begins, f"epoch {epoch}/{self.config.epochs}"):
            losses.append(self._step(order[begin : begin + self.config.batch_size]))
            self.step += 1
        return float(torch.stack(losses).mean())  # the host waits for the device only here

    def _step(self, numbers: Sequence[int]) -> torch.Tensor:
        """One optimizer step over these features, computed in parts of at most `batch_tokens`."""
        features = [self.data.train.features[number] for number in numbers]
        total = max(sum(map(self.task.count, features)), 1e-9)
        state = torch.tensor([self.config.seed, self.step])
        loss = torch.zeros((), device=self.device)
        for part in parts([feature.num_tokens for feature in features], self.config.batch_tokens):
            some = [features[i] for i in part]
            batch = collate(some, [numbers[i] for i in part])
            batch = dataclasses.replace(batch, dropout_state=state).to(self.device)
            with self.autocast:
                share = self.task.loss(self.model, batch, some, total)
            share.backward()
            loss += share.detach()
        rate = linear_schedule(
            self.step,
            peak=self.config.learning_rate,
            warmup=round(self.total * self.config.warmup_ratio),
            total=self.total,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        parameters = self.model.parameters()
        skipped = clipped_step(self.optimizer, parameters, self.config.max_grad_norm)
        return loss.masked_fill(skipped.bool(), math.nan)  # NaN makes `train` end the run

    def _evaluate(self, model: torch.nn.Module, data: _Labelled) -> Report:
        limit = self.config.batch_tokens
        scores = run(self.task, model, data.features, limit, self.device, self.autocast)
        predictions = self.task.predict(data.examples, data.features, scores)
        return self.task.evaluate(data.examples, predictions)

    def _save(self, epoch: int) -> None:
        """Writes the checkpoint of the best epoch so far and removes the previous one."""
        directory = self.out / f"checkpoint-{epoch}"
        with new_directory(directory) as writing:
            self.model.save_pretrained(writing)
            longest = self.model.config.max_position_embeddings
            save_tokenizer(self.tokenizer, writing, max_length=longest)
            self.task.settings.save(writing)
        for old in self.out.glob("checkpoint-*"):
            if old != directory:
                shutil.rmtree(old)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Writes summary.json and `latest`; prints the best epoch's report, on --test if given."""
        assert self.best is not None
        _, epoch, report = self.best
        directory = self.out / f"checkpoint-{epoch}"
        where, measured, test = "dev", report, None
        if self.data.test is not None:
            best = self.task.model_class.from_pretrained(directory)
            where, measured = "test", self._evaluate(best.to(self.device), self.data.test)
            test = {**measured.metrics, "tables": [t._asdict() for t in measured.tables]}
        summary = {
            "task": self.config.task,
            "metric": self.metric,
            "best_epoch": epoch,
            **report.metrics,
            "tables": [table._asdict() for table in report.tables],
            "test": test,
            "history": self.history,
            "steps": self.step,
            "seconds": seconds,
            "checkpoint": directory.name,
            **environment(self.device),
        }
        write_json(self.out / SUMMARY, summary)
        checkpoint.point_latest(directory)  # last, because it marks the run as finished
        print_report(measured)
        console.print("  ".join([f"{where}:", *shown(measured)]))
        source = self.config.dev or self.config.train
        said = self.out / f"{source.stem}.predicted.jsonl"
        again = ["fastbert", "predict", "--model", str(self.out)]
        again += ["--input", str(source), "--out", str(said)]
        console.print(
            f"best in {self.metric}: epoch {epoch}, {report.metrics[self.metric]:.4f}; checkpoint "
            f"and summary are in {self.out}\n"
            f"try: {shlex.join(again)}"
        )
        return summary
