"""Networks: those of a space of genomes, made of known cells, on images of one form."""

from collections.abc import Mapping
from dataclasses import dataclass

from blocksearch.space import Cell, OwnOps
from blocksearch.supernet.stack import Stack
from netsearch.space.genome import Genome, GenomeSpace, NetworkSpec
from netsearch.space.network import builder


@dataclass(frozen=True)
class InputForm:
    """What a network must know of its images: shape (C, H, W) and number of classes."""

    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class Networks:
    """The networks that a block library makes on images of one form.

    Attributes:
        space: Where the genomes live.
        cells: Block name to cell.
        image_shape: (C, H, W).
        classes: Number of classes.
    """

    space: GenomeSpace
    cells: Mapping[str, Cell]
    image_shape: tuple[int, int, int]
    classes: int

    @property
    def own(self) -> OwnOps:
        """A user's own ops in the cells."""
        return tuple(dict(pair for cell in self.cells.values() for pair in cell.own).items())

    def stack(self, genome: Genome) -> Stack:
        """Return the network of a genome, without weights."""
        return self.of(self.space.decode(genome))

    def of(self, spec: NetworkSpec) -> Stack:
        """Return the network of a description, without weights."""
        return builder(spec, self.cells, self.image_shape, self.classes)

    def id(self, genome: Genome) -> str:
        """Return the id of a genome's network; equal networks have equal ids."""
        return self.space.decode(genome).id(self.cells)
