"""A layer as one node of autograd gives what its operators give one by one."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

import fastbert
from fastbert import backend, events
from fastbert.modules import layer as layers
from fastbert.modules import whole_layer
from fastbert.modules.bert_layer import BertLayer, parts_of
from fastbert.modules.layer import Stream, run_layer
from fastbert.modules.sequences import Rows, Sequences
from fastbert.rng import for_batch
from tests.modules.graphs.case import Counter

LENGTHS = [5, 1, 7]
TOKENS = sum(LENGTHS)


def make(device, training=True, dropout=0.1, act="gelu", **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    layer = BertLayer(fastbert.BertConfig(**sizes, **drops, hidden_act=act, **options))
    for parameter in layer.parameters():  # norms and biases too
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.1)
    return layer.to(device).train(training)


def sequences_of(device, lengths=LENGTHS, dropout=True):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    state = torch.tensor([3, 5], device=device)
    rng = for_batch(bounds, sum(lengths), state=state) if dropout else None
    return Sequences(bounds, max(lengths), None, rng)


def stream_of(device, dtype=torch.float32, tokens=TOKENS, hidden=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    return x.requires_grad_()


@pytest.fixture(autouse=True)
def _kernels():
    with backend.use("triton"):
        yield


@pytest.fixture
def runs(monkeypatch):
    """What each `run` of a whole layer returned, True where it ran."""
    found, run = [], whole_layer.WholeLayer.run

    def recording(self, *arguments):
        outputs = run(self, *arguments)
        found.append(outputs is not None)
        return outputs

    monkeypatch.setattr(whole_layer.WholeLayer, "run", recording)
    return found


@contextlib.contextmanager
def one_by_one():
    """Has layers run operator by operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_layer.WholeLayer, "run", lambda *_: None)
        yield


def results(layer, x, sequences, wanted=None, context=contextlib.nullcontext):
    """Both branches of the output, and the gradients of x and of parameters.

    wanted: of which branches a gradient is given, the first or the second or (None) both
    """
    parts = parts_of(layer)
    with context():
        outputs = run_layer(parts, Stream(x, x), sequences)
    generator = torch.Generator().manual_seed(2)
    given = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    loss = sum((y * dy).sum() for n, (y, dy) in enumerate(zip(outputs, given, strict=True))
               if wanted in (None, n))  # fmt: skip
    inputs = [x, *layer.parameters()]
    inputs = [one for one in inputs if one.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, inputs, allow_unused=True)]


def both(*arguments, **options):
    with one_by_one():
        expected = results(*arguments, **options)
    return results(*arguments, **options), expected


def assert_same(actual, expected, **limits):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e, **limits)


@pytest.mark.parametrize("wanted", [None, 0, 1])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_outputs_and_gradients_are_those_of_the_operators(dropout, act, wanted, device, runs):
    layer, sequences = make(device, dropout=dropout, act=act), sequences_of(device, dropout=dropout)
    assert_same(*both(layer, stream_of(device), sequences, wanted))
    assert runs == [True]


@pytest.mark.parametrize("in_fp32", [True, False], ids=["fp32-stream", "low-stream"])
def test_under_autocast_only_weight_gradients_differ_and_are_closer(in_fp32, device, runs):
    """They are sums in float32, which autocast's product rounds to half precision."""
    layer, sequences = make(device), sequences_of(device)
    half = torch.float16  # the interpreter has no product of bfloat16
    x = stream_of(device, torch.float32 if in_fp32 else half)

    def context():
        return torch.autocast(device, half)

    actual, expected = both(layer, x, sequences, context=context)
    assert runs == [True]
    assert_same(actual, expected, rtol=2e-3, atol=2e-2)
    names = ["y", "residual", "x", *(name for name, _ in layer.named_parameters())]
    for name, a, e in zip(names, actual, expected, strict=True):
        is_product = name.endswith("weight") and a.ndim == 2
        assert is_product or torch.equal(a, e), name
    if device == "cuda":  # a CPU's products of half precision have no other result
        assert not any(a.ndim == 2 and torch.equal(a, a.half().float()) for a in actual[3:])


