"""Train small networks that stride on odd batches: `odd_batches.py THREADS`, for a test."""

import sys

import torch

from blocksearch.ops import LIGHT_OPS
from blocksearch.relaxation import Gates
from blocksearch.space import Cell, Edge, SearchSpace
from blocksearch.supernet.stack import PlacedCell, Stack
from blocksearch.supernet.supernet import Supernet
from published import ResNet

SHAPE, CLASSES = (3, 8, 8), 4
# Every edge from an input halves the resolution by a skip connection.
SKIPS = Cell(((Edge(0, "skip_connect"), Edge(1, "skip_connect")),), inputs=2)
ONE_BIT = Cell(SKIPS.nodes, inputs=2, one_bit=True)


def networks(channels: int):
    """Yield networks that halve the resolution, each with what it is called with beside images."""
    for cell in (SKIPS, ONE_BIT):
        placed = [PlacedCell(cell, channels, reduction) for reduction in (False, True, False)]
        yield Stack(tuple(placed), SHAPE, CLASSES)(), ()
    space = SearchSpace(LIGHT_OPS, nodes=2)
    supernet = Supernet(space, SHAPE, CLASSES, channels=channels, cells=3, stages=2)
    yield supernet, (Gates(torch.rand(len(supernet.kinds), len(space.edges), len(space.ops))),)
    yield ResNet(1, channels, SHAPE, CLASSES)(), ()


torch.set_num_threads(int(sys.argv[1]))
trained = 0
for channels in (4, 8, 12):
    for batch in (3, 11, 29):
        for network, gates in networks(channels):
            network.train().to(memory_format=torch.channels_last)
            for _ in range(2):
                images = torch.randn(batch, *SHAPE).contiguous(memory_format=torch.channels_last)
                network(images, *gates).square().sum().backward()
            trained += 1
print("trained", trained)
