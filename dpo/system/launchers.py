"""Processes that something else than torchrun has started: Slurm's srun, or MPI."""

import re
from collections.abc import Mapping

from dpo.system.errors import UserError
from dpo.system.installation import COMMAND

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI; MPICH and Intel MPI; MVAPICH
PORTS = range(20_000, 30_000)  # below those that the system gives to clients


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set for one of several tasks of srun; empty for a single process.

    Raises UserError where the tasks cannot form a run, with the command that does.
    """
    if "RANK" in environment:
        return {}
    n_tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
    if n_tasks > 1 and "SLURM_STEP_NUM_TASKS" in environment:
        return slurm_variables(environment, n_tasks)
    if n_tasks > 1:  # a script without srun looks like one of its tasks
        raise UserError(
            f"SLURM_NTASKS={n_tasks}: this job has {n_tasks} tasks, but srun did not start this process; "
            "start `srun --ntasks-per-node=1 torchrun --nproc-per-node=N train.py ...`, "
            f"or `srun --ntasks=1 {COMMAND} ...`"
        )
    for name in MPI_SIZES:
        n = int(environment.get(name) or 1)
        if n > 1:
            raise UserError(
                f"{name}={n}: MPI has started {n} processes, and each would train a separate run; "
                f"start `torchrun --nproc-per-node=N train.py ...` once per machine, or `{COMMAND} ...` without MPI"
            )
    return {}


def slurm_variables(environment: Mapping[str, str], n_tasks: int) -> dict[str, str]:
    """Describe a task of srun; see OUTPUT ENVIRONMENT VARIABLES in srun(1)."""
    counts = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", str(n_tasks)))
    n_local = counts[int(environment.get("SLURM_NODEID", 0))]
    n_gpus = int(environment.get("SLURM_GPUS_ON_NODE", 0))
    if n_gpus > n_local:
        raise UserError(
            f"srun has started {n_local} tasks on a machine with {n_gpus} GPUs; start a task per GPU "
            f"(--ntasks-per-node={n_gpus}), or torchrun in one task per machine: "
            f"srun torchrun --nnodes={len(counts)} --nproc-per-node={n_gpus} ... train.py ..."
        )
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job = int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", 0))
    sees_one_gpu = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(n_tasks),
        "LOCAL_RANK": "0" if sees_one_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(n_local),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(PORTS[job % len(PORTS)]),
    }


def expand_counts(text: str) -> list[int]:
    """Expand Slurm's counts per machine, as in 4(x2),3 for 4, 4 and 3."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, repeats in pairs for _ in range(int(repeats or 1))]


def first_host(hosts: str) -> str:
    """Read the first name of Slurm's list of hosts, as in gpu[07-09,12],login for gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    assert first is not None, "Slurm names at least one host"
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
