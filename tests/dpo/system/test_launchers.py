"""Variables of Slurm and MPI, by made-up environments."""

import pytest

from dpo.system.errors import UserError
from dpo.system.launchers import expand_counts, first_host, torchrun_variables

SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_JOB_NODELIST": "gpu[01-12]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_of_srun_becomes_a_rank():
    assert torchrun_variables(SRUN) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23458",  # 20,000 + (123,456 + 2) % 10,000
    }


def test_an_address_of_the_user_stays_and_a_task_that_sees_one_gpu_alone_takes_it():
    user = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    variables = torchrun_variables(SRUN | user | {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "2"})
    assert {name: variables[name] for name in user} == user and variables["LOCAL_RANK"] == "0"
    assert torchrun_variables(SRUN | {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"})["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""},
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks=1
        SRUN | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun, started by srun
    ],
)
def test_a_process_alone_and_one_of_torchrun_stay_as_they_are(environment):
    assert torchrun_variables(environment) == {}


def test_fewer_tasks_than_gpus_are_refused_with_both_ways_to_use_all():
    with pytest.raises(UserError, match="2 tasks on a machine with 8 GPUs.*--ntasks-per-node=8.*--nnodes=3 --n"):
        torchrun_variables(SRUN | {"SLURM_GPUS_ON_NODE": "8"})


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_job_of_several_tasks_without_srun_is_refused_with_both_commands(rank):
    line = "SLURM_NTASKS=2: this job has 2 tasks.*`srun .*torchrun --nproc-per-node=N train.py ...`.*srun --ntasks=1"
    with pytest.raises(UserError, match=line):
        torchrun_variables({"SLURM_NTASKS": "2", "SLURM_PROCID": rank, "SLURM_JOB_ID": "1"})


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpi_are_refused_with_the_command_of_torchrun(name):
    with pytest.raises(UserError, match=f"{name}=4: MPI has started 4 processes.*`torchrun --nproc-per-node"):
        torchrun_variables({name: "4"})


@pytest.mark.parametrize("text, counts", [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x2)", [1, 2, 2])])
def test_counts_are_expanded(text, counts):
    assert expand_counts(text) == counts


@pytest.mark.parametrize(
    "hosts, first",
    [("a", "a"), ("a,b[1-2]", "a"), ("gpu[07-09,12],login", "gpu07"), ("r[1-2]n[3,4]-ib", "r1n3-ib")],
)
def test_the_first_host_is_read(hosts, first):
    assert first_host(hosts) == first
