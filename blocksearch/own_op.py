"""What a user's own op must do, tried before any search: cells and supernets rely on it."""

import torch
from torch import Tensor, nn

from blocksearch.convolution import GridConv2d
from blocksearch.ops import Op, in_common_form
from blocksearch.space import OpBuilder
from evaluation.errors import InputError, reason_of, require

SIDES = (9, 7)  # odd: the resolution is rounded up


def check_own_op(name: str, builder: OpBuilder, channels: int) -> None:
    """Refuse an op that does not do what cells rely on.

    Args:
        name: Of the op.
        builder: What builds it.
        channels: A width that the search builds it at; twice that is tried as well.

    Raises:
        InputError: If it cannot be built, run or learn; if its output has another shape, type or
            device than it should, or is not finite; if it changes its input; or if it has a
            convolution that must not run.
    """
    for width in (channels, 2 * channels):
        for stride in (1, 2):
            for searching in (True, False):
                call = f"op {name}({width}, {stride}, {searching})"
                try:
                    with torch.random.fork_rng(devices=[]):
                        _check(call, builder(width, stride, searching), width, stride, searching)
                except InputError:
                    raise
                except Exception as error:  # whatever a stranger's code raises
                    raise InputError(f"{call}: {reason_of(error)}") from error


def _check(call: str, built: object, width: int, stride: int, searching: bool) -> None:
    require(isinstance(built, nn.Module), f"{call}: expected an nn.Module, got {built!r:.80}")
    assert isinstance(built, nn.Module)
    op = in_common_form(built)
    norm = op.norm if isinstance(op, Op) else None
    require(
        not searching or norm is None or not (norm.affine or norm.track_running_stats),
        f"{call}: the norm of an `Op` must be batch_norm(channels, searching)",
    )
    for module in op.modules():
        # The weight gradient of such a convolution overwrites memory, see GridConv2d.
        strided = isinstance(module, nn.Conv2d) and not isinstance(module, GridConv2d)
        require(
            not strided or module.kernel_size != (1, 1) or module.stride == (1, 1),
            f"{call}: a 1x1 convolution with a stride overwrites memory on some CPUs; "
            "blocksearch.GridConv2d takes its place, with the same arguments",
        )
    x = torch.linspace(-1, 1, 2 * width * SIDES[0] * SIDES[1]).reshape(2, width, *SIDES)
    leaf = x.clone().requires_grad_()
    state = leaf * 1.0
    y = op(state)
    require(isinstance(y, Tensor), f"{call}: expected to return a tensor, got {type(y).__name__}")
    expected = (2, width, *(-(-side // stride) for side in SIDES))
    require(
        tuple(y.shape) == expected,
        f"{call} maps {tuple(x.shape)} to {tuple(y.shape)}, expected {expected}: an op keeps the "
        "channels and divides the resolution by its stride, rounded up",
    )
    same = y.dtype == x.dtype and y.device == x.device
    require(same, f"{call}: expected {x.dtype} on {x.device}, got {y.dtype} on {y.device}")
    require(bool(torch.isfinite(y).all()), f"{call}: its output is not finite")
    require(torch.equal(state.detach(), x), f"{call}: it changes its input, which others read too")
    if y.requires_grad:
        y.sum().backward()
