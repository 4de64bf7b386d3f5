"""Any `nn.Module` as one ONNX file, and running such a file with ONNX Runtime.

A file holds its weights, has a dynamic batch, and names neither the machine nor the code that made
it. It is of opset 18 and of the IR version 8 that came with it, so that old runtimes read it too.
"""

import contextlib
import copy
import io
import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from evaluation.cost.paretoblocks_latency import LatencyError, check_model
from evaluation.errors import InputError, not_installed
from evaluation.files.atomic import write_atomic

OPSET = 18  # what the exporter writes without converting
IR_VERSION = 8  # of opset 18; ONNX Runtime 1.16 reads it, and refuses what the exporter writes
BATCH = "batch"  # the name of the dynamic axis
RUN_BATCH = 256
UNTRACEABLE = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)


def save_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    output: str = "logits",
) -> None:
    """Write a module in evaluation mode as one ONNX file with a dynamic batch.

    Equal modules give equal bytes. The module itself stays as it is.

    Args:
        module: Any module of one output; its weights may be on any device.
        inputs: Name of each positional input, in order, to an example of it, (B, ...) float32.
        path: The file; an existing one is replaced.
        metadata: Entries of the file's `metadata_props`.
        output: Name of the output.

    Raises:
        InputError: If the extra is not installed, or an operator does not export; names it.
    """
    _require_onnx()
    program = trace(module, tuple(inputs.values()))
    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=[output],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                optimize=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise InputError(f"{_name(module)} does not export to ONNX: {_why(error)}") from error
    assert exported is not None
    write_atomic(path, finished(exported.model_proto, metadata))


def trace(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Trace a CPU copy of a module in evaluation mode; axis 0 of every input is dynamic.

    Raises:
        InputError: If it does not trace; says the module and the line.
    """
    traced = copy.deepcopy(module).eval().cpu().to(memory_format=torch.contiguous_format)
    # Two images: with one, the tracer would take the batch for a constant.
    examples = tuple(torch.cat([one, one])[:2].cpu().contiguous() for one in inputs)
    dynamic = tuple({0: Dim.DYNAMIC} for _ in examples)
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(traced, examples, dynamic_shapes=dynamic, strict=False)
        except UNTRACEABLE as error:
            fixed = "its batch cannot vary: " if "Constraints violated" in str(error) else ""
            why = fixed + _place(error) + _first_line(error)
            raise InputError(f"{_name(module)} does not export: {why}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def onnx_session(path: Path, threads: int = 1) -> Any:
    """Open an ONNX file in ONNX Runtime, on the CPU.

    Raises:
        InputError: If the extra is not installed, or it is no ONNX file that the runtime can read,
            or one whose weights lie elsewhere than in its folder.
    """
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise not_installed("onnx", "reading an ONNX file") from error
    try:
        check_model(path)
    except LatencyError as error:
        raise InputError(str(error)) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    unreadable = (
        state.EPFail,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
        UnicodeDecodeError,  # of a name in what the runtime says
    )
    try:
        return onnxruntime.InferenceSession(
            str(path),
            sess_options=options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # it prints to standard output, and has nothing to fall back on
        )
    except unreadable as error:
        raise InputError(f"{path}: expected an ONNX file that can run: {error}") from error


def run_onnx(path: Path, images: Tensor, threads: int = 1) -> Tensor:
    """Return the logits (N, classes) of images (N, C, H, W) float32, computed in batches.

    Raises:
        InputError: As `onnx_session`.
    """
    session = onnx_session(path, threads)
    name = session.get_inputs()[0].name
    parts = [
        torch.from_numpy(session.run(None, {name: batch.contiguous().numpy()})[0])
        for batch in torch.split(images.cpu(), RUN_BATCH)
    ]
    return torch.cat(parts)


def finished(model: Any, metadata: Mapping[str, str]) -> bytes:
    """Return a model as the bytes of a file: a dynamic batch, our metadata and no one else's.

    Exporters note the code and the paths that a node comes from.

    Raises:
        InputError: If the first axis of an input or output is of a fixed size.
    """
    graph = model.graph
    values = [*graph.input, *graph.output]
    for noted in (model, graph, *graph.node, *graph.initializer, *values):
        del noted.metadata_props[:]
        noted.doc_string = ""
    del graph.value_info[:]  # inferred by whoever reads the file; they hold names of symbols
    for value in values:
        axes = value.type.tensor_type.shape.dim
        if not axes or not axes[0].dim_param:
            raise InputError(f"expected a first axis of any size, the batch, of {value.name!r}")
        axes[0].dim_param = BATCH
    graph.name = "module"
    model.ir_version = IR_VERSION
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters and quantizers print and log from our output: their exceptions say it."""
    root, silent = logging.getLogger(), logging.NullHandler()
    disabled, said = logging.root.manager.disable, io.StringIO()
    root.addHandler(silent)  # where the root has no handler, a warning would give it one for good
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)


def _require_onnx() -> None:
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise not_installed("onnx", "export to ONNX") from error
    del onnx, onnxscript


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _why(error: BaseException) -> str:
    """Name the operator that has no translation, else the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    found = re.search(r"OpOverload\(op='([^']+)'", str(error))
    return f"the operator {found[1]} has no translation" if found else _first_line(error)


def _place(error: BaseException) -> str:
    """Name the innermost module whose `forward` was at work, and the line."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        inner = frame.f_locals.get(code.co_varnames[0]) if code.co_name == "forward" else None
        if isinstance(inner, nn.Module):
            file = Path(code.co_filename).name
            place = f"in {_name(inner)} ({file}, line {line}): "
    return place