@pytest.mark.parametrize("how", [contextlib.nullcontext, one_by_one], ids=["whole", "operators"])
def test_a_second_layer_reads_what_the_first_has_rounded(how, device):
    """With the residual stream in float32 no layer behind the first casts its input."""
    layer, sequences, half = make(device).eval(), sequences_of(device), torch.float16
    x = stream_of(device).detach()
    with torch.no_grad(), torch.autocast(device, half), how():
        first = run_layer(parts_of(layer), Stream(x, x), sequences)
        assert (first.x.dtype, first.residual.dtype) == (half, torch.float32)
        assert torch.equal(first.x, first.residual.half())
        second = run_layer(parts_of(layer), first, sequences)
        plain = Stream(first.residual, first.residual)
        assert_same(second, run_layer(parts_of(layer), plain, sequences), rtol=0, atol=0)
        with Counter() as counter:
            run_layer(parts_of(layer), first, sequences)
        with Counter() as casting:
            run_layer(parts_of(layer), plain, sequences)
    assert casting.calls["_to_copy"] == counter.calls["_to_copy"] + 1


@pytest.mark.parametrize("name", ["attention.self.key", "intermediate.dense"])
def test_a_module_that_is_called_reads_the_residual_stream(name, device):
    """In float32 under autocast, as Hugging Face's; only plain layers read it rounded."""
    layer, sequences, half, seen = make(device).eval(), sequences_of(device), torch.float16, []
    x = stream_of(device).detach()
    layer.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast(device, half):
        run_layer(parts_of(layer), Stream(x.half(), x), sequences)
    assert [one.dtype for one in seen] == [torch.float32]


@pytest.mark.parametrize("trained", ["none", "x", "weights", "biases", "one"])
def test_what_is_not_trained_gets_no_gradient_and_no_product(trained, device, runs):
    layer, sequences = make(device), sequences_of(device)
    x = stream_of(device).detach().requires_grad_(trained == "x")
    for name, parameter in layer.named_parameters():
        is_trained = {"weights": name.endswith("weight"), "biases": name.endswith("bias")}
        is_one = name == "attention.self.key.weight"
        parameter.requires_grad_(is_trained.get(trained, trained == "one" and is_one))
    if trained == "none":
        with one_by_one():
            expected = run_layer(parts_of(layer), Stream(x, x), sequences)
        actual = run_layer(parts_of(layer), Stream(x, x), sequences)
        assert_same(actual, expected)
        assert not actual.x.requires_grad
    else:
        actual, expected = both(layer, x, sequences)
        assert_same(actual, expected)
        with Counter() as counter:
            results(layer, x, sequences)
        # four backwards of products beside the six of the forward, and those of weights
        weights = {"x": 0, "weights": 4, "biases": 0, "one": 1}[trained]
        products = counter.calls["mm"] + counter.calls["addmm"]
        assert products == 4 + 3 + (trained == "x") + weights
    assert all(runs)


def test_without_gradients_nothing_is_saved_and_both_branches_are_one(device, runs):
    layer, sequences = make(device, training=False), sequences_of(device, dropout=False)
    x = stream_of(device)
    with one_by_one(), torch.no_grad():
        expected = run_layer(parts_of(layer), Stream(x, x), sequences)
    with torch.no_grad():
        y, residual = run_layer(parts_of(layer), Stream(x, x), sequences)
    assert y is residual
    assert y.grad_fn is None
    assert_same([y], expected[:1])
    assert runs == [True]


@pytest.mark.parametrize("save", ["z", "y"])
def test_the_norms_save_what_the_module_says(save, device, runs):
    layer, sequences = make(device), sequences_of(device)
    layer.attention.output.save = layer.output.save = save
    assert_same(*both(layer, stream_of(device), sequences))
    assert runs == [True]


