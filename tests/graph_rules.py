"""Costs of a written ONNX file, counted by brute force: what the exact costs must agree with."""

from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

FUSED = {"Conv", "Gemm", "BatchNormalization", "Add", "MaxPool", "AveragePool"}
RENAMED = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}


def peak_of_file(path):
    """The most bytes that live at one time, by walking over the ops and asking of every value."""
    model = onnx.load(path)
    graph = model.graph
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del graph.output[0].type.tensor_type.shape.dim[0:1]
    graph.output[0].type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(model, data_prop=True, strict_mode=True).graph
    shaped = [*inferred.value_info, *inferred.input, *inferred.output]
    shapes = {
        one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in shaped
    }
    size = {graph.input[0].name: int(np.prod(shapes[graph.input[0].name]))}
    ops = []
    for node in graph.node:
        reads = [name for name in node.input if name in size]
        if reads and node.op_type != "Shape":  # else a constant, which lies in flash
            size[node.output[0]] = int(np.prod(shapes[node.output[0]]))
            ops.append([node.op_type, reads, node.output[0]])
    assert all(size.values())

    def rename(old, new):
        for op in ops:
            op[1] = [new if name == old else name for name in op[1]]

    for op in [op for op in ops if op[0] in RENAMED]:
        ops.remove(op)
        rename(op[2], op[1][0])
    result = graph.output[0].name
    for op in [op for op in ops if op[0] == "Relu"]:
        (read,) = op[1]
        readers = [other for other in ops if read in other[1]]
        makers = [other for other in ops if other[2] == read]
        if makers and makers[0][0] in FUSED and readers == [op]:
            ops.remove(op)
            rename(op[2], read)
    peak = 0
    for place, (_, _, written) in enumerate(ops):
        there = {graph.input[0].name} | {op[2] for op in ops[:place]}
        wanted = {name for op in ops[place:] for name in op[1]} | {result}
        peak = max(peak, sum(size[name] for name in there & wanted | {written}))
    return peak


def flash_of_file(path):
    """The bytes of the constants of a file that are no shapes."""
    tensors = [numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer]
    return sum(one.nbytes for one in tensors if one.dtype != np.int64)


def kinds_of_op(path):
    """How often each op stands in a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)
