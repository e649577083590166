"""The frozen base divided over the ranks (FSDP, Zhao et al. 2023, arXiv 2304.11277), by torch's `fully_shard`.

A rank keeps a part of each matrix of the decoder's blocks, and has one block whole while it runs, forward and backward.
All else is whole on every rank: embedding and head, vectors, and the adapter, whose gradients are added up as ever.
"""

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lora_cli.distributed import World


def shard(decoder: nn.Module, blocks: Iterable[nn.Module], world: World) -> None:
    """Divide the matrices of a decoder's blocks over the ranks, in place. All ranks have to run every forward."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    divided = set[nn.Parameter]()
    for block in blocks:
        small = {parameter for parameter in block.parameters() if parameter.ndim < 2}
        divided |= set(block.parameters()) - small
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    # It has no part of its own: through it each block is fetched while the one before it runs.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - divided)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Have a block whole on every rank while the block of code runs; nothing is done to what is not divided."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def own_rows(parameter: Tensor) -> tuple[int, int]:
    """Return which rows of a parameter this rank keeps: from the first to before the last. All where it is not divided.

    Of a divided one each rank has as many, but for the last ones.
    """
    count = len(parameter) if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return 0, count
    each = -(-count // parameter.device_mesh.size())
    begin = min(count, each * parameter.device_mesh.get_local_rank())
    return begin, min(count, begin + each)


def own_part(parameter: Tensor) -> Tensor:
    """Return the rows of a parameter that this rank keeps."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def keep_own(own: Tensor, first: int, begin: int, rows: Tensor) -> None:
    """Put rows of a parameter, the first of which is its row `begin`, into this rank's part, whose first is `first`."""
    start, end = max(first, begin), min(first + len(own), begin + len(rows))
    if start < end:
        own[start - first : end - first] = rows[start - begin : end - begin]


def as_part(parameter: Tensor, own: Tensor) -> Tensor:
    """Return this rank's rows as its part of a parameter; as they are where that is not divided."""
    if not isinstance(parameter, DTensor):
        return own
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(own, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
