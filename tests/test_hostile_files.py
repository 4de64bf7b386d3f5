"""Files of strangers that are larger, or say that they are larger, than what could be read."""

import gzip
import hashlib
import io
import json
import os
import resource
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blocksearch.nas_bench_201 import MAX_TABLE_CHARACTERS, read_rows
from evaluation.errors import InputError
from evaluation.files.bounded import MAX_LOG_BYTES, read_bounded
from evaluation.files.manifest import MANIFEST, digest_of, first_line
from evaluation.files.run_folder import RunFolder
from evaluation.files.track import _NewLines
from evaluation.training.checkpoint import FORMAT, Checkpoint, Position
from evaluation.training.weights import read_weights
from fuzzing import TARGETS, read_checkpoint, write_checkpoint, write_shared
from netsearch.estimators.shared_weights import SharedWeights

TERABYTE = 1 << 40
MUCH_KIB = 500_000
UNBOUNDED = ("shared weights",)  # of the run itself; read tensor by tensor


def terabyte(path):
    """Make a file that takes no room on the disk; what it begins with stays."""
    with path.open("ab") as file:
        file.truncate(TERABYTE)


def checkpoint_of(data):
    """Return a checkpoint whose hash is right, as a stranger would write it."""
    return FORMAT + hashlib.sha256(data).digest() + data


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in TARGETS if name not in UNBOUNDED])
def test_a_terabyte_is_refused_by_every_reader_and_not_read(name, tmp_path):
    target = TARGETS[name]
    path = tmp_path / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    target.valid(tmp_path)
    terabyte(path)
    before = peak_kib()
    with pytest.raises(target.errors, match=path.name):
        target.read(path)
    assert peak_kib() - before < MUCH_KIB


