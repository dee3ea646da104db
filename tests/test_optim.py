"""LAMB against a plain float64 reading of the paper's and of NVIDIA's algorithm."""

import copy

import pytest
import torch

from fastbert.optim import Lamb

SHAPES = ((7, 5), (3,), (4, 1, 2), (11,), ())
DECAYS = (0.01, 0.0)
RATE, BETAS, EPS = 0.02, (0.8, 0.95), 1e-3
VARIANTS = ("paper", "nvidia")


def make_parameters(dtype=torch.float64):
    """Of very different norms, one of them 0."""
    draw = torch.Generator().manual_seed(0)
    values = [
        10.0 ** (number - 2) * torch.randn(shape, generator=draw, dtype=torch.float64)
        for number, shape in enumerate(SHAPES)
    ]
    values[1].zero_()
    return [value.to(dtype).requires_grad_() for value in values]


def make_gradients(step, scale=1.0):
    draw = torch.Generator().manual_seed(100 + step)
    gradients = [scale * torch.randn(s, generator=draw, dtype=torch.float64) for s in SHAPES]
    gradients[4].zero_()
    return gradients


def make_groups(parameters):
    return [
        {"params": parameters[:2], "weight_decay": DECAYS[0]},
        {"params": parameters[2:], "weight_decay": DECAYS[1]},
    ]


def oracle(parameters, steps, variant, max_grad_norm=1.0):
    """One element after the other of Algorithm 2, in Python's own float64.

    steps: gradients of each step; a list in which a parameter's is None leaves it out
    """
    values = [p.detach().flatten().tolist() for p in parameters]
    moments = [([0.0] * len(x), [0.0] * len(x)) for x in values]
    counts = [0] * len(values)
    for gradients in steps:
        lists = [None if g is None else g.flatten().tolist() for g in gradients]
        divisor = 1.0
        if variant == "nvidia":
            norm = sum(e * e for g in lists if g is not None for e in g) ** 0.5
            divisor = max(1.0, norm / max_grad_norm)
        for number, (x, (m, v)) in enumerate(zip(values, moments, strict=True)):
            if lists[number] is None:
                continue
            counts[number] += 1
            decay = DECAYS[0] if number < 2 else DECAYS[1]
            u = []
            for i, element in enumerate(lists[number]):
                g = element / divisor
                m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
                v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
                mean = m[i] / (1 - BETAS[0] ** counts[number])
                square = v[i] / (1 - BETAS[1] ** counts[number])
                u.append(mean / (square**0.5 + EPS) + decay * x[i])
            of_x, of_u = (sum(e * e for e in vector) ** 0.5 for vector in (x, u))
            ratio = of_x / of_u if of_x and of_u else 1.0
            if variant == "nvidia" and decay == 0:
                ratio = 1.0
            x[:] = [a - RATE * ratio * b for a, b in zip(x, u, strict=True)]
    return [
        torch.tensor(x, dtype=torch.float64).view(p.shape)
        for x, p in zip(values, parameters, strict=True)
    ]


def make_lamb(parameters, variant="paper", **options):
    options = {"lr": RATE, "betas": BETAS, "eps": EPS} | options
    return Lamb(make_groups(parameters), **options, variant=variant)


def run(optimizer, parameters, steps):
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone().to(parameter.dtype)
        optimizer.step()


def assert_equal(parameters, expected, tolerance=1e-12):
    for number, (parameter, truth) in enumerate(zip(parameters, expected, strict=True)):
        error = (parameter.detach().double() - truth).abs().max()
        assert error <= tolerance * truth.abs().max(), f"{number}: {error:.3g}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1e-3, 3.0], ids=["small gradients", "large gradients"])
def test_takes_the_steps_of_the_oracle(variant, scale):
    parameters = make_parameters()
    steps = [make_gradients(step, scale) for step in range(10)]
    expected = oracle(parameters, steps, variant)
    run(make_lamb(parameters, variant), parameters, steps)
    assert_equal(parameters, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comparison_tells_the_variants_apart(variant):
    parameters = make_parameters()
    steps = [make_gradients(step, 3.0) for step in range(10)]
    other = oracle(parameters, steps, VARIANTS[variant == "paper"])
    run(make_lamb(parameters, variant), parameters, steps)
    for parameter, value in zip(parameters[:4], other, strict=False):
        assert (parameter - value).abs().max() > 1e-6 * value.abs().max()


def test_a_parameter_without_gradient_stays_and_counts_its_own_steps():
    parameters = make_parameters()
    steps = [make_gradients(step) for step in range(6)]
    for step in (0, 3):
        steps[step][0] = steps[step][3] = None
    expected = oracle(parameters, steps, "paper")
    run(make_lamb(parameters), parameters, steps)
    assert_equal(parameters, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0], ids=["small gradients", "gradients"])
def test_low_precision_stays_near_the_oracle(dtype, variant, scale):
    parameters = make_parameters(dtype)
    steps = [[g.to(dtype).double() for g in make_gradients(step, scale)] for step in range(5)]
    expected = oracle(parameters, steps, variant)
    run(make_lamb(parameters, variant), parameters, steps)
    # each step rounds the parameter, in float32 the moments and the update too
    roundings = 10 if dtype == torch.float32 else 3
    assert_equal(parameters, expected, tolerance=roundings * torch.finfo(dtype).eps)


