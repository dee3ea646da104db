"""The interface of what multiplies for an encoder's linear layers in place of `F.linear`."""

import contextlib
from collections.abc import Sequence

from torch import Tensor, nn

PRODUCTS = "_fastbert_products"  # attribute that holds a module's `Products`


class Products:
    """Multiplies for plain linear layers in place of `F.linear`: in FP8, or with copied weights.

    Linear layers have it as their attribute `PRODUCTS`. The encoder's list of layers has one under
    the same name, whose `begin` is called at each forward. reads_each_bias: whether `product`
    should get each bias separately, not all of them concatenated.
    """

    reads_each_bias = False

    def begin(self, x: Tensor, training: bool) -> None:
        """Called when a forward of the encoder begins; recorded if the forward is a CUDA graph."""

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """A context that undoes at its end what forwards inside it have changed."""
        return contextlib.nullcontext()

    def product(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> Tensor | None:
        """`x @ weight.T + bias` with all weights concatenated; None leaves it to `F.linear`."""
        return None

    def feed_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        output: "Products",
        output_weight: Tensor,
        approximate: str,
    ) -> Tensor | None:
        """`gelu(x @ weight.T + bias) @ output_weight.T`; None leaves it to `product`."""
        return None

    def left_out(self, module: nn.Module) -> None:
        """Tells that the layer `module` itself is called, because its weight may not be read."""