def test_a_checkpoint_that_inflates_is_refused_before_it_does(tmp_path):
    """Ten kilobytes, said to be ten gigabytes: torch inflates members that are compressed."""
    path = tmp_path / "seed-0.ckpt"
    of = hashlib.sha256(b"").hexdigest()
    whole = saved({"of": of, "states": {"position": Position().state_dict(), "x": torch.zeros(9)}})
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as source,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    path.write_bytes(checkpoint_of(made.getvalue()))
    (size,) = {m.file_size for m in zipfile.ZipFile(made).infolist() if m.filename.endswith("a/0")}
    assert size == 36  # small enough, deflated or not, that the sum alone decides
    declared = sum(member.file_size for member in zipfile.ZipFile(made).infolist())
    assert (declared > len(made.getvalue())) is False
    read_checkpoint(path)

    with zipfile.ZipFile(made, "a", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data/1", bytes(10 * 2**20))
    assert len(made.getvalue()) < 30_000
    data = made.getvalue().replace(struct_of(10 * 2**20), struct_of(4 * 10**9))
    path.write_bytes(checkpoint_of(data))
    before = peak_kib()
    with pytest.raises(InputError, match=r"declares 4,000,0\d\d,\d\d\d bytes in "):
        read_checkpoint(path)
    assert peak_kib() - before < MUCH_KIB


def struct_of(size):
    return size.to_bytes(4, "little")


def test_a_checkpoint_of_the_older_format_is_not_read(tmp_path):
    path = tmp_path / "seed-0.ckpt"
    buffer = io.BytesIO()
    whole = {"of": hashlib.sha256(b"").hexdigest(), "states": {"position": Position().state_dict()}}
    torch.save(whole, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(checkpoint_of(buffer.getvalue()))
    with pytest.raises(InputError, match="no archive of tensors"):
        read_checkpoint(path)


def test_a_tensor_that_repeats_one_value_a_billion_times_is_refused(tmp_path):
    path = tmp_path / "seed-0.ckpt"
    state = replace(Position(), logged={}).state_dict()
    state["logged"] = {"loss": torch.ones(1).expand(10**11)}
    whole = saved({"of": hashlib.sha256(b"").hexdigest(), "states": {"position": state}})
    assert len(whole) < 5000
    path.write_bytes(checkpoint_of(whole))
    with pytest.raises(InputError, match=r"declares a tensor \(100000000000,\) of fewer values"):
        read_checkpoint(path)


def test_a_state_that_holds_itself_is_read_once(tmp_path):
    path = tmp_path / "seed-0.ckpt"
    deep: list = []
    for _ in range(60):
        deep = [deep, deep]  # 2**60 lists, if one counts them twice
    whole = {
        "of": hashlib.sha256(b"").hexdigest(),
        "states": {"position": Position().state_dict(), "deep": deep},
    }
    path.write_bytes(checkpoint_of(saved(whole)))
    assert read_checkpoint(path).epoch == 0


def test_a_checkpoint_as_we_write_it_still_goes_on(tmp_path):
    path = tmp_path / "seed-0.ckpt"
    write_checkpoint(path)
    assert read_checkpoint(path).epoch == 3


def test_a_file_of_weights_larger_than_the_memory_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    monkeypatch.setattr("evaluation.training.weights.available_bytes", lambda device: 4000)
    with pytest.raises(InputError, match="expected at most 4,000 bytes, got 4,"):
        read_weights(path)
    monkeypatch.setattr("evaluation.training.weights.available_bytes", lambda device: 5000)
    assert len(read_weights(path)[0]["x"]) == 1000


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("widths", [4, 4 * 10**6], "describes .* bytes of weights"),
        ("depths", [1, 10**9], "more cells than it has tensors"),
        ("stages", 10**9, "more cells than it has tensors"),
    ],
)
def test_shared_weights_that_describe_more_than_they_hold_are_not_built(
    field, value, words, tmp_path
):
    path = tmp_path / "shared.safetensors"
    write_shared(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["shared_weights"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about["space"][field] = value
    save_file(tensors, path, {"shared_weights": json.dumps(about)})
    before = peak_kib()
    with pytest.raises(InputError, match=words):
        SharedWeights.load(path)
    assert peak_kib() - before < MUCH_KIB


def test_a_table_that_inflates_beyond_its_bound_is_refused(tmp_path):
    path = tmp_path / "nb201_accuracy.csv.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"index,ops\n")
        for _ in range(MAX_TABLE_CHARACTERS // 2**20):
            file.write(bytes(2**20))
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="accuracy.csv.gz: expected at most 67,108,864"):
        read_rows(path)


def test_a_table_with_a_damaged_stream_is_named(tmp_path):
    path = tmp_path / "a.csv.gz"
    data = bytearray(gzip.compress(b"index,ops\n1,0\n"))
    data[10] |= 0b110  # a kind of block that there is not
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.csv\.gz: damaged"):
        read_rows(path)


def test_a_table_of_the_most_characters_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"index,ops\n1,0\n"))
    monkeypatch.setattr("blocksearch.nas_bench_201.MAX_TABLE_CHARACTERS", 14)
    assert read_rows(path) == [{"index": "1", "ops": "0"}]
    monkeypatch.setattr("blocksearch.nas_bench_201.MAX_TABLE_CHARACTERS", 13)
    with pytest.raises(InputError, match="at most 13 characters"):
        read_rows(path)


def test_a_manifest_of_a_terabyte_or_that_is_a_pipe_is_refused(tmp_path):
    manifest = tmp_path / MANIFEST
    manifest.write_bytes(first_line("run"))
    terabyte(manifest)
    with pytest.raises(InputError, match=f"{MANIFEST}: expected at most {MAX_LOG_BYTES:,} bytes"):
        RunFolder(tmp_path).enlist("a.json", "00")
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(InputError, match=f"{MANIFEST}: expected a file, got a pipe"):
        RunFolder(tmp_path).enlist("a.json", "00")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux has such files")
def test_a_file_that_has_more_than_it_says_is_read_no_further_than_its_bound():
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(InputError, match="expected at most 100 bytes, got more"):
        read_bounded(Path("/proc/self/maps"), 100)


def test_a_listed_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="expected a file, got a pipe"):
        digest_of(tmp_path / "pipe")
    with pytest.raises(InputError, match="expected a file, got a pipe"):
        list(_NewLines(tmp_path / "pipe").read())


def test_a_checkpoint_may_be_as_large_as_the_memory_and_no_larger(tmp_path, monkeypatch):
    path = tmp_path / "seed-0.ckpt"
    write_checkpoint(path)
    size = path.stat().st_size
    monkeypatch.setattr("evaluation.training.checkpoint.available_bytes", lambda device: size)
    assert read_checkpoint(path).epoch == 3
    monkeypatch.setattr("evaluation.training.checkpoint.available_bytes", lambda device: size - 1)
    with pytest.raises(InputError, match=f"expected at most {size - 1:,} bytes"):
        Checkpoint(path).restore({"position": Position()})