def test_float16_gradients_are_not_rounded_where_they_are_unscaled():
    """Their true values, about 1e-8, are too small for float16."""
    parameter = torch.ones(3, dtype=torch.float16, requires_grad=True)
    twin = torch.ones(3, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.tensor([1e-2, -2e-2, 3e-2]).half()
    twin.grad = parameter.grad.double() / 2**20
    optimizer = Lamb([parameter], lr=0.1, eps=1e-10)
    optimizer.grad_scale = torch.tensor(2.0**20)
    optimizer.step()
    Lamb([twin], lr=0.1, eps=1e-10).step()
    assert_equal([parameter], [twin.detach()], tolerance=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 3])
def test_a_step_that_is_to_be_skipped_changes_nothing(variant, bad, when):
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer, other = make_lamb(parameters, variant), make_lamb(twins, variant)
    for optimizer_, members in ((optimizer, parameters), (other, twins)):
        optimizer_.found_inf = torch.zeros(())
        run(optimizer_, members, [make_gradients(step) for step in range(when)])
    gradients = make_gradients(7)
    gradients[0][0, 0] = bad
    optimizer.found_inf = torch.ones(())
    run(optimizer, parameters, [gradients])
    optimizer.found_inf = torch.zeros(())
    for members, optimizer_ in ((parameters, optimizer), (twins, other)):
        run(optimizer_, members, [make_gradients(step) for step in range(8, 10)])
    assert all(map(torch.equal, parameters, twins))
    assert all(parameter.isfinite().all() for parameter in parameters)


def test_grad_scaler_scales_and_skips_without_the_hosts_help():
    """It hands its scale and what it found to the optimizer, and never reads the flag itself."""
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer, other = make_lamb(parameters), make_lamb(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        gradients = make_gradients(step)
        loss = sum((p * g.float()).sum() for p, g in zip(parameters, gradients, strict=True))
        scaler.scale(loss).backward()
        if step == 1:
            parameters[2].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 1:
            run(other, twins, [gradients])
    assert_equal(parameters, [twin.detach().double() for twin in twins], tolerance=1e-6)
    assert scaler.get_scale() == 512.0


def test_reads_a_learning_rate_on_the_device():
    parameters, twins = make_parameters(), make_parameters()
    rate = torch.zeros(())
    optimizer, other = make_lamb(parameters, lr=rate), make_lamb(twins)
    for step in range(3):
        rate.fill_(0.125 * (step + 1))
        for group in other.param_groups:
            group["lr"] = 0.125 * (step + 1)
        run(optimizer, parameters, [make_gradients(step)])
        run(other, twins, [make_gradients(step)])
    assert_equal(parameters, [twin.detach() for twin in twins])


def test_goes_on_from_its_state_dict(tmp_path):
    parameters = make_parameters()
    steps = [make_gradients(step) for step in range(6)]
    expected = oracle(parameters, steps, "paper")
    optimizer = make_lamb(parameters)
    run(optimizer, parameters, steps[:3])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = make_lamb(parameters)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(fresh, parameters, steps[3:])
    assert_equal(parameters, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_state_dict_has_the_moments_of_16_bit_parameters_in_float32(dtype):
    parameters = make_parameters(dtype)
    optimizer, other = make_lamb(parameters), make_lamb(parameters)
    run(optimizer, parameters, [make_gradients(0)])
    other.load_state_dict(optimizer.state_dict())
    for parameter in parameters:
        for name in ("exp_avg", "exp_avg_sq"):
            moment, loaded = (one.state[parameter][name] for one in (optimizer, other))
            assert moment.dtype == loaded.dtype == torch.float32
            assert torch.equal(moment, loaded)


def test_a_copy_keeps_its_variant():
    parameters = make_parameters()
    steps = [make_gradients(step, 3.0) for step in range(3)]
    expected = oracle(parameters, steps, "nvidia", max_grad_norm=0.5)
    optimizer = make_lamb(parameters, "nvidia", max_grad_norm=0.5)
    optimizer, parameters = copy.deepcopy((optimizer, parameters))
    run(optimizer, parameters, steps)
    assert_equal(parameters, expected)


def test_without_a_limit_the_gradients_keep_their_norm():
    parameters = make_parameters()
    steps = [make_gradients(step, 3.0) for step in range(3)]
    expected = oracle(parameters, steps, "nvidia", max_grad_norm=1e9)
    run(make_lamb(parameters, "nvidia", max_grad_norm=None), parameters, steps)
    assert_equal(parameters, expected)


def test_calls_its_closure_with_gradients():
    parameter = torch.ones(3, requires_grad=True)
    optimizer = Lamb([parameter])

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (parameter < 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_replays_its_steps(variant):
    """No host waits in a step, and what changes lies on the device."""
    parameters = [p.detach().cuda().requires_grad_() for p in make_parameters()]
    expected = oracle(parameters, [make_gradients(step) for step in range(6)], variant)
    rate = torch.full((), RATE, device="cuda", dtype=torch.float64)
    optimizer = make_lamb(parameters, variant, lr=rate)
    for parameter, gradient in zip(parameters, make_gradients(0), strict=True):
        parameter.grad = gradient.cuda()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 6):
        for parameter, gradient in zip(parameters, make_gradients(step), strict=True):
            parameter.grad.copy_(gradient)
        graph.replay()
    assert_equal([p.detach().cpu() for p in parameters], expected)