def test_a_second_backward_and_hooks_on_saved_tensors(device):
    layer, sequences = make(device), sequences_of(device)
    x, packed = stream_of(device), []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
    assert len(packed) > 8
    first = torch.autograd.grad(y.sum(), [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert_same(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), [x])


def test_a_weight_that_changes_before_the_backward_is_an_error(device):
    layer, sequences = make(device), sequences_of(device)
    x = stream_of(device)
    for module in (layer.output.dense, layer.intermediate.dense, layer.output.LayerNorm):
        y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
        with torch.no_grad():
            module.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_gradients_cannot_be_differentiated(device):
    layer, sequences = make(device), sequences_of(device)
    x = stream_of(device)
    y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a layer: its gradients cannot be differentiated"):
        dx.sum().backward()


class Adapted(nn.Module):
    """A linear layer with a low-rank sum, as LoRA makes it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False, device=base.weight.device)
        self.up = nn.Linear(4, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(layer, names):
    layer.requires_grad_(False)
    this = layer.attention.self
    for name in names:
        setattr(this, name, Adapted(getattr(this, name)))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("names", [["query", "value"], ["key"]], ids="-".join)
def test_projections_that_are_called_are_a_part_before(names, autocast, device, runs):
    layer, sequences = make(device), sequences_of(device)
    adapt(layer, names)
    contexts = {True: lambda: torch.autocast(device, torch.float16), False: contextlib.nullcontext}
    x = stream_of(device, torch.float16 if autocast else torch.float32)
    assert_same(*both(layer, x, sequences, context=contexts[autocast]))
    with torch.no_grad(), contexts[autocast]():
        assert not run_layer(parts_of(layer), Stream(x, x), sequences).x.requires_grad
    assert runs == [True, True]


def test_a_called_projection_is_called_once(device, runs):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    calls = []
    layer.attention.self.value.register_forward_hook(lambda *_: calls.append(1))
    assert_same(*both(layer, x, sequences))
    assert len(calls) == 2
    assert runs == [True]


@pytest.mark.parametrize("trained", ["all", "norms", "adapters"])
def test_no_more_is_saved_than_by_the_operators(trained, device, runs):
    """What a product reads is kept for its weight's gradient only."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    if trained == "norms":
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("LayerNorm" in name)
    if trained == "adapters":
        adapt(layer, ["query"])
    sizes = []
    for context in (one_by_one, contextlib.nullcontext):
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run_layer(parts_of(layer), Stream(x, x), sequences)
        sizes.append(sum(saved.values()))
        del outputs
    assert sizes[1] <= sizes[0]
    assert runs == [True]


def test_what_was_saved_is_freed_by_the_backward(device):
    """Not only with the node, which the loss keeps."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    saved = []

    def pack(tensor):
        saved.append(weakref.ref(copied := tensor.clone()))
        return copied

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
    y.sum().backward()
    assert saved
    assert not any(one() is not None for one in saved)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_branch_without_a_gradient_is_no_pass_over_zeros(wanted, device, monkeypatch):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    given, backward = [], whole_layer.LayerNormFunction.backward
    monkeypatch.setattr(
        whole_layer.LayerNormFunction,
        "backward",
        lambda ctx, *gradients: (given.append(gradients), backward(ctx, *gradients))[1],
    )
    results(layer, x, sequences, wanted)
    assert [one is None for one in given[0]] == [wanted == 1, wanted == 0]


def test_attention_is_in_the_products_dtype_whatever_an_adapter_returns(device, monkeypatch):
    """As autocast has it for PyTorch's own attention."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    adapt(layer, ["query", "value"])
    layer.attention.self.query.forward = lambda x: x.float()
    seen, forward = [], whole_layer.AttentionFunction.forward
    monkeypatch.setattr(
        whole_layer.AttentionFunction,
        "forward",
        lambda ctx, kernels, q, *others: (seen.append(q.dtype), forward(ctx, kernels, q, *others))[
            1
        ],
    )
    results(layer, x, sequences, context=lambda: torch.autocast(device, torch.float16))
    assert seen == [torch.float16]


def test_explain_sees_every_operator(device, runs):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    with events.listen() as heard:
        run_layer(parts_of(layer), Stream(x, x), sequences)
    names = [event.operator for event in heard if isinstance(event, events.OperatorRun)]
    norm = "dropout_add_layer_norm"
    assert names == ["attention_qkvpacked", norm, "bias_gelu", norm]
    assert runs == [False]


def test_what_the_kernels_would_read_beyond_is_refused(device):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    whole = parts_of(layer).whole
    strided = x.detach().T.contiguous().T
    dtype = torch.float32

    def fits(x, residual):
        return whole._fits(x, residual, sequences, whole.parameters(), dtype)

    assert fits(x, x)
    assert not fits(strided, x)
    assert not fits(x, strided)
    assert not fits(x, x[:5])
    for linear in (layer.intermediate.dense, layer.output.dense, layer.attention.output.dense):
        bias, linear.bias = linear.bias, nn.Parameter(linear.bias[:5].detach().clone())
        assert not fits(x, x)
        linear.bias = bias
    assert fits(x, x)


def drop_bias(layer, x, sequences):
    layer.attention.self.key.bias = None


def add_hook(layer, x, sequences):
    layer.intermediate.dense.register_forward_hook(lambda *_: None)


def swap_activation(layer, x, sequences):
    layer.intermediate.intermediate_act_fn = torch.tanh


def mix_dtypes(layer, x, sequences):
    layer.output.LayerNorm.double()


def transpose(layer, x, sequences):
    weight = layer.output.dense.weight
    layer.output.dense.weight = nn.Parameter(weight.detach().T.contiguous().T)


def subclass(layer, x, sequences):
    class Own(nn.Parameter):
        pass

    layer.output.dense.weight = Own(layer.output.dense.weight.detach())


def wide(layer, x, sequences):
    layer.attention.self.num_attention_heads = 1
    for linear in (
        layer.attention.self.query,
        layer.attention.self.key,
        layer.attention.self.value,
    ):
        linear.weight = nn.Parameter(torch.randn(136, 32) / 6)
        linear.bias = nn.Parameter(torch.randn(136))
    layer.attention.output.dense.weight = nn.Parameter(torch.randn(32, 136) / 12)


def few_rows(layer, x, sequences):
    rows = Rows.where(torch.arange(TOKENS) % 3 == 0, sequences.cu_seqlens, 3, 5)
    return x, sequences.only(rows)


def general_mask(layer, x, sequences):
    mask = torch.rand(3, 1, 7, 7) < 0.7
    return x, Sequences(
        sequences.cu_seqlens, 7, mask | torch.eye(7, dtype=torch.bool), sequences.rng
    )


def not_contiguous(layer, x, sequences):
    return x.detach().T.contiguous().T.requires_grad_(), sequences


CHANGES = [
    drop_bias, add_hook, swap_activation, transpose, subclass, few_rows, general_mask,
    not_contiguous,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_layers_and_calls_run_operator_by_operator(change, runs):
    layer, x, sequences = make("cpu"), stream_of("cpu"), sequences_of("cpu")
    x, sequences = change(layer, x, sequences) or (x, sequences)
    actual, expected = both(layer, x, sequences)
    assert_same(actual, expected)
    assert not any(runs)


@pytest.mark.parametrize("change", [wide, mix_dtypes], ids=lambda change: change.__name__)
def test_what_no_kernel_takes_runs_as_the_operators_say(change, runs):
    layer, x, sequences = make("cpu"), stream_of("cpu"), sequences_of("cpu")
    change(layer, x, sequences)
    with backend.use(None):  # on a CPU by plain PyTorch, as refused calls do on a GPU
        expected = results(layer, x, sequences)
    assert not any(runs)
    with pytest.raises(backend.BackendUnavailable):
        results(layer, x, sequences)
    assert not any(runs)
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("part", ["attention.output", "output"])
def test_a_norm_of_another_size_is_an_error(part, device, runs):
    for name, module in (("LayerNorm", nn.LayerNorm(16)), ("dense", nn.Linear(64, 16))):
        layer = make(device)
        end = layer.get_submodule(part)
        if name == "dense" and part == "attention.output":
            module = nn.Linear(32, 16)
        setattr(end, name, module.to(device))
        with pytest.raises(ValueError, match="LayerNorm"):
            results(layer, stream_of(device), sequences_of(device))
    assert not any(runs)


def test_parameters_that_change_later_are_seen(device, runs):
    """A whole layer is kept with the parts, its parameters are not."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    parts = parts_of(layer)
    run_layer(parts, Stream(x, x), sequences)
    layer.output.dense.weight.data = layer.output.dense.weight.data.clone() * 2
    layer.intermediate.dense.bias = nn.Parameter(torch.ones(64, device=device))
    y, _ = run_layer(parts, Stream(x, x), sequences)
    with one_by_one():
        expected, _ = run_layer(parts, Stream(x, x), sequences)
    torch.testing.assert_close(y, expected)
    layer.intermediate.dense.bias = None
    run_layer(parts, Stream(x, x), sequences)
    assert runs == [True, True, False]


def test_a_step_has_fewer_operators(device):
    """Autocast's casts of weights and gradients, and sums of branches, which operators have."""
    layer, sequences = make(device), sequences_of(device)
    counts = []
    for context in (one_by_one, contextlib.nullcontext):
        x = stream_of(device, torch.float16)
        with context(), Counter() as counter:
            results(layer, x, sequences, context=lambda: torch.autocast(device, torch.float16))
        counts.append(counter.calls.total())
    assert counts[1] < counts[0]


def test_layers_that_train_use_it(device, runs):
    """Models' layers do: the last, of which a model reads few rows, may not."""
    config = fastbert.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = fastbert.BertModel(config).to(device).train()
    model(torch.randint(40, (2, 9), device=device)).last_hidden_state.sum().backward()
    assert runs == [True, True]
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert layers.WholeLayer is whole_layer.WholeLayer


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_nobody_has_is_freed_at_once(training, device):
    """Not when the garbage collector finds a cycle: weights are most of a GPU's memory."""
    layer, x = make(device, training), stream_of(device)
    sequences = sequences_of(device, dropout=training)
    parts = parts_of(layer)
    gc.collect()
    gc.disable()
    try:
        y, _ = run_layer(parts, Stream(x, x), sequences)
        y.sum().backward()
        weight = weakref.ref(layer.output.dense.weight)
        del layer, parts, y, _
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("trained", "count"),
    [
        ("", 4),
        ("none", 0),
        ("attention.output.LayerNorm", 1),
        ("attention.output.dense.bias", 1),
        ("output.LayerNorm", 1),
        ("output.dense.bias", 1),
        ("intermediate.dense.bias", 1),
        ("attention.self.key.bias", 1),
    ],
)
def test_sums_for_trained_parameters_alone_in_one_launch(trained, count, device, monkeypatch):
    """Those of a frozen layer, as under LoRA, would be thrown away. trained: how names begin."""
    from fastbert.kernels import partial_sums

    launches, launch = [], partial_sums._launch
    layer, x, sequences = make(device), stream_of(device), sequences_of(device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    with one_by_one():
        expected = results(layer, x, sequences)
    monkeypatch.setattr(partial_sums, "_launch", lambda p: (launches.append(len(p)), launch(p)))
    actual = results(layer, x, sequences)
    assert not any(one is None for one in actual)
    assert_same(actual, expected, rtol=1e-4, atol=1e-5)
    assert launches == [count] * bool(count)
