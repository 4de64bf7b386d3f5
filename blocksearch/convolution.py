"""The convolution of every op: where it is 1x1 and strides, it must not run as PyTorch runs it."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional


class GridConv2d(nn.Conv2d):
    """A convolution that takes the pixels of its stride first where it is 1x1 and has no padding.

    It has the sums, params and multiply-adds of `nn.Conv2d`. But the weight gradient of a strided
    1x1 convolution must not run on a CPU: where there are fewer input channels than a vector has
    numbers, oneDNN writes behind the end of a block of memory (docs/reliability.md).
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel_size != (1, 1) or self.stride == (1, 1) or self.padding != (0, 0):
            return cast(Tensor, super()._conv_forward(input, weight, bias))
        rows, columns = self.stride
        grid = input[..., ::rows, ::columns]
        return functional.conv2d(grid, weight, bias, groups=self.groups)
