"""What users do to a model, one thing after another, the same to a model and to its twins.

An action takes a `Twin` and a `random.Random`, from which it draws what it changes, and how; each
twin gets a generator of the same seed. `ACTIONS` has them by name.
"""

import contextlib
import copy
import dataclasses
import pickle
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

import fastbert

ACTIONS = {}
WIDTH = 16  # the models' hidden size
KINDS = nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding


@dataclasses.dataclass
class Twin:
    """A model, and what is left of what was done to it.

    handles: of hooks; is_bound: whether a module has a function that belongs to this very model
    """

    model: Any
    handles: list[Any] = dataclasses.field(default_factory=list)
    is_bound: bool = False

    def add(self, handle):
        self.handles.append(handle)


class Gate(nn.Module):
    """A module of a user's around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y * torch.sigmoid(y.mean(-1, keepdim=True))


def action(function):
    ACTIONS[function.__name__] = function
    return function


def layers_of(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def encoder_of(model):
    return next(m for m in model.modules() if layers_of(model) in m._modules.values())


def draw(twin, generator, *kinds, inside=""):
    """A module of one of these kinds with its owner and its name there; three None if none is left.

    inside: part of the names that may be drawn, such as "layer."
    """
    found = [
        name
        for name, module in twin.model.named_modules()
        if type(module) in kinds and inside in name and "parametrizations" not in name
    ]
    if not found:
        return None, None, None
    owner, _, leaf = generator.choice(found).rpartition(".")
    owner = twin.model.get_submodule(owner)
    return getattr(owner, leaf), owner, leaf


def draw_weight(twin, generator, *kinds, inside=""):
    """A module as above, None if its weight is not a plain parameter."""
    module, _, _ = draw(twin, generator, *kinds, inside=inside)
    return module if module is not None and "weight" in module._parameters else None


def draw_block(twin, generator):
    """A leaf, or a part of the model that turns a hidden state into another."""
    parts = "Layer", "Attention", "Encoder", "mbeddings", "Transformer"
    return generator.choice([
        module
        for module in twin.model.modules()
        if type(module) in KINDS or any(part in type(module).__name__ for part in parts)
    ])  # fmt: skip


# Modes and hooks.


@action
def train(twin, generator):
    twin.model.train()


@action
def evaluate(twin, generator):
    twin.model.eval()


@action
def switch_the_mode_of_one(twin, generator):
    generator.choice([*twin.model.modules()]).train(generator.random() < 0.5)


@action
def hook_an_output(twin, generator):
    module, factor = draw_block(twin, generator), 1 + generator.random()

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        return output * factor if isinstance(output, torch.Tensor) else None

    # before transformers' hooks: see `hidden_states` in docs/drop-in.md
    twin.add(module.register_forward_hook(hook, prepend=True))


@action
def hook_an_input(twin, generator):
    module, factor = draw_block(twin, generator), 1 + generator.random()

    def hook(module, args):
        is_state = args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        return (args[0] * factor, *args[1:]) if is_state else None

    twin.add(module.register_forward_pre_hook(hook))


@action
def hook_the_model(twin, generator):
    module = generator.choice([twin.model, twin.model.base_model])
    factor = 1 + generator.random()

    def hook(module, args, output):
        for name in ("logits", "last_hidden_state"):
            if getattr(output, name, None) is not None:
                output[name] = output[name] * factor

    twin.add(module.register_forward_hook(hook))


@action
def hook_the_gradients_of_a_linear_layer(twin, generator):
    linear, _, _ = draw(twin, generator, nn.Linear)
    factor = 1 + generator.random()

    def hook(module, inputs, outputs):
        return tuple(None if one is None else one * factor for one in inputs)

    twin.add(linear.register_full_backward_hook(hook))


@action
def hook_the_gradient_of_a_parameter(twin, generator):
    parameter = generator.choice([*twin.model.parameters()])
    if parameter.requires_grad and parameter.is_leaf:
        twin.add(parameter.register_hook(lambda gradient: gradient * 1.5))


@action
def remove_a_hook(twin, generator):
    if twin.handles:
        twin.handles.pop(generator.randrange(len(twin.handles))).remove()


@action
def raise_in_a_hook(twin, generator):
    linear, _, _ = draw(twin, generator, nn.Linear)

    def hook(*args):
        raise KeyError("the user's")

    handle = linear.register_forward_hook(hook)
    with contextlib.suppress(KeyError):
        twin.model(torch.arange(4, 10)[None])
    handle.remove()


@action
def train_inputs(twin, generator):
    twin.model.enable_input_require_grads()


# Modules.


@action
def put_a_module_around_one(twin, generator):
    module, owner, name = draw(twin, generator, nn.Linear, nn.LayerNorm, inside="layer.")
    if module is not None:
        setattr(owner, name, Gate(module))


@action
def take_it_away(twin, generator):
    module, owner, name = draw(twin, generator, Gate)
    if module is not None:
        setattr(owner, name, module.inner)


@action
def replace_a_norm(twin, generator):
    module, owner, name = draw(twin, generator, nn.LayerNorm)
    if module is None:
        return
    options = generator.choice([{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
    new = nn.LayerNorm(WIDTH, **options)
    if generator.random() < 0.3:
        new = nn.RMSNorm(WIDTH, eps=1e-6)
    setattr(owner, name, new.to(module.weight).train(module.training))


@action
def replace_the_activations(twin, generator):
    new = generator.choice([nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.functional.gelu, torch.relu])
    for module in layers_of(twin.model).modules():
        for name in ("intermediate_act_fn", "activation"):
            if hasattr(module, name) and generator.random() < 0.6:
                module._modules.pop(name, None)
                setattr(module, name, new)


@action
def replace_a_forward(twin, generator):
    module, _, _ = draw(twin, generator, *KINDS)
    original, factor = type(module).forward, 1 + generator.random()
    module.forward = lambda x: original(module, x) * factor
    twin.is_bound = True


@action
def restore_the_forwards(twin, generator):
    for module in twin.model.modules():
        if type(module) in KINDS:
            vars(module).pop("forward", None)
    twin.is_bound = False


@action
def give_a_layer_a_class_of_its_own(twin, generator):
    layer = generator.choice([*layers_of(twin.model)])
    base = type(layer)

    class Louder(base):
        def forward(self, *args, **kwargs):
            y = super().forward(*args, **kwargs)
            return (y[0] * 1.1, *y[1:]) if isinstance(y, tuple) else y * 1.1

    layer.__class__ = Louder


@action
def drop_the_pooler(twin, generator):
    if getattr(twin.model, "pooler", None) is not None:
        twin.model.pooler = None


@action
def set_an_epsilon(twin, generator):
    norm, _, _ = draw(twin, generator, nn.LayerNorm)
    if norm is not None:
        norm.eps = generator.choice([1e-12, 1e-3, 0.5])


@action
def add_an_unused_module(twin, generator):
    layers_of(twin.model)[0].extra = nn.Linear(3, 3)


# Layers.


@action
def swap_two_layers(twin, generator):
    layers = layers_of(twin.model)
    layers[0], layers[-1] = layers[-1], layers[0]


@action
def drop_a_layer(twin, generator):
    layers = layers_of(twin.model)
    if len(layers) > 1:
        del layers[generator.randrange(len(layers))]
        twin.model.config.num_hidden_layers = len(layers)


@action
def share_a_layer(twin, generator):
    layers = layers_of(twin.model)
    layers[-1] = layers[0]


@action
def make_a_new_list_of_layers(twin, generator):
    encoder_of(twin.model).layer = nn.ModuleList([*layers_of(twin.model)][::-1])


@action
def checkpoint_a_layer_by_torch(twin, generator):
    layers = layers_of(twin.model)
    if len({*layers}) == len(layers) and "_checkpoint_wrapped_module" not in layers[0]._modules:
        layers[0] = checkpoint_wrapper(layers[0])


@action
def checkpoint_all_layers(twin, generator):
    options = {"use_reentrant": generator.random() < 0.3}
    twin.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@action
def checkpoint_none(twin, generator):
    twin.model.gradient_checkpointing_disable()


# Parameters.


@action
def replace_a_parameter(twin, generator):
    module = draw_weight(twin, generator, *KINDS[:2], nn.Embedding, inside="layer.")
    if module is not None and module.weight is not None:
        module.weight = nn.Parameter(module.weight.detach() * 1.1)


@action
def give_a_parameter_other_memory(twin, generator):
    module = draw_weight(twin, generator, nn.Linear, nn.LayerNorm, nn.Embedding)
    if module is not None and module.weight is not None:
        module.weight.data = module.weight.data * 0.9


@action
def lay_out_a_weight_by_columns(twin, generator):
    linear = draw_weight(twin, generator, nn.Linear)
    if linear is not None:
        linear.weight.data = linear.weight.data.t().contiguous().t()


@action
def change_all_parameters_in_place(twin, generator):
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.mul_(1.02)


@action
def tie_two_weights(twin, generator):
    modules = layers_of(twin.model).modules()
    square = [m for m in modules if type(m) is nn.Linear and "weight" in m._parameters]
    square = [one for one in square if one.weight.shape == (WIDTH, WIDTH)]
    if len(square) > 1:
        one, other = generator.sample(square, 2)
        one.weight = other.weight


@action
def share_a_linear_layer(twin, generator):
    ends = "query", "q_lin"
    names = [n for n, _ in layers_of(twin.model).named_modules() if n.endswith(ends)]
    owner, _, name = names[-1].rpartition(".")
    layers = layers_of(twin.model)
    setattr(layers.get_submodule(owner), name, layers.get_submodule(names[0]))


@action
def take_a_bias_away(twin, generator):
    linear, _, _ = draw(twin, generator, nn.Linear, inside="layer.")
    if linear is not None:
        linear.bias = None


@action
def give_it_back(twin, generator):
    linear, _, _ = draw(twin, generator, nn.Linear, inside="layer.")
    if linear is not None and linear.bias is None:
        linear.bias = nn.Parameter(torch.full_like(linear.weight[:, 0], 0.2))


@action
def freeze_a_parameter(twin, generator):
    parameter = generator.choice([*twin.model.parameters()])
    if parameter.is_leaf:
        parameter.requires_grad_(not parameter.requires_grad)


@action
def freeze_the_embeddings(twin, generator):
    twin.model.get_input_embeddings().requires_grad_(False)


@action
def freeze_or_thaw_all(twin, generator):
    twin.model.requires_grad_(generator.random() < 0.7)


@action
def load_weights(twin, generator):
    weights = twin.model.state_dict()
    weights = {name: 1.05 * x if x.is_floating_point() else x for name, x in weights.items()}
    twin.model.load_state_dict(weights, assign=generator.random() < 0.5)
    twin.model.tie_weights()


@action
def make_it_float64(twin, generator):
    twin.model.double()


@action
def make_it_float32(twin, generator):
    twin.model.float()


@action
def compute_a_weight_from_others(twin, generator):
    linear = draw_weight(twin, generator, nn.Linear, inside="layer.")
    if linear is not None:
        parametrizations.weight_norm(linear)


@action
def keep_the_computed_weight(twin, generator):
    found = [m for m in twin.model.modules() if parametrize.is_parametrized(m)]
    if found:
        parametrize.remove_parametrizations(generator.choice(found), "weight")


@action
def prune_a_weight(twin, generator):
    linear = draw_weight(twin, generator, nn.Linear, inside="layer.")
    if linear is not None:
        prune.l1_unstructured(linear, "weight", 0.3)


@action
def finish_the_pruning(twin, generator):
    found = [m for m in twin.model.modules() if "weight_mask" in m._buffers]
    if found:
        prune.remove(generator.choice(found), "weight")


# Embeddings and configuration.


@action
def replace_the_words(twin, generator):
    words = twin.model.get_input_embeddings()
    torch.manual_seed(11)
    new = nn.Embedding(words.num_embeddings, WIDTH, padding_idx=generator.choice([0, None]))
    twin.model.set_input_embeddings(new.to(words.weight))
    if generator.random() < 0.5:
        twin.model.tie_weights()


@action
def bound_the_words(twin, generator):
    twin.model.get_input_embeddings().max_norm = generator.choice([None, 0.5])


@action
def ask_for_states(twin, generator):
    twin.model.config.output_hidden_states = generator.random() < 0.5


# LoRA.


def loras(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@action
def add_lora(twin, generator):
    from peft import LoraConfig, inject_adapter_in_model

    targets = generator.choice([["query", "value", "q_lin", "v_lin"], ["dense", "out_lin", "lin1"]])
    modules = [m for n, m in twin.model.named_modules() if n.rpartition(".")[2] in targets]
    if not loras(twin.model) and all(type(module) is nn.Linear for module in modules):
        torch.manual_seed(5)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(config, twin.model)


@action
def switch_lora(twin, generator):
    is_on = generator.random() < 0.5
    for module in loras(twin.model):
        module.enable_adapters(is_on)


@action
def merge_or_unmerge_lora(twin, generator):
    for module in loras(twin.model):
        (module.unmerge if module.merged else module.merge)()


@action
def scale_lora(twin, generator):
    for module in loras(twin.model)[:1]:
        module.scaling["default"] *= 1.5


# The model as a whole.


@action
def copy_it(twin, generator):
    pickle_or_copy(twin, copy.deepcopy)


@action
def pickle_it(twin, generator):
    pickle_or_copy(twin, lambda model: pickle.loads(pickle.dumps(model)))


def pickle_or_copy(twin, how):
    classes = "".join(type(module).__name__ for module in twin.model.modules())
    if not (twin.is_bound or "Louder" in classes or "Parametrized" in classes):
        for handle in twin.handles:  # of the model that is left behind
            handle.remove()
        twin.handles.clear()
        twin.model = how(twin.model)


@action
def patch_it_again(twin, generator):
    if fastbert.is_patched(twin.model):
        fastbert.patch(fastbert.unpatch(twin.model))
