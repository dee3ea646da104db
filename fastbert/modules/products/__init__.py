"""What multiplies for an encoder's linear layers in place of `F.linear`."""

import contextlib
from collections.abc import Sequence

from torch import Tensor, nn

PRODUCTS = "_fastbert_products"  # attribute that holds a module's `Products`


class Products:
    """What multiplies for plain linear layers in place of `F.linear`: in FP8, by copies of weights.

    The attribute `PRODUCTS` of each layer, and of the encoder's list of layers, which is told of
    forwards.
    reads_each_bias: whether `product` had better be given each bias by itself than all joined.
    """

    reads_each_bias = False

    def begin(self, x: Tensor, training: bool) -> None:
        """Called when a forward of the encoder begins, in a CUDA graph as a part of it."""

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """Takes back at its end what forwards inside have changed."""
        return contextlib.nullcontext()

    def product(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> Tensor | None:
        """`x @ weight.T + bias`, both of tensors side by side; None leaves it to `F.linear`."""
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
        """Called where the layer `module` multiplies by itself, as its weight may not be read."""
