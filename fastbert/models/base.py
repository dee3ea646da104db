"""The base of all models: calls, initialization, tied weights, loading, saving, checkpointing."""

import contextlib
import copy
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fastbert import checkpoint
from fastbert.check import require
from fastbert.config.bert import BertConfig, changed, check_config
from fastbert.models.arguments import DOWNLOAD, device_of, dtype_of, for_constructor
from fastbert.models.drawing import Undrawn, draw
from fastbert.models.hub import Uploads
from fastbert.models.inputs import Inputs
from fastbert.models.request import Request
from fastbert.models.tables import resize, set_apart, tie_again
from fastbert.models.users import call_padded, may_be_left_out
from fastbert.modules.bert_layer import BertLayer
from fastbert.system.files import new_file


class BertPreTrainedModel(nn.Module, Uploads):
    """Base class of the models.

    `config` is a `fastbert.BertConfig` or Hugging Face's configuration, and is not copied. A
    model's `forward` has Hugging Face's arguments and calls `run`, which calls `predict`.
    """

    base_model_prefix: ClassVar[str] = "bert"
    supports_gradient_checkpointing: ClassVar[bool] = True
    _no_split_modules: ClassVar[list[str]] = ["BertEmbeddings", "BertLayer"]  # for accelerate
    # read by transformers' pipelines and its Trainer
    input_modalities: ClassVar[str] = "text"
    main_input_name: ClassVar[str] = "input_ids"
    _tied_weights_keys: ClassVar[dict[str, str]] = {}  # for peft: from a second name to the first
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None  # for Trainer: files may lack these
    config: Any
    name_or_path: str = ""  # the source of from_pretrained; peft writes it beside adapters

    def __init__(self, config: Any) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        # load_state_dict(assign=True) would replace tied parameters with separate ones
        self.register_load_state_dict_post_hook(tie_again)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(set_apart)  # type: ignore[no-untyped-call]

    def run(self, inputs: Inputs, options: Any, **targets: Any) -> Any:
        """Reads the arguments and predicts; returns a tuple if return_dict is False."""
        request = Request.read(self, inputs, options)
        output = self.predict(request, **targets)
        return output if request.return_dict else output.to_tuple()

    def predict(self, request: Request) -> Any:
        """The output for a request, padded or packed as the request's input is."""
        raise NotImplementedError

    def encode(self, request: Request, reads: Literal["packed", "pooled"] = "packed") -> Any:
        """The bare model's output: last hidden states (T, H), or (M, H) for `request.rows`.

        They are (B, S, H) from a CUDA graph of the whole batch; `through` and `request.padded` take
        both. reads: "pooled" if only pooler_output is read; hidden states may then have any form.
        """
        bare, request.reads = self.base_model, reads
        if may_be_left_out(bare):
            return bare(request)
        return call_padded(bare, request)  # hooks and a user's forward see what Hugging Face's do

    def can_generate(self) -> bool:
        """False, because BERT generates no text; transformers' pipelines call this."""
        return False

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameter elements, tied ones counted once; Trainer calls this."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(parameter) in tables)
        )

    @property
    def base_model(self) -> Any:
        """The bare model inside, or the model itself."""
        return getattr(self, self.base_model_prefix, self)

    def initialize(self) -> None:
        """Draws weights with std `initializer_range`, zeros biases, and ties the decoder."""
        draw(self)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the decoder share the word embeddings' weight, if the config ties them."""
        decoder = self.get_output_embeddings()
        if decoder is not None and self.config.tie_word_embeddings:
            decoder.weight = self.get_input_embeddings().weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.base_model.embeddings.word_embeddings = embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        return None

    def set_output_embeddings(self, decoder: nn.Linear) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no output embeddings")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Gives word embeddings, decoder and configuration `new_num_tokens` rows; see `resize`."""
        embeddings, decoder = self.get_input_embeddings(), self.get_output_embeddings()
        count = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
        count += -count % (pad_to_multiple_of or 1)
        if count == embeddings.num_embeddings:
            return embeddings
        std = None if mean_resizing else self.config.initializer_range
        resize(embeddings, count, std)
        if decoder is not None:
            resize(decoder, count, std)
            self.set_output_embeddings(decoder)
        # `changed` edits Hugging Face's configuration in place and replaces a `BertConfig`
        old, new = self.config, changed(self.config, vocab_size=count)
        for module in self.modules():
            if getattr(module, "config", None) is old:
                module.config = new
        self.tie_weights()
        return embeddings

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keeps only each layer's input for the backward pass, which runs the layer again.

        activation_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`, by default
        use_reentrant=False; every_n_layers: checkpoints the first of every n layers. Dropout uses
        a counter-based generator, so the second run draws the same masks. Raises ValueError for
        every_n_layers below 1, and for offload=True.
        """
        who = "activation_checkpointing_enable"
        require(every_n_layers >= 1, who, "every_n_layers of at least 1", every_n_layers)
        require(not offload, who, "offload=False", offload, "use torch.autograd.graph.save_on_cpu")
        options = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        for number, layer in enumerate(self._layers()):
            layer.gradient_checkpointing = number % every_n_layers == 0
            layer._gradient_checkpointing_func = functools.partial(recompute, **options)

    def activation_checkpointing_disable(self) -> None:
        for layer in self._layers():
            layer.gradient_checkpointing = False

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(layer.gradient_checkpointing for layer in self._layers())

    # transformers' names up to 5.23
    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Makes the embeddings' output require gradients, as reentrant checkpointing needs."""

        def make_inputs_require_grads(module: Any, args: Any, output: Tensor) -> None:
            output.requires_grad_()

        words = self.get_input_embeddings()
        self._require_grads_hook = words.register_forward_hook(make_inputs_require_grads)

    def disable_input_require_grads(self) -> None:
        self._require_grads_hook.remove()

    def _layers(self) -> list[BertLayer]:
        return [module for module in self.modules() if isinstance(module, BertLayer)]

    @classmethod
    def from_pretrained(
        cls,
        name_or_directory: str | Path,
        *,
        ignore_mismatched_sizes: bool = False,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """A model in eval mode with the weights of a Hugging Face directory, a run, or a hub name.

        config: replaces the checkpoint's configuration, or names the directory or hub model to
        read it from; dtype (or torch_dtype): the parameters' dtype, its name, or "auto" for the
        checkpoint's, by default float32; device_map: a device, or "auto" for the GPU if there is
        one; subfolder: the folder in it that holds the checkpoint; revision, cache_dir, token,
        local_files_only, force_download: for the download. `options` that are fields of
        `BertConfig`, such as num_labels, override the config's; the others go to the constructor.
        Head parameters that the checkpoint lacks are initialized with a warning, and so are those
        of another shape with ignore_mismatched_sizes. Raises InputError for anything else that is
        missing or does not fit; ValueError for a wrong dtype or device_map, and for options that
        have no effect here.
        """
        download = {name: options.pop(name) for name in options.keys() & DOWNLOAD}
        directory = checkpoint.resolve(name_or_directory, subfolder or "", **download)
        dtype = options.pop("torch_dtype", dtype)
        changes = {name: options.pop(name) for name in options.keys() & BertConfig.field_names()}
        options = for_constructor(cls, options)
        if config is None or isinstance(config, (str, Path)):
            source = directory if config is None else checkpoint.resolve(config, **download)
            config = BertConfig.from_pretrained(source, **changes)
        elif changes:
            config = changed(copy.copy(config), **changes)
        is_ours = cls.__module__.startswith("fastbert.")  # a user's class initializes itself
        with Undrawn() if is_ours else contextlib.nullcontext():
            model = cls(config, **options)
        model.name_or_path = str(name_or_directory)
        weights = checkpoint.read_weights(directory)
        absent = checkpoint.load_weights(
            model, weights, directory, ignore_mismatched_sizes=ignore_mismatched_sizes
        )
        draw(model, absent if is_ours else ())
        model.to(device=device_of(device_map), dtype=dtype_of(dtype, weights))
        if absent:
            warnings.warn(
                f"{directory}: the checkpoint has no matching {', '.join(absent)}, which are "
                "newly initialized; train the model before you use it",
                stacklevel=2,
            )
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **others: Any,
    ) -> None:
        """Writes config.json and model.safetensors, which Hugging Face's from_pretrained loads.

        Each file replaces an older one atomically.

        is_main_process: False writes nothing; state_dict: written instead of the model's own
        parameters, which may be only this process's shard; others: Hugging Face's arguments for
        how files are written (save_function, safe_serialization=True, max_shard_size), which are
        ignored. Raises ValueError for other arguments.
        """
        asked = {name for name, value in others.items() if value is not None and value is not False}
        is_known = asked <= _WRITING and others.get("safe_serialization", True)
        require(is_known, "save_pretrained", "safetensors, and no other arguments", others)
        if not is_main_process:
            return
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(self, directory, state_dict)
        with new_file(directory / "config.json") as path:
            values = self.config.to_dict() | {"architectures": [type(self).__name__]}
            # a config's dtype is its source checkpoint's; transformers 5 would load weights in it
            dtypes = {name for name in ("dtype", "torch_dtype") if values.get(name) is not None}
            values |= dict.fromkeys(dtypes, str(self.dtype).removeprefix("torch."))
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_WRITING = {"save_function", "safe_serialization", "max_shard_size"}
