"""Swaps the classes of a Hugging Face model's modules for ones with a packed forward, and back.

A patched class is a subclass of the class that it replaces, with another `forward`. It has the same
name and `__module__`, by which transformers, FSDP and checkpoints tell classes apart. A patched
module keeps its attributes, parameters and buffers, and this file keeps no other state.
"""

import functools
import inspect
import types
from typing import Any, Literal, TypeVar

from torch import nn

from fastbert.check import require
from fastbert.hf.encode import run_encoder, run_model
from fastbert.hf.families import FAMILIES, Forward, family_of, keep_padding, patched_base
from fastbert.hf.heads import run_head, run_words
from fastbert.hf.hooks import FAMILY, ORIGINAL, PATCHED
from fastbert.hf.stack import run_one_layer
from fastbert.modules.graphs.buckets import Graphs, allow
from fastbert.modules.linear import is_defined_in
from fastbert.modules.products import fp8
from fastbert.modules.request import DOCUMENTS

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    graphs: Graphs = "auto",
    padding: Literal["skip", "compute"] = "skip",
    precision: Literal["auto", "fp8"] = "auto",
) -> Model:
    """Makes a Hugging Face model run packed and fused, in place, and returns it.

    model: one of transformers' BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA or DistilBERT models,
    bare or with any head, or any module that contains such models, on any device, also meta. Its
    parameters, buffers, hooks, configuration and class names stay, so that loading, saving, tying,
    resizing, PEFT, Trainer, DDP and FSDP work as before (patch before `fully_shard`). Calls that
    the packed path does not support (decoders, `output_attentions`, ...) run as before;
    `fastbert.explain` names them. Patching again sets the options below anew; `unpatch` undoes
    it.

    graphs: "auto" replays the layers as CUDA graphs on a GPU, for calls that a graph computes
    correctly; False never does. FASTBERT_GRAPHS=0 switches graphs off for all models; see
    `fastbert.modules.graphs.buckets`.

    padding: "skip" computes no padded tokens: their outputs are zeros and their labels are ignored.
    "compute" computes them as Hugging Face does, for models that read them (ColBERT expands its
    queries by [MASK] tokens that no token attends to, https://arxiv.org/abs/2004.12832).

    precision: "fp8" makes the encoder's linear layers multiply in FP8 while the model is in
    training mode, on GPUs of compute capability 8.9 or later, with scales that follow from earlier
    calls; see `fastbert.modules.products.fp8`. "auto" computes in Hugging Face's precision.

    Raises TypeError, naming the class, if the model contains nothing to patch, and ValueError for
    another `graphs`, `padding` or `precision`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: expected a model, got {type(model).__name__}")
    require(precision in ("auto", "fp8"), "precision", '"auto" or "fp8"', repr(precision))
    is_known = padding in ("skip", "compute")
    require(is_known, "padding", '"skip" or "compute"', repr(padding))
    for module in model.modules():
        cls: Any = type(module)
        if _forward_of(cls) is not None:
            _give_class(module, patched_class(cls))
        if patched_base(module) is not None:
            keep_padding(module, padding == "compute")
    if not is_patched(model):
        names = ", ".join(f"{family.prefix}Model" for family in FAMILIES.values())
        raise TypeError(
            f"patch: expected a transformers model that contains one of {names}, "
            f"got {type(model).__module__}.{type(model).__name__}, which has none"
        )
    allow(model, graphs)
    fp8.disable(model)
    if precision == "fp8":
        fp8.enable(model)
    return model


def unpatch(model: Model) -> Model:
    """Gives every module of `model` the class it had before `patch`, and returns the model."""
    for module in model.modules():
        original = vars(type(module)).get(ORIGINAL)
        if original is not None:
            _give_class(module, original)
            keep_padding(module, False)
    allow(model, "auto")
    fp8.disable(model)
    return model


def _give_class(module: Any, cls: Any) -> None:
    """Swaps the class, and the forward that a module itself holds after accelerate's hooks."""
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward:
            vars(module)[name] = types.MethodType(cls.forward, module)
    module.__class__ = cls


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` has changed any module of the model."""
    return any(patched_base(module) is not None for module in model.modules())


@functools.cache
def patched_class(original: Any) -> Any:
    """The class that `patch` gives to modules of transformers' class `original`.

    Its constructor and its `from_pretrained` make patched models. Raises TypeError for a class
    that `patch` does not change.
    """
    run = _forward_of(original)
    if run is None:
        raise TypeError(f"patched_class: expected a class that patch changes, got {original}")

    @functools.wraps(original.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        patch(self)

    # copies and pickles refer to what can be imported: the original class, or a user's subclass
    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        make, of, *state = original.__reduce_ex__(self, protocol)
        if type(self) is patched:
            make, of = _new_instance, (original,)
        return (make, of, *state)

    attributes = {
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
        "forward": _forward(original, run),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        ORIGINAL: original,
        FAMILY: family_of(original),
    }
    patched = type(original)(original.__name__, (original,), attributes)
    setattr(patched, PATCHED, patched)
    return patched


def _new_instance(original: Any) -> nn.Module:
    cls = patched_class(original)
    return cls.__new__(cls)


def _forward_of(cls: type) -> Forward | None:
    """The packed forward for a class of transformers; None for a class that is not patched."""
    family = family_of(cls)
    if family is None or ORIGINAL in vars(cls):
        return None
    name, prefix = cls.__name__, family.prefix
    # DistilBERT's `Transformer` is left out: its arguments vary by release, `run_model` suffices
    roles: dict[str, Forward | None] = {
        f"{prefix}Model": run_model,
        f"{prefix}Encoder": run_encoder,
        f"{prefix}Layer": run_one_layer,
        "TransformerBlock": run_one_layer,  # DistilBERT's layer
        f"{prefix}ForMaskedLM": run_words,
        "BertForPreTraining": run_words,
        f"{prefix}ForCausalLM": None,
    }
    return roles.get(name, run_head if name.startswith(f"{prefix}For") else None)


# Arguments that patched models accept even if this version of transformers does not know them.
_OURS = {"return_logits", "skip_logits", "num_items_in_batch", *DOCUMENTS}


def _forward(original: Any, run: Forward) -> Forward:
    own = original.forward
    parameters = inspect.signature(own).parameters
    names = [n for n, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    known, is_theirs = {*parameters, *_OURS}, is_defined_in(own, ("transformers.",))

    def fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the arguments fit the signature, so that Python would raise no TypeError."""
        is_known = takes_all or all(name in known for name in kwargs)
        is_twice = any(name in kwargs for name in names[: len(args)])
        return len(args) <= len(names) and is_known and not is_twice

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = original.forward
        if run is run_one_layer and now is own:
            return run(self, functools.partial(own, self), *args, **kwargs)
        if not (now is own and is_theirs and fits(args, kwargs)):
            return now(self, *args, **kwargs)  # the user's own forward, or Python's TypeError
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        return run(self, functools.partial(own, self), arguments)

    return forward
