"""Clusters of two workers on this machine: the same records as in one process, also after deaths.

Ray's two nodes are two raylets, Dask's two workers two processes beside a scheduler.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

import tiny_run
from cluster_tasks import POLL_S, die, fail, hang, logged, whereabouts
from configs import FOLDER
from configs.experiment import Config
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.workers import clusters
from evaluation.workers.pool import WorkerDied, run_tasks
from evaluation.workers.task import gpu_of
from evaluation.workers.workers import ONE_WORKER, Workers, WorkersConfig
from run_pipeline import Pipeline

ROOT = Path(__file__).parents[1]
BACKENDS = ("dask", "ray")
STORE_BYTES = 80_000_000
REFUSED_WITHIN_S = 10
DASK_LOOKS_AFTER_S = 15
HANG_S = 2.0  # a limit that only what hangs reaches
ARCHIVE, EVALUATIONS = "archive.jsonl", 5
pytestmark = pytest.mark.usefixtures("short_runs")


class DaskPair:
    """Two Dask workers; one that is killed is started again by its nanny."""

    def __init__(self):
        dask, distributed = pytest.importorskip("dask"), pytest.importorskip("dask.distributed")
        dask.config.set(clusters.PATIENCE)
        self.cluster = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
        )
        self.workers = Workers(2, "dask", self.cluster.scheduler_address)

    def kill_one(self):
        process = next(iter(self.cluster.workers.values())).process
        os.kill(process.pid, signal.SIGKILL)

    def close(self):
        clusters.disconnect_all()
        self.cluster.close()


class RayPair:
    """Two Ray nodes of one core each; the driver belongs to the first, the second may be killed."""

    def __init__(self):
        pytest.importorskip("ray")
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.second = None
        self.complete()
        self.workers = Workers(2, "ray", self.cluster.address)

    def complete(self):
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            self.cluster.wait_for_nodes()

    def kill_one(self):
        raylet = self.second.all_processes["raylet"][0].process
        os.kill(raylet.pid, signal.SIGKILL)
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def close(self):
        clusters.disconnect_all()
        self.cluster.shutdown()


def both_at_work(pair):
    """Wait until both workers have imported what they need: one that was killed starts anew."""

    def at_once():
        tasks = {i: (i,) for i in range(2)}
        return {pid for _, (_, pid, _) in run_tasks(whereabouts, tasks, pair.workers)}

    wait_until(lambda: len(at_once()) == 2)


@pytest.fixture(scope="module")
def pairs():
    """Clusters by backend, each started when it is first asked for."""
    opened = {}
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), path])
    yield opened
    os.environ["PYTHONPATH"] = path
    for pair in opened.values():
        pair.close()


@pytest.fixture(params=BACKENDS)
def pair(request, pairs):
    if request.param not in pairs:
        pairs[request.param] = {"dask": DaskPair, "ray": RayPair}[request.param]()
    found = pairs[request.param]
    if request.param == "ray":
        found.complete()
    return found


def starts(log, sign="+"):
    lines = log.read_text().split() if log.exists() else []
    return sorted(int(line[1:]) for line in lines if line[0] == sign)


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(POLL_S)


def searched(folder, workers):
    """The lines of the archive that the pipeline leaves after its two searches."""
    console = Console(file=io.StringIO())
    config = Config.load(FOLDER / "quickstart.yaml", tiny_run.TINY)
    Pipeline(config, RunFolder(folder), workers=workers, console=console).run("networks")
    return (folder / ARCHIVE).read_text().splitlines()


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """What the searches leave when they run in this process."""
    lines = searched(tmp_path_factory.mktemp("serial"), ONE_WORKER)
    assert len(lines) == EVALUATIONS
    return set(lines)


@pytest.mark.slow
def test_every_task_gives_its_result_once_in_another_process_and_this_folder(
    pair, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    results = list(run_tasks(whereabouts, {f"k{i}": (i,) for i in range(6)}, pair.workers))
    assert sorted((key, value[0]) for key, value in results) == [(f"k{i}", i * i) for i in range(6)]
    pids = {pid for _, (_, pid, _) in results}
    assert len(pids) == 2 and os.getpid() not in pids
    assert {folder for _, (_, _, folder) in results} == {str(tmp_path)}


@pytest.mark.slow
def test_no_more_tasks_than_workers_run_at_the_same_time(pair, tmp_path):
    log, one = tmp_path / "log", Workers(1, pair.workers.backend, pair.workers.address)
    stream = run_tasks(logged, {i: (i, log, 0.3) for i in range(3)}, one)
    next(stream)
    assert len(starts(log)) == 1
    stream.close()


@pytest.mark.slow
def test_a_bug_in_a_task_reaches_the_caller_as_what_it_is(pair):
    with pytest.raises(KeyError, match="^'bug 1'$"):
        list(run_tasks(fail, {0: (1,)}, pair.workers))


@pytest.mark.slow
def test_a_consumer_may_stop_early_and_run_tasks_again(pair):
    stream = run_tasks(whereabouts, {i: (i,) for i in range(8)}, pair.workers)
    next(stream)
    stream.close()
    again = dict(run_tasks(whereabouts, {i: (i,) for i in range(3)}, pair.workers))
    assert {key: value[0] for key, value in again.items()} == {0: 0, 1: 1, 2: 4}


@pytest.mark.slow
def test_a_folder_that_the_workers_do_not_share_is_named(pair, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    stream = run_tasks(whereabouts, {0: (0,)}, pair.workers)
    gone.rmdir()
    with pytest.raises(InputError, match="no folder .*gone"):
        list(stream)


@pytest.mark.slow
def test_a_task_that_kills_its_workers_costs_only_its_own_result(pair):
    results = dict(run_tasks(die, {i: (i,) for i in range(6)}, pair.workers))
    assert isinstance(results.pop(3), WorkerDied)
    assert results == {i: i for i in (0, 1, 2, 4, 5)}


@pytest.mark.slow
def test_a_task_that_hangs_in_c_code_is_ended_and_the_others_finish(pair, monkeypatch):
    # Ended twice; one that kills its workers, above, is tried as often as ever.
    monkeypatch.setattr(clusters, "RAY_RETRIES", 1)
    if isinstance(pair, DaskPair):
        monkeypatch.setattr(pair.cluster.scheduler, "allowed_failures", 1)
    both_at_work(pair)
    tasks = {i: (i,) for i in range(4)}
    results = dict(run_tasks(hang, tasks, pair.workers, minutes=HANG_S / 60))
    died = results.pop(1)
    assert isinstance(died, WorkerDied)
    assert str(died).endswith("minutes, workers.evaluation_minutes")
    assert results == {i: i for i in (0, 2, 3)}
    again = dict(run_tasks(whereabouts, {i: (i,) for i in range(2)}, pair.workers))
    assert {key: value[0] for key, value in again.items()} == {0: 0, 1: 1}


@pytest.mark.slow
def test_what_ran_on_a_worker_that_was_killed_is_done_again(pair, tmp_path):
    both_at_work(pair)
    log = tmp_path / "log"
    tasks = {i: (i, log, 1.5) for i in range(6)}
    results = []
    run = threading.Thread(target=lambda: results.extend(run_tasks(logged, tasks, pair.workers)))
    run.start()
    wait_until(lambda: len(starts(log)) - len(starts(log, "-")) == 2)  # so one on each worker
    pair.kill_one()
    run.join(60)
    assert sorted(results) == [(i, i) for i in range(6)]
    assert set(starts(log)) == set(range(6)) and len(starts(log)) == 7


@pytest.mark.slow
def test_a_search_that_loses_a_worker_leaves_the_records_of_one_process(pair, serial, tmp_path):
    """The worker dies when the first record has come, so in the middle of another evaluation."""
    both_at_work(pair)
    archive, killed, over = tmp_path / ARCHIVE, threading.Event(), threading.Event()

    def kill_at_the_first_record():
        while not (archive.exists() and archive.read_bytes()):
            if over.wait(POLL_S):
                return
        pair.kill_one()
        killed.set()

    killer = threading.Thread(target=kill_at_the_first_record)
    killer.start()
    try:
        lines = searched(tmp_path, pair.workers)
    finally:
        over.set()
        killer.join()
    assert killed.is_set() and len(lines) == len(serial) and set(lines) == serial


@pytest.mark.slow
def test_a_dask_worker_that_dies_again_when_dask_looks_for_it_is_started_again():
    pytest.importorskip("dask.distributed")
    cluster = clusters.DaskCluster(None, 1)

    def kill():
        worker = next(iter(cluster.local.workers.values()))
        wait_until(lambda: worker.pid is not None and cluster.client.nthreads())
        os.kill(worker.pid, signal.SIGKILL)

    def present():
        return len(cluster.client.nthreads()) == 1

    try:
        wait_until(present)
        kill()
        time.sleep(DASK_LOOKS_AFTER_S - 0.5)
        kill()
        time.sleep(1)
        wait_until(present)
    finally:
        cluster.close()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("silent", [False, True], ids=["nobody", "a stranger who is silent"])
def test_an_address_without_a_cluster_is_refused_at_once(backend, silent):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()
        config = WorkersConfig(backend=backend, address=f"127.0.0.1:{port}")
        pytest.importorskip(backend)
        began = time.monotonic()
        with pytest.raises(InputError, match=f"workers.address: 127.0.0.1:{port}: no cluster"):
            config.resolve("cpu")
    assert time.monotonic() - began < REFUSED_WITHIN_S


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("address", ["head", "tcp://:8786", "head:port"])
def test_an_address_without_host_and_port_is_refused(backend, address):
    pytest.importorskip(backend)
    with pytest.raises(InputError, match="workers.address"):
        WorkersConfig(backend=backend, address=address).resolve("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_not_installed_names_its_extra(backend, monkeypatch):
    for name in ("dask", "dask.distributed", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install 'paretoblocks\[{backend}\]'"):
        WorkersConfig(backend=backend, count=1).resolve("cpu")


@pytest.mark.slow
def test_a_cluster_offers_all_its_workers_unless_the_config_or_the_caller_asks_for_less(pair):
    backend, address = pair.workers.backend, pair.workers.address
    wait_until(lambda: WorkersConfig(backend=backend, address=address).resolve("cpu").count == 2)
    one = WorkersConfig(backend=backend, address=address, count=1)
    expected = Workers(1, backend, address, "cpu", evaluation_minutes=one.evaluation_minutes)
    assert one.resolve("cpu") == expected
    assert one.resolve("cpu", 5).count == 5


@pytest.mark.slow
def test_a_ray_cluster_without_gpus_is_refused_for_a_gpu(pairs):
    pairs.setdefault("ray", None)
    pairs["ray"] = pairs["ray"] or RayPair()
    config = WorkersConfig(backend="ray", address=pairs["ray"].workers.address, count=1)
    with pytest.raises(InputError, match="offers no GPU"):
        config.resolve("cuda")


@pytest.mark.slow
def test_dask_workers_of_several_threads_are_refused():
    distributed = pytest.importorskip("dask.distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0"
    ) as cluster:
        config = WorkersConfig(backend="dask", address=cluster.scheduler_address)
        with pytest.raises(InputError, match="one thread each, got 2"):
            config.resolve("cpu")
        clusters.disconnect(("dask", cluster.scheduler_address))


def test_processes_have_no_address():
    with pytest.raises(ValueError, match="no address with backend loky"):
        WorkersConfig(address="head:6379")


def test_slots_take_gpus_in_turn_however_a_launcher_rotated_them():
    assert [gpu_of(slot, ["0", "1"]) for slot in range(3)] == ["0", "1", "0"]
    # Each worker of dask-cuda sees its own rotation.
    assert {gpu_of(0, ["0", "1", "2"]), gpu_of(1, ["1", "2", "0"]), gpu_of(2, ["2", "0", "1"])} == {
        "0",
        "1",
        "2",
    }


@pytest.mark.slow
def test_each_worker_of_a_machine_has_a_gpu_and_its_end_frees_it(tmp_path):
    script = (
        "import os, sys; from evaluation.workers.task import take_gpu; take_gpu();"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
    )

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "5,3", "TMPDIR": str(tmp_path)},
        )

    def gpu(process):
        return process.stdout.readline().strip()

    first, second = workers = [start(), start()]
    try:
        found = [gpu(first), gpu(second)]
        assert sorted(found) == ["3", "5"]
        first.kill()
        first.wait()
        workers.append(start())
        assert gpu(workers[-1]) == found[0]
    finally:
        for process in workers:
            process.kill()
            process.communicate()
