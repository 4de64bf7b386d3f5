"""A network in one file: beside the weights stands what rebuilds it, and what its input is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from blocksearch.space import Cell, OpBuilder, OwnOps
from blocksearch.supernet.stack import CellNetwork, Stack
from evaluation.data.preprocessing import Preprocessing
from evaluation.errors import InputError
from evaluation.files.bounded import parse_json
from evaluation.files.names import RETRAINED
from evaluation.records import ModelRecord
from evaluation.training.retrain import RetrainJob
from evaluation.training.weights import read_weights
from netsearch.space.genome import NetworkSpec
from netsearch.space.network import builder

BAD_NETWORK = (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError)
MAX_CELLS = 10_000  # that a file from a stranger may ask for


@dataclass(frozen=True)
class Description:
    """All but the weights of a network.

    Attributes:
        spec: The network.
        cells: The cells that it names.
        preprocessing: Of its images; it holds their shape and the classes.
    """

    spec: NetworkSpec
    cells: Mapping[str, Cell]
    preprocessing: Preprocessing

    def builder(self) -> Stack:
        """Return what builds the network, with fresh weights."""
        shape, classes = self.preprocessing.image_shape, len(self.preprocessing.class_names)
        return builder(self.spec, self.cells, shape, classes)

    def check_depth(self, tensors: int) -> None:
        """Refuse more cells than the file has tensors: each has some, and takes time to build.

        Raises:
            ValueError: If there are more.
        """
        if (depth := sum(stage.repeats for stage in self.spec.stages)) > tensors:
            raise ValueError(f"the network has {depth:,} cells, the file {tensors:,} tensors")

    def to_text(self) -> str:
        """Return it as a line of JSON; equal networks give equal lines."""
        data = {
            "spec": self.spec.to_json(),
            "cells": {name: self.cells[name].to_json() for name in self.spec.blocks},
            "preprocessing": self.preprocessing.to_json(),
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str, own: OwnOps = ()) -> Self:
        """Rebuild from `to_text`, with a user's own ops.

        Raises:
            ValueError: If the text has another form, or the network is absurdly large.
        """
        try:
            data: Any = parse_json(text.encode())
            spec = NetworkSpec.from_json(data["spec"])
            cells = {str(name): Cell.from_json(cell, own) for name, cell in data["cells"].items()}
            preprocessing = Preprocessing.from_json(data["preprocessing"])
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a network: {error!r}") from error
        if missing := set(spec.blocks) - set(cells):
            raise ValueError(f"the network names cells that are not there: {sorted(missing)}")
        if (depth := sum(stage.repeats for stage in spec.stages)) > MAX_CELLS:
            raise ValueError(f"the network has {depth:,} cells, at most {MAX_CELLS:,} are read")
        return cls(spec, cells, preprocessing)


def retrain_job(
    record: ModelRecord,
    spec: NetworkSpec,
    cells: Mapping[str, Cell],
    preprocessing: Preprocessing,
    *,
    folder: str = RETRAINED,
) -> RetrainJob:
    """Return a network to retrain into `folder`, whose weights will say what they are of."""
    description = Description(spec, cells, preprocessing)
    return RetrainJob(folder, record, description.builder(), description.to_text())


def load_stack(path: Path, own: OwnOps = ()) -> Stack:
    """Return the network of a file of weights, without these; it may have a user's own ops.

    Raises:
        InputError: If the file is missing, damaged, or of no network of ours.
    """
    state, text = read_weights(path)
    try:
        description = Description.from_text(text, own)
        description.check_depth(len(state))
        return description.builder()
    except BAD_NETWORK as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: expected weights with their network: {reason}") from error


def load_network(
    path: Path, ops: Mapping[str, OpBuilder] | OwnOps = ()
) -> tuple[CellNetwork, Preprocessing]:
    """Rebuild a network from the file of its weights, in evaluation mode on the CPU.

    Args:
        path: The file.
        ops: A user's own, by name; the file knows but their names.

    Raises:
        InputError: If the file is missing, damaged, of no network of ours, or its tensors are not
            those of the network that it describes.
    """
    state, text = read_weights(path)
    try:
        description = Description.from_text(text, tuple(dict(ops).items()))
        description.check_depth(len(state))
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            network = description.builder()()
        expected = network.state_dict()
        network.load_state_dict(state, assign=True)
        other = [name for name, tensor in state.items() if tensor.dtype != expected[name].dtype]
        if other:
            raise ValueError(f"tensors of another type: {', '.join(other[:3])}")
    except BAD_NETWORK as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: expected weights with their network: {reason}") from error
    network.eval().to(memory_format=torch.channels_last)
    return network, description.preprocessing
