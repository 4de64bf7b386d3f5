"""The table `workers` of a config: how many processes compute, where, within which limits."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evaluation.errors import InputError

Backend = Literal["loky", "dask", "ray"]
MAX_WORKERS = 100_000  # of a cluster
MAX_PER_CORE = 16  # processes of this machine: loky starts all of them at once
MAX_MIB = 2**40
MAX_MINUTES = 1e6


@dataclass(frozen=True)
class Workers:
    """Processes that compute at the same time, and where they are.

    Attributes:
        count: Number of them.
        backend: `loky`: processes of this machine; `dask`, `ray`: a cluster.
        address: Of a Dask scheduler or a Ray head; None: all on this machine.
        device: `cpu` or `cuda`; with `cuda` each worker has one GPU.
        memory_mib: Most MiB of private memory of a worker, on Linux; None: no limit.
        evaluation_minutes: Most minutes of one evaluation of a network; None: no limit.
        checkpoint_minutes: Between two checkpoints inside an epoch.
    """

    count: int = 1
    backend: Backend = "loky"
    address: str | None = None
    device: str = "cpu"
    memory_mib: int | None = None
    evaluation_minutes: float | None = None
    checkpoint_minutes: float = 1.0

    def __str__(self) -> str:
        """Say how many and where, for people."""
        place = "" if self.backend == "loky" else f" ({self.backend} {self.address or 'here'})"
        return f"{self.count}{place}"

    @property
    def cores(self) -> int:
        """Cores that one task may have if it runs alone: a worker's task stays on its machine."""
        return self.count if self.address is None else 1

    @property
    def sharing(self) -> int:
        """Workers that share one memory, taking other machines to be as this one."""
        if self.device == "cuda":
            import torch

            # A Ray task has a GPU to itself; others share where there are more workers than GPUs.
            alone = self.backend == "ray" or self.address is not None
            return 1 if alone else -(-self.count // max(1, torch.cuda.device_count()))
        from joblib import cpu_count

        return self.count if self.address is None else min(self.count, cpu_count())


ONE_WORKER = Workers()  # this process, without limits


class WorkersConfig(BaseModel):
    """Where a run computes; changes nothing of what it computes, up to rounding.

    Except that its limits decide which networks fail: both depend on the machine.

    Attributes:
        backend: See `Workers`.
        address: See `Workers`.
        count: Of the workers; None: as many as there are cores or GPUs.
        memory_mib: See `Workers`.
        evaluation_minutes: See `Workers`; by default far beyond a short training, since it is there
            to end what hangs.
        checkpoint_minutes: See `Workers`; what a kill may cost, beside an epoch's end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Backend = "loky"
    address: str | None = None
    count: int | None = Field(default=None, ge=1, le=MAX_WORKERS)
    memory_mib: int | None = Field(default=None, ge=1, le=MAX_MIB)
    evaluation_minutes: float | None = Field(default=60.0, gt=0, le=MAX_MINUTES)
    checkpoint_minutes: float = Field(default=1.0, ge=0, le=MAX_MINUTES)

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> Self:
        if self.address is not None and self.backend == "loky":
            raise ValueError("expected no address with backend loky, which stays on this machine")
        return self

    def resolve(self, device: str, count: int | None = None) -> Workers:
        """Connect to the cluster, if it is one, and count the workers.

        Args:
            device: `cpu` or `cuda`.
            count: In place of the config's, if not None.

        Raises:
            InputError: If the backend is not installed, the cluster does not answer, or there are
                more workers than this machine could start.
        """
        import torch
        from joblib import cpu_count

        from evaluation.workers import clusters

        count = count or self.count
        if self.address is None and count is None:
            count = cpu_count() if device == "cpu" else max(1, torch.cuda.device_count())
        most = MAX_PER_CORE * max(cpu_count(), torch.cuda.device_count())
        if self.backend == "loky" and count is not None and count > most:
            raise InputError(f"workers.count: expected at most {most} on this machine, got {count}")
        if self.backend != "loky":
            cluster = clusters.connect(self.backend, self.address, count)
            offered = cluster.size(device)
            count = count or offered
        assert count is not None
        limits = self.memory_mib, self.evaluation_minutes, self.checkpoint_minutes
        return Workers(count, self.backend, self.address, device, *limits)
