"""`fastbert export`: from a model's directory to a checked file with the tokenizer beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert import checkpoint, models
from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.export import check, plain
from fastbert.export.formats import Inputs, format_of, trace
from fastbert.system.files import is_stream, new_file, output, require_output

PRECISIONS = ("fp32", "fp16")
# Copied to the file's directory if the model has them, because users of the file need them too.
BESIDE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "finetune.json",
)


def export(
    model: str | Path,
    out: Path,
    *,
    to: str = "onnx",
    precision: str = "fp32",
    head: str | None = None,
    pooling: str | None = None,
) -> tuple[Path, check.Difference]:
    """Exports a model; returns the file's path and the difference of its outputs from the model's.

    to: onnx or torch (torch.export); precision: fp32 or fp16; out: a file name that ends in .onnx
    or .pt2, or a directory, which gets a file `model` with that ending; head: a class of
    `fastbert.models`, by default the one that config.json names; pooling: mean or cls, for sentence
    embeddings of the bare model. The file appears only if its outputs agree with the model's
    (`check.compare`). Raises InputError if they do not, for other options, a missing library, and
    an `out` that belongs to another model.
    """
    form = format_of(to)
    if precision not in PRECISIONS:
        raise InputError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if is_stream(out):
        raise InputError(f"--out {out}: is a stream; name a file or a directory")
    directory = checkpoint.resolve(model)
    out = _file(out, form.suffix)
    require_output(out, directory)
    beside = _beside(directory, out.parent)
    config = BertConfig.from_pretrained(directory)
    own, traced = load(directory, config, head, pooling)
    wanted = _answers(own, traced.outputs, pooling)
    batches = list(check.batches(config, traced.has_choices))
    check.compare(f"{directory}", lambda inputs: traced(**inputs), wanted, *batches)
    layers = None
    if precision == "fp16":
        traced, layers = traced.half(), config.num_hidden_layers
    program = trace(traced, config.max_position_embeddings)
    with new_file(out) as path:
        form.write(program, traced, path)
        run = form.run(path)
        difference = check.compare(str(out), run, wanted, *batches, fp16_layers=layers)
        for name, contents in beside.items():
            with output(out.parent / name) as file:
                file.write(contents)
    return out, difference


def load(
    directory: Path, config: BertConfig, head: str | None = None, pooling: str | None = None
) -> tuple[Any, plain.Plain]:
    """The packed and the plain model of a checkpoint, in eval mode, with the same weights.

    Raises InputError for an unknown head or pooling, and if the checkpoint lacks parameters of the
    head, because they would be random.
    """
    if pooling is not None and pooling not in plain.EMBEDDINGS:
        raise InputError(
            f"--pooling: expected one of {', '.join(plain.EMBEDDINGS)}, got {pooling!r}"
        )
    if pooling is not None and head not in (None, "BertModel"):
        raise InputError(f"--pooling: only for the bare BertModel, not for {head}")
    named = head or ("BertModel" if pooling else _named_head(directory, config))
    if named not in plain.HEADS:
        raise InputError(f"--head: expected one of {', '.join(plain.HEADS)}, got {named!r}")
    weights = checkpoint.read_weights(directory)
    has_pooler = pooling is None and any(".pooler." in f".{name}" for name in weights)
    if named == "BertModel":
        own: Any = models.BertModel(config, add_pooling_layer=has_pooler)
    else:
        own = getattr(models, named)(config)
    absent = checkpoint.load_weights(own, weights, directory)
    if absent:
        raise InputError(
            f"{directory}: the checkpoint has no {', '.join(absent)}, which {named} needs; train "
            "it first, or name another --head"
        )
    kind = plain.HEADS[named]
    if named == "BertModel":
        kind = plain.EMBEDDINGS[pooling] if pooling else kind if has_pooler else plain.BareModel
    traced = kind(config)
    prefix = "bert." if named == "BertModel" else ""
    traced.load_state_dict({prefix + name: tensor for name, tensor in own.state_dict().items()})
    return own.eval(), traced.eval().requires_grad_(False)


def _named_head(directory: Path, config: BertConfig) -> str:
    names: list[str] = config.extra.get("architectures") or []
    if len(names) == 1 and names[0] in plain.HEADS:
        return names[0]
    raise InputError(
        f"{directory}/config.json: names {names[0] if names else 'no architecture'}, which is not "
        f"a known head; give --head, one of {', '.join(plain.HEADS)}"
    )


def _answers(
    own: Any, names: tuple[str, ...], pooling: str | None
) -> Callable[[Inputs], dict[str, Tensor]]:
    """A function that computes the file's outputs, by name, with the packed model."""

    def answer(inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad():
            output = dict(own(**inputs, return_dict=True))
        if pooling is not None:
            hidden = output["last_hidden_state"]
            rows = zip(hidden, inputs["attention_mask"].bool(), strict=True)
            real = [tokens[mask] for tokens, mask in rows]
            pooled = [x.mean(0) if pooling == "mean" else x[0] for x in real]
            output["sentence_embedding"] = torch.stack(pooled)
        return {name: output[name] for name in names}

    return answer


def _file(out: Path, suffix: str) -> Path:
    if out.suffix == suffix and not out.is_dir():
        return out
    if out.suffix and not out.is_dir():
        raise InputError(f"--out {out}: expected a name that ends in {suffix}, or a directory")
    return out / f"model{suffix}"


def _beside(directory: Path, place: Path) -> dict[str, bytes]:
    """Contents by name of the files to copy beside the exported file, without existing ones.

    Raises InputError if another model's file is there already, and for a run's directory.
    """
    if any((place / name).exists() for name in (checkpoint.RUN, checkpoint.LATEST)):
        raise InputError(f"--out {place}: is the directory of a run; name another one")
    copies = {}
    for name in BESIDE:
        source, target = directory / name, place / name
        contents = source.read_bytes() if source.is_file() else None
        if target.exists() and target.read_bytes() != contents:
            raise InputError(f"--out: {target} belongs to another model; name another directory")
        if contents is not None and not target.exists():
            copies[name] = contents
    return copies
