"""Tests of runs with several processes on one machine.

They give the same result as a run with one process, even if a process is interrupted or killed and the run is resumed.
"""

import json
import socket

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from surm_jax.devices import mesh, processes
from surm_jax.errors import UserError
from surm_jax.record.progress import Interruption
from surm_jax.record.workdir import require_shared
from surm_jax.training.loop import train
from tests.training import tiny, tiny_text
from tests.training.several import ROOT, free_port, launch_all

# The tolerance for float32 numbers of size about 1. Gloo sums the gradients of the devices in another order than a
# single process does, and Adam divides by such sums, which makes the rounding errors larger.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A function that launches several processes of one run of `processes_job.py`, and waits until all have ended.

    It takes the folder of the job and further command-line options, the number of processes (`count`), the number of
    devices of each (`devices`), and the failure of one of them (`befalls`, as in `processes_job.py`). With `slurm` they
    find each other by the environment variables of Slurm, otherwise by command-line options.
    """
    folder = tmp_path_factory.mktemp("launched")

    def run(files, *arguments, count=2, devices=1, befalls="", slurm=False):
        port, config = free_port(), f"--config={ROOT / 'tests' / 'training' / 'processes_job.py'}:{files}"
        commands, environments = [], []
        for process in range(count):
            by_hand = [f"--coordinator=127.0.0.1:{port}", f"--process_id={process}", f"--num_processes={count}"]
            environment = slurm_variables(count, process) | {"JAX_COORDINATOR_PORT": str(port)}
            commands.append([config, *arguments, *([] if slurm else by_hand)])
            environments.append({"BEFALLS": befalls, **(environment if slurm else {})})
        return launch_all(folder, commands, environments, devices)

    return run


def slurm_variables(count, process):
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def flags_of(values):
    return [f"--config.{key}={value}" for key, value in values.items()]


def alone(config, workdir):
    """Run a configuration in one process, with as many devices as several processes would have together."""
    with Interruption() as interruption:
        return train(config, 0, workdir, interruption)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(several, one):
    """Check that two runs have the same metrics, numbers of examples and adapter, up to rounding.

    Args:
        several: The folder of the run with several processes.
        one: The folder of the run with one process.
    """
    theirs, ours = lines_of(several), lines_of(one)
    assert [line.keys() - {"examples_per_second"} for line in theirs] == [
        line.keys() - {"examples_per_second"} for line in ours
    ]
    for their, our in zip(theirs, ours, strict=True):
        names = sorted(our.keys() - {"examples_per_second"})
        values = np.array([[line[name] for name in names] for line in (their, our)])
        np.testing.assert_allclose(values[0], values[1], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(names))
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in (several, one))
    assert (result["examples"], result["steps"]) == (expected["examples"], expected["steps"])
    arrays, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (several, one))
    tiny.assert_close(expected, arrays, TOLERANCE)


@pytest.mark.exhaustive
def test_a_run_that_is_interrupted_killed_and_goes_on_with_more_processes(tiny_files, launched, tmp_path):
    # With dropout, the result depends on the place of each row in the batch, because every row has its own mask. So the
    # rows of each process must have the same places as in a run with one process.
    values = {
        "optim.steps": 8, "model.dropout": 0.2, "log.metrics_every": 1, "log.evaluate_every": 4,
        "log.checkpoint_every": 5, "optim.learning_rate.circulant": 0.02,
    }  # fmt: skip
    workdir = tmp_path / "several"
    arguments = [f"--workdir={workdir}", *flags_of(values)]
    # Only process 1 gets the signal, in step 2. All processes stop after step 3, and only the first prints a message.
    first, second = launched(tiny_files, *arguments, befalls="1:2:SIGTERM", slurm=True)
    assert (first.status, second.status) == (143, 143), first.err + second.err
    assert "SIGTERM: saved step 3 of 8" in first.err and "saved" not in second.err
    assert "trainable: 93 of" in first.out and not second.out
    # Process 1 is killed in step 6, its third step since this start. The checkpoint of step 5 has been saved.
    survivor, killed = launched(tiny_files, *arguments, befalls="1:3:SIGKILL")
    assert killed.status == -9 and survivor.status == 1, survivor.err
    assert "process 0 of 2: error: another process is gone, so this one stops" in survivor.err
    assert "going on from step 3 of 8" in survivor.err
    assert survivor.time - killed.time < 60
    ends = launched(tiny_files, *arguments, count=4)
    assert [end.status for end in ends] == [0] * 4, ends[0].err
    assert "going on from step 5 of 8" in ends[0].err
    assert [end.out for end in ends[1:]] == [""] * 3
    alone(tiny.make_config(tiny_files, **values, **{"mesh.data": 4}), tmp_path / "one")
    assert_same_run(workdir, tmp_path / "one")
    # Only the first process has written files for TensorBoard, one in each of the three starts.
    assert len(list((workdir / "tensorboard").iterdir())) == 3


@pytest.mark.exhaustive
def test_text_and_the_death_of_the_first_process(launched, tmp_path):
    (tmp_path / "files").mkdir()
    files = tiny_text.write_files(tmp_path / "files")
    values = {"log.metrics_every": 1, "log.evaluate_every": 2, "log.checkpoint_every": 2, "model.dropout": 0.2}
    workdir = tmp_path / "several"
    arguments = [f"--workdir={workdir}", *flags_of({**values, "mesh.data": 0})]
    killed, survivor = launched(files, *arguments, befalls="0:4:SIGKILL")
    assert killed.status == -9
    # The coordination service runs in the first process. When it is gone, either this program or JAX itself notices it
    # first and ends the other process.
    assert survivor.status in (1, -6), survivor.err
    assert "another process is gone" in survivor.err or "another task died" in survivor.err
    assert survivor.time - killed.time < 60
    first, second = launched(files, *arguments)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "going on from step 2 of 4" in first.err
    alone(tiny_text.make_config(files, **values, **{"mesh.data": 2}), tmp_path / "one")
    assert_same_run(workdir, tmp_path / "one")


@pytest.mark.exhaustive
def test_a_base_that_is_split_over_processes(tiny_files, launched, tmp_path):
    # Each of the two processes has two devices. The kernels have just enough elements to be split over all four.
    values = {
        "model.checkpoint": "none", "model.width": 128, "model.mlp_width": 256, "mesh.fsdp": 4, "optim.steps": 2,
        "log.metrics_every": 1,
    }  # fmt: skip
    workdir = tmp_path / "several"
    first, second = launched(tiny_files, f"--workdir={workdir}", *flags_of(values), devices=2)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "RANDOM weights" in first.err and "RANDOM" not in second.err
    with pytest.warns(UserWarning, match="RANDOM"):
        alone(tiny.make_config(tiny_files, **values), tmp_path / "one")
    assert_same_run(workdir, tmp_path / "one")
    # The saved fingerprint of the base model includes the parts of arrays that are on devices of the other process.
    bases = [
        json.loads((folder / "adapter/adapter_config.json").read_text())["base"]
        for folder in (workdir, tmp_path / "one")
    ]
    assert bases[0] == bases[1]


@pytest.mark.exhaustive
def test_what_one_process_alone_cannot_do_stops_the_others(tiny_files, launched, tmp_path):
    first, second = launched(tiny_files, f"--workdir={tmp_path / 'run'}", befalls="1:2:error")
    assert (first.status, second.status) == (1, 1), first.err + second.err
    assert "process 1 of 2: error: this process alone has a problem" in second.err
    assert "process 0 of 2: error: another process is gone, so this one stops" in first.err


def test_what_no_process_can_do_is_said_once(tiny_files, launched, tmp_path):
    first, second = launched(tiny_files, f"--workdir={tmp_path / 'run'}", "--mode=evaluate")
    assert (first.status, second.status) == (1, 1)
    assert first.err.endswith("error: --mode=evaluate runs in one process: start only one, without a coordinator\n")
    assert not second.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process_id": 0}, "--coordinator and --num_processes are missing"),
        ({"coordinator": "a:1", "num_processes": 2}, "--process_id is missing"),
        ({"coordinator": "a:1", "process_id": 2, "num_processes": 2}, "--process_id=2 must lie between 0 and 1"),
        ({"coordinator": "a", "process_id": 0, "num_processes": 2}, "--coordinator=a must be HOST:PORT"),
    ],
)
def test_wrong_flags(given, message):
    with pytest.raises(UserError, match=message):
        processes.start(**given)


def test_a_port_that_is_in_use():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--coordinator={address}: this process cannot listen there"):
            processes.start(address, 0, 2)


def test_one_process_is_left_as_it_is(monkeypatch):
    def initialize(**_):
        raise AssertionError("one process joins nobody")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.start()
    for name, value in slurm_variables(1, 0).items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert processes.is_first() and not processes.several()
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(AssertionError):
        processes.start()


def test_what_the_first_process_does_is_done_by_the_only_one():
    assert processes.on_first(lambda: {"a": 1}) == {"a": 1}
    agreement = processes.Agreement(mesh.make_mesh(0, {}))
    assert [agreement(number) for number in (0, 15, 0)] == [0, 15, 0]


def test_the_rows_of_processes_are_one_below_the_other(tiny_files, monkeypatch):
    built = tiny.build(tiny.make_config(tiny_files, "linear_probe", **{"mesh.data": 1}))
    task = built.job.task
    whole, evaluated = next(task.train_batches(3)), next(iter(task.eval_batches("test")))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        for part, full in ((next(task.train_batches(3)), whole), (next(iter(task.eval_batches("test"))), evaluated)):
            rows = len(full["label"]) // 4
            for name, array in full.items():
                np.testing.assert_array_equal(part[name], array[process * rows : (process + 1) * rows])


def test_a_folder_that_only_the_first_process_sees(tmp_path):
    with pytest.raises(UserError, match=f"does not see the run in {tmp_path}: all processes need the same folder"):
        require_shared(tmp_path)


def test_several_processes_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"leaves out devices \(data=2 times fsdp=1 of 8\), but 2 processes use all"):
        mesh.make_mesh(2, {})


def test_a_lost_process_is_known_by_what_was_waiting_for_it():
    assert not processes.is_lost(ValueError("shapes differ"))
    try:
        try:
            raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
        except ValueError as error:
            raise UserError("cannot write the checkpoint") from error
    except UserError as error:
        assert processes.is_lost(error)
