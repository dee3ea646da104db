"""LAMB, the optimizer for large batches, as a torch optimizer with multi-tensor operations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastbert.check import require

VARIANTS = ("paper", "nvidia")


class Lamb(torch.optim.Optimizer):
    """LAMB: AdamW whose step is scaled, for each tensor, to the norm of its weights.

    Algorithm 2 of You et al. 2019 (https://arxiv.org/abs/1904.00962), with phi(z) = z. For each
    tensor x with gradient g, in step t:

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x
        x = x - lr (|x| / |u|) u

    Where |x| or |u| is 0, a case that the paper does not treat, the ratio is 1.

    variant="nvidia" is what NVIDIA trains BERT with (apex.optimizers.FusedLAMB with its defaults:
    apex/optimizers/fused_lamb.py and csrc/multi_tensor_lamb.cu). It differs in two points:

    - First the gradients are divided by max(1, |g| / max_grad_norm), where |g| is the norm over all
      parameters of all groups; in place, except in groups with 16-bit ones. The paper's algorithm
      does not clip. With max_grad_norm=None nothing is clipped here, for callers who clip the
      gradients themselves.
    - Groups with weight_decay = 0, usually biases and LayerNorm, have no ratio: they take an Adam
      step. In the paper every tensor has a ratio, even the key biases of attention, whose gradient
      is 0 except for rounding: the ratio turns that noise into full steps. (FusedLAMB with
      use_nvlamb=True gives all groups a ratio: variant="paper" after clipping to norm 1.)

    Both have bias correction (absent from the paper's first version), weight decay inside the
    ratio, gradient averaging (1 - beta1, not 1), eps outside the root, and ratio 1 for norm 0.

    params: parameters or groups of any floating dtype. Each group is on one device, and all groups
        are on the same one if "nvidia" clips. Moments, updates and norms are in float32 (float64
        for float64), so that a step rounds 16-bit parameters once. Shards of FSDP2 (DTensor) use
        the norms of the whole tensors, which costs one small all-reduce per group.
    lr: a number, or a tensor on the device, whose current value each replay of a CUDA graph reads.

    The host never waits in `step`, and step counts are on the device, so that a CUDA graph can
    record it. As in torch's fused optimizers, if `found_inf`, a float32 tensor (), is 1, the update
    is skipped on the device, and gradients are divided by `grad_scale`; GradScaler sets both.
    Raises ValueError for sparse gradients, options out of range, and groups or loaded states with
    another variant or max_grad_norm than the optimizer's.
    """

    _step_supports_amp_scaling = True  # tells GradScaler that `step` itself skips updates

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: str = "paper",
        max_grad_norm: float | None = 1.0,
    ) -> None:
        require(variant in VARIANTS, "Lamb", f"variant to be one of {VARIANTS}", repr(variant))
        above_0 = max_grad_norm is None or max_grad_norm > 0
        require(above_0, "Lamb", "max_grad_norm > 0 or None", max_grad_norm)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"variant": variant, "max_grad_norm": max_grad_norm})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose lr, betas, eps and weight_decay may differ from the optimizer's."""
        self._check(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, with step counts on the parameters' devices."""
        for group in state_dict["param_groups"]:
            self._check(group)
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            # torch leaves "step" on its saved device, and rounds moments of 16-bit parameters
            for name, saved in state_dict["state"].get(number, {}).items():
                dtype = saved.dtype if name == "step" else _wide_dtype(parameter)
                self.state[parameter][name] = saved.to(parameter.device, dtype)

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a group's options out of range, or other than the optimizer's."""
        options = self.defaults | group
        for name in ("variant", "max_grad_norm"):  # these apply to all gradients together
            value, own = options[name], self.defaults[name]
            require(value == own, "Lamb", f"one {name} for all groups, {own!r}", repr(value))
        betas = options["betas"]
        require(all(0 <= beta < 1 for beta in betas), "Lamb", "betas in [0, 1)", betas)
        for name in ("lr", "eps", "weight_decay"):
            value = options[name]
            require(isinstance(value, Tensor) or value >= 0, "Lamb", f"{name} >= 0", value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates parameters that have a `grad`; returns the closure's loss, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        every = [p for parameters in used for p in parameters]
        if not every:
            return loss
        found_inf = getattr(self, "found_inf", None)
        gradients = [_wide([_local(_gradient(p)) for p in parameters]) for parameters in used]
        self._prepare([g for own in gradients for g in own], every, found_inf)
        for group, parameters, own in zip(self.param_groups, used, gradients, strict=True):
            if parameters:
                self._step_group(group, parameters, own, found_inf)
        return loss

    def _prepare(
        self, gradients: list[Tensor], parameters: list[Tensor], found_inf: Tensor | None
    ) -> None:
        """Unscales and clips the gradients in place, and zeros them if the step is skipped."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        limit = self.defaults["max_grad_norm"]
        if self.defaults["variant"] == "nvidia" and limit is not None:
            devices = {str(gradient.device) for gradient in gradients}
            remedy = "clip them yourself, with max_grad_norm=None"
            is_one = len(devices) == 1
            require(is_one, "Lamb", "gradients on one device to clip", sorted(devices), remedy)
            squares = _sum_over_shards(_squares(gradients), parameters)
            excess = squares.sum().sqrt() / limit
            torch._foreach_div_(gradients, excess.clamp(min=1))
        if found_inf is not None:
            for gradient in gradients:
                gradient.masked_fill_(found_inf.bool(), 0)

    def _step_group(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        g: list[Tensor],
        found_inf: Tensor | None,
    ) -> None:
        """Updates the local shards of one group; only the norms need the other shards."""
        states = [self._state(parameter) for parameter in parameters]
        own = [_local(parameter) for parameter in parameters]
        x = _wide(own)
        m = [_local(state["exp_avg"]) for state in states]
        v = [_local(state["exp_avg_sq"]) for state in states]
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]

        # a skipped step has zero gradients, decays no moment and is not counted
        taken: Any = 1.0 if found_inf is None else 1 - found_inf.float()
        torch._foreach_add_(steps, [taken] * len(steps))
        torch._foreach_mul_(m, 1 - (1 - beta1) * taken)
        torch._foreach_add_(m, g, alpha=1 - beta1)
        torch._foreach_mul_(v, 1 - (1 - beta2) * taken)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)

        counts = torch.stack(steps).double().clamp(min=1)  # 1 - 0.999 is inexact in float32
        correction1, correction2 = 1 - beta1**counts, 1 - beta2**counts
        u = list(torch._foreach_div(v, list(correction2.unbind())))
        torch._foreach_sqrt_(u)
        torch._foreach_add_(u, group["eps"])
        torch._foreach_mul_(u, list(correction1.unbind()))
        torch._foreach_reciprocal_(u)
        torch._foreach_mul_(u, m)
        if group["weight_decay"] != 0:
            torch._foreach_add_(u, x, alpha=group["weight_decay"])

        rates = taken * group["lr"] * torch.ones_like(counts)
        if self.defaults["variant"] == "paper" or group["weight_decay"] != 0:
            squares = torch.stack([_squares(x), _squares(u)], dim=1)
            of_x, of_u = _sum_over_shards(squares, parameters).unbind(dim=1)
            rates = rates * torch.where((of_x > 0) & (of_u > 0), (of_x / of_u).sqrt(), 1)
        torch._foreach_mul_(u, list(rates.unbind()))
        torch._foreach_sub_(x, u)
        if x is not own:
            torch._foreach_copy_(own, x)

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=_wide_dtype(parameter))
        return state


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    require(not gradient.is_sparse, "Lamb", "dense gradients", "a sparse one")
    return gradient


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """The list itself, or copies in float32 or wider if one of the tensors has 16 bits."""
    if all(tensor.dtype.itemsize >= 4 for tensor in tensors):
        return tensors
    copies = [torch.empty_like(tensor, dtype=_wide_dtype(tensor)) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _squares(tensors: list[Tensor]) -> Tensor:
    """The squared norm of each tensor, (N,) float32, or float64 if a tensor is in float64."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square()


def _sum_over_shards(squares: Tensor, parameters: list[Tensor]) -> Tensor:
    """Adds up sums (N, ...) over local shards, one row per parameter, over all ranks."""
    rows: dict[dist.ProcessGroup, list[int]] = {}
    for row, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            for dimension, placement in enumerate(parameter.placements):
                if not placement.is_replicate():
                    rows.setdefault(parameter.device_mesh.get_group(dimension), []).append(row)
    for group, mine in rows.items():
        if len(mine) == len(squares):
            dist.all_reduce(squares, group=group)
        else:
            views = [squares[row] for row in mine]  # indexing by a list copies it from the host
            part = torch.stack(views)
            dist.all_reduce(part, group=group)
            torch._foreach_copy_(views, list(part))
    return squares
