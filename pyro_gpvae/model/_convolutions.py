r"""Transposed convolutions in the formulation that was measured to be fastest on a CPU."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ConvTranspose2d"]

# from this many output channels on, the library's own transposed convolution is faster
_FEW = 4


class ConvTranspose2d(nn.ConvTranspose2d):
    r"""``nn.ConvTranspose2d`` with the same parameters and values, faster where it can be.

    Libraries for CPUs spend on a transposed convolution with one or three output channels, the
    last layer of a decoder, several times what its multiplications cost. On a CPU it is therefore

    - one matrix product with the kernel, whose columns are then added up where they overlap, for
      one output channel;
    - for two or three channels, if the kernel is 4, the stride 2 and the padding 1, an ordinary
      2×2 convolution: row :math:`2 n - 1 + a` of the output, a = 0 or 1, needs only the rows n
      and n - 1 of the input, with the rows a and 2 + a of the kernel.

    Other layers keep torch's own, in channels-last memory when no gradients are recorded (with
    them it gains nothing). All are sums of the same products: values and derivatives of every
    order are equal up to rounding. On other devices than the CPU nothing changes.
    ``docs/performance.md`` says how much it saves.

    Example:
        >>> layer = ConvTranspose2d(8, 1, 4, stride=2, padding=1)
        >>> layer(torch.zeros(5, 8, 7, 7)).shape
        torch.Size([5, 1, 14, 14])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        ours = input.device.type == "cpu" and input.dim() == 4 and self.groups == 1
        # a dilated kernel allows more, which fold does not know
        ours &= all(int(e) < s for e, s in zip(self.output_padding, self.stride, strict=True))
        if not ours or output_size is not None:
            return super().forward(input, output_size)
        if self.out_channels == 1:
            return self._columns(input)
        if self.out_channels < _FEW and self._doubles():
            return self._subpixel(input)
        if torch.is_grad_enabled():
            return super().forward(input)
        return super().forward(_channels_last(input))

    def _columns(self, x: Tensor) -> Tensor:
        size, kernel, stride, padding, dilation = (
            cast(tuple[int, int], pair)
            for pair in (self._size(x), self.kernel_size, self.stride, self.padding, self.dilation)
        )
        kernels = self.weight.flatten(1).t().expand(len(x), -1, -1)
        images = functional.fold(kernels.bmm(x.flatten(2)), size, kernel, dilation, padding, stride)
        return images if self.bias is None else images + self.bias[:, None, None]

    def _subpixel(self, x: Tensor) -> Tensor:
        (batch, _, rows, columns), (height, width) = x.shape, self._size(x)
        fan_in, fan_out = self.weight.shape[:2]
        # (in, out, u, a, v, b), row 2 u + a and column 2 v + b, to ((a, b, out), u, v, in)
        kernel = self.weight.reshape(fan_in, fan_out, 2, 2, 2, 2).flip(2, 4)
        kernel = kernel.permute(3, 5, 1, 2, 4, 0).reshape(4 * fan_out, 2, 2, fan_in)
        bias = None if self.bias is None else self.bias.repeat(4)
        y = functional.conv2d(_channels_last(x), kernel.movedim(-1, 1), bias, padding=1)
        y = y.movedim(1, -1).reshape(batch, rows + 1, columns + 1, 2, 2, fan_out).transpose(2, 3)
        y = y.reshape(batch, 2 * rows + 2, 2 * columns + 2, fan_out)
        return y[:, 1 : 1 + height, 1 : 1 + width].movedim(-1, 1)

    def _doubles(self) -> bool:
        shape = (self.kernel_size, self.stride, self.padding, self.dilation)
        return shape == ((4, 4), (2, 2), (1, 1), (1, 1))

    def _size(self, x: Tensor) -> tuple[int, int]:
        height, width = (
            (small - 1) * self.stride[i]
            - 2 * int(self.padding[i])
            + self.dilation[i] * (self.kernel_size[i] - 1)
            + self.output_padding[i]
            + 1
            for i, small in enumerate(x.shape[2:])
        )
        return height, width


def _channels_last(x: Tensor) -> Tensor:
    """The same images, with the channels of a pixel next to each other in memory."""
    # not contiguous(memory_format=...), which torch.func.vmap does not support
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
