"""ONNX files of strangers: none reads another folder's files, none allocates what it declares."""

import os
import resource

import numpy as np
import pytest

from evaluation.cost import paretoblocks_latency
from evaluation.cost.paretoblocks_latency import LatencyError, check_model, main, time_file
from evaluation.deploy.onnx_files import onnx_session
from evaluation.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

QUICK = {"seconds": 0, "rounds": 1, "warmup": 0}
SECRET = np.arange(6, dtype=np.float32).tobytes()
VALUES = 10**6  # on a side: 10**12 of them are 4 TB
MUCH_KIB = 400_000


def weight(dims=(3, 2), **external):
    """Return the tensor `w`, of zeros, or with its data outside of the file."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=dims)
    if external:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in external.items():
            tensor.external_data.add(key=key, value=value)
    else:
        tensor.raw_data = bytes(4 * 3 * 2)
    return tensor


def model(nodes, tensors=(), inner=3, **more):
    """Return a model of the input x, (batch, inner), and the output y."""
    kind, helper = onnx.TensorProto.FLOAT, onnx.helper
    inner = inner if isinstance(inner, tuple) else (inner,)
    into = helper.make_tensor_value_info("x", kind, ["batch", *inner])
    out = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(nodes, "one", [into], [out], [*tensors], **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


PRODUCT = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])


def in_a_graph(tensor):
    """Return a model that holds a tensor in the branch of an `If`."""
    out = onnx.helper.make_tensor_value_info("w2", onnx.TensorProto.FLOAT, (3, 2))
    same = onnx.helper.make_node("Identity", ["w"], ["w2"])
    branch = onnx.helper.make_graph([same], "branch", [], [out], [tensor])
    always = onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, (), [True])
    chosen = onnx.helper.make_node("If", ["c"], ["v"], then_branch=branch, else_branch=branch)
    return model([chosen, onnx.helper.make_node("MatMul", ["x", "v"], ["y"])], [always])


def in_a_constant(tensor):
    """Return a model that holds a tensor in an attribute."""
    return model([onnx.helper.make_node("Constant", [], ["w"], value=tensor), PRODUCT])


PLACES = {
    "initializer": lambda tensor: model([PRODUCT], [tensor]),
    "branch": in_a_graph,
    "constant": in_a_constant,
}


@pytest.fixture
def folder(tmp_path):
    """A folder of models, with files around it that are none of its business."""
    (tmp_path / "secret").write_bytes(SECRET)
    place = tmp_path / "models"
    (place / "sub").mkdir(parents=True)
    (place / "sub" / "weights").write_bytes(SECRET)
    (place / "beside").write_bytes(SECRET)
    (place / "link").symlink_to("../secret")
    (place / "way").symlink_to("..")
    os.mkfifo(place / "pipe")
    with (place / "huge").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    return place


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "location",
    [
        "../secret", "sub/../../secret", "/etc/passwd", "link", "way/secret", "sub/weights", "pipe",
        "missing", "", "*/_ORT_MEM_ADDR_/*", "a\0b",
    ],
)  # fmt: skip
def test_a_model_reads_no_file_of_another_folder(location, place, folder):
    path = folder / "a.onnx"
    path.write_bytes(PLACES[place](weight(location=location)).SerializeToString())
    words = r"a\.onnx: expected its weights in itself or in files beside it, got "
    with pytest.raises(LatencyError, match=words) as refused:
        time_file(path, **QUICK)
    assert repr(location) in str(refused.value)
    with pytest.raises(InputError, match=words):
        onnx_session(path)


def test_weights_in_a_file_beside_the_model_are_read(folder):
    path = folder / "a.onnx"
    path.write_bytes(model([PRODUCT], [weight(location="beside")]).SerializeToString())
    assert time_file(path, **QUICK)["median_ms"] > 0
    (found,) = onnx_session(path).run(None, {"x": np.ones((1, 3), np.float32)})
    assert found.tolist() == [[6.0, 9.0]]  # sums of the columns of 0 to 5


@pytest.mark.parametrize("write", [b"\x0a\x08", b"\x8a\x80\x00\x88\x00"], ids=["short", "long"])
@pytest.mark.parametrize("last", [False, True])
def test_no_way_to_write_the_same_message_hides_a_place(write, last, folder):
    key, value = write + b"location", b"\x12\x09../secret"
    whole = model([PRODUCT], [weight(location="../secret")]).SerializeToString()
    plain = b"\x6a\x15\x0a\x08location" + value
    assert whole.count(plain) == 1
    entry = value + key if last else key + value
    grown = len(entry) - 21
    path = folder / "a.onnx"
    hidden = whole.replace(plain, b"\x6a" + bytes([len(entry)]) + entry)
    for tag in (b"\x3a", b"\x2a"):  # the graph and its initializer have lengths of one byte
        place = hidden.index(tag, 0 if tag == b"\x3a" else hidden.index(b"MatMul"))
        hidden = hidden[: place + 1] + bytes([hidden[place + 1] + grown]) + hidden[place + 2 :]
    assert onnx.load_from_string(hidden) == onnx.load_from_string(whole)
    path.write_bytes(hidden)
    with pytest.raises(LatencyError, match=r"got '\.\./secret'"):
        check_model(path)


def test_a_file_or_weights_beside_it_of_a_terabyte_are_refused(folder):
    path = folder / "a.onnx"
    huge = weight((VALUES, VALUES), location="huge")
    path.write_bytes(model([PRODUCT], [huge], VALUES).SerializeToString())
    with pytest.raises(LatencyError, match=r"huge: expected at most 2,147,483,648 bytes"):
        time_file(path, **QUICK)
    (folder / "huge").rename(path)
    with pytest.raises(LatencyError, match=r"a\.onnx: expected at most 2,147,483,648 bytes"):
        time_file(path, **QUICK)


def declared(what):
    """Return a model that declares 10**12 values."""
    sides = onnx.numpy_helper.from_array(np.array([VALUES, VALUES]), "s")
    fill = onnx.helper.make_node("ConstantOfShape", ["s"], ["w"])
    same = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "i")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=(VALUES, VALUES))
    return {
        "weights": model([PRODUCT], [weight((VALUES, VALUES))], VALUES),
        "sparse weights": model([PRODUCT], inner=VALUES, sparse_initializer=[sparse]),
        "computed weights": model([fill, PRODUCT], [sides], VALUES),
        "an input": model([same], inner=(VALUES, VALUES)),
        "an input that overflows": model([same], inner=(2**62, 2**62)),
    }[what]


@pytest.mark.parametrize(
    "what",
    ["weights", "sparse weights", "computed weights", "an input", "an input that overflows"],
)
def test_a_model_that_declares_a_trillion_values_is_refused_and_not_allocated(what, folder):
    path = folder / "a.onnx"
    path.write_bytes(declared(what).SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = "inputs of at most 268,435,456 values" if "input" in what else "a.onnx"
    with pytest.raises(LatencyError, match=expected):
        time_file(path, **QUICK)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MUCH_KIB


def test_a_batch_counts_among_the_values_of_an_input(folder):
    path = folder / "a.onnx"
    path.write_bytes(model([PRODUCT], [weight()]).SerializeToString())
    with pytest.raises(LatencyError, match="at --batch 1000000000000"):
        time_file(path, batch=10**12, **QUICK)


def test_a_pipe_in_the_folder_is_not_waited_for(folder):
    (folder / "pipe").rename(folder / "a.onnx")
    with pytest.raises(LatencyError, match=r"a\.onnx: not an ONNX file"):
        time_file(folder / "a.onnx", **QUICK)


def nested(levels):
    """Return a model with an attribute in a node in a graph in an attribute ..."""
    inside = b""
    for _ in range(levels):
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            inside = tag + varint(len(inside)) + inside
    return b"\x3a" + varint(len(inside)) + inside


def varint(value):
    return bytes([value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14])


def test_what_nests_without_end_is_refused(folder):
    path = folder / "a.onnx"
    path.write_bytes(nested(30))
    check_model(path)
    path.write_bytes(nested(2000))
    with pytest.raises(LatencyError, match=r"a\.onnx: not an ONNX file .*: it nests too deep"):
        check_model(path)


def test_an_axis_whose_name_is_no_text_is_an_error_of_the_file(folder):
    path = folder / "a.onnx"
    whole = model([onnx.helper.make_node("Relu", ["x"], ["y"])]).SerializeToString()
    path.write_bytes(whole.replace(b"batch", b"batc\x80"))
    with pytest.raises(LatencyError, match=r"a\.onnx: cannot be run: .*utf-8"):
        time_file(path, **QUICK)


@pytest.mark.parametrize("name", [b"\xff", b"\xed\xa0\x80"])
def test_names_that_are_no_text_are_an_error_of_the_file_and_print_nothing(name, folder, capfd):
    path = folder / "a.onnx"
    whole = model([onnx.helper.make_node("Nothing", ["x"], ["y" * len(name)])])
    path.write_bytes(whole.SerializeToString().replace(b"y" * len(name), name))
    with pytest.raises(InputError, match=r"a\.onnx: expected an ONNX file"):
        onnx_session(path)
    with pytest.raises(LatencyError, match=r"a\.onnx: not an ONNX file"):
        time_file(path, **QUICK)
    assert capfd.readouterr().out == ""


def test_a_terminal_obeys_no_name_of_a_stranger(folder, tmp_path, capsys):
    hostile = model([PRODUCT], [weight()])
    onnx.helper.set_model_props(hostile, {paretoblocks_latency.NAME_KEY: "\x1b[31mred\x07"})
    (folder / "a.onnx").write_bytes(hostile.SerializeToString())
    main([str(folder), "--out", str(tmp_path / "out.json"), "--seconds", "0", "--rounds", "1"])
    (folder / "b.onnx").write_bytes(hostile.SerializeToString())
    with pytest.raises(SystemExit):
        main([str(folder), "--out", str(tmp_path / "second.json"), "--seconds", "0"])
    said = capsys.readouterr()
    assert r"\x1b[31mred\x07" in said.out and "same name" in said.err
    assert "\x1b" not in said.out + said.err and "\x07" not in said.out + said.err
