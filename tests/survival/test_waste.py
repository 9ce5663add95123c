"""Check that training wastes no time.

After its second step a run compiles nothing, and a step copies nothing between host and device.
"""

import re

import jax
import numpy as np
import pytest

from surm_jax.devices.mesh import replicated
from surm_jax.training import loop
from surm_jax.training.modes import train_run
from tests.speeds import fast
from tests.training import tiny

# Every step is logged and saved, and every second step is evaluated. So after two steps, the run has done each of these
# at least once and has compiled everything that it needs.
VALUES = {"optim.steps": 7, "log.metrics_every": 1, "log.checkpoint_every": 1, "log.evaluate_every": 2}


@pytest.mark.parametrize("method", fast(["circulant", "full"], "circulant"))
def test_nothing_is_compiled_after_the_second_step(tiny_files, tmp_path, monkeypatch, method):
    step, compiled = 0, []
    put_batch, train = loop.put_batch, loop.take_steps

    def counting_put_batch(*arguments):
        nonlocal step
        step += 1
        return put_batch(*arguments)

    def counted_train(*arguments):
        nonlocal step
        train(*arguments)
        step = 0

    def note(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(step)

    monkeypatch.setattr(loop, "put_batch", counting_put_batch)
    monkeypatch.setattr(loop, "take_steps", counted_train)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        train_run(tiny.make_config(tiny_files, method, **VALUES), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    # `compiled` holds the step number of each compilation, where 0 means before the first step or after the last.
    assert {0, 2} <= set(compiled) <= {0, 1, 2}


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", fast(["circulant", "full"], "circulant"))
def test_a_step_moves_nothing_between_host_and_device(tiny_files, tmp_path, monkeypatch, method):
    compile_programs, programs, calls = loop.compile_steps, [], 0

    def guarded_programs(run, state, progress):
        def guard(program):
            def call(state, frozen, batch, key, rates):
                nonlocal calls
                calls += 1
                # The learning rates are a few numbers that come from the host in each step. Copy them before the guard.
                rates = jax.device_put(rates, replicated(run.job.mesh))
                with jax.transfer_guard("disallow_explicit"):
                    return program(state, frozen, batch, key, rates)

            return call

        found = compile_programs(run, state, progress)
        programs.extend(found.values())
        return {shape: guard(program) for shape, program in found.items()}

    monkeypatch.setattr(loop, "compile_steps", guarded_programs)
    train_run(tiny.make_config(tiny_files, method, **VALUES), tmp_path)
    assert calls == 7
    # The guard does not see transfers inside the compiled program. Search the text of the program for them.
    (program,) = programs
    assert not re.findall(r"\b(?:infeed|outfeed|send|recv|\w*callback\w*)\(|callback", program.as_text())


def test_the_guards_of_the_test_above_work():
    with jax.transfer_guard("disallow_explicit"), pytest.raises(Exception, match="transfer"):
        jax.jit(lambda x: x + 1)(np.ones(3, np.float32))

    def calls_back(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), np.float32), x)

    text = jax.jit(calls_back).lower(np.ones(3, np.float32)).compile().as_text()
    assert re.findall(r"callback", text)
