"""Tests of the command line program: configurations, error messages, and runs that are stopped and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from surm_jax import __main__ as launch
from surm_jax.devices import compilation
from surm_jax.peft import METHODS
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.run import InterruptedRunError
from tests.training import tiny, tiny_text

ROOT = Path(launch.__file__).resolve().parents[1]
GLUE = f"--config={ROOT / 'configs' / 'bert_glue.py'}"


class Answer(NamedTuple):
    """The result of one call of the program.

    Attributes:
        status: The exit status.
        message: The message with which the program ended, or an empty string.
        out: The text that it printed to the standard output.
    """

    status: int
    message: str
    out: str


@pytest.fixture
def launched(monkeypatch, capsys):
    """Return a function that runs the program in this process with the given arguments, as `python launch.py` would."""

    def run(*arguments):
        argv = ["launch.py", *arguments]
        # ml_collections reads the arguments from sys.argv too.
        monkeypatch.setattr(sys, "argv", argv)
        known = set(flags.FLAGS)
        capsys.readouterr()
        try:
            launch.guarded(launch.main, launch.guarded(launch.parse_flags, argv))
            status, message = 0, ""
        except SystemExit as end:
            status, message = (1, end.code) if isinstance(end.code, str) else (end.code, "")
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        return Answer(status, message, capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.write_files(tmp_path_factory.mktemp("tiny"))


def parsed(monkeypatch, *arguments):
    """Return the configuration that the program reads from these arguments."""
    argv = ["launch.py", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    known = set(flags.FLAGS)
    try:
        launch.parse_flags(argv)
        return flags.FLAGS.config.copy_and_resolve_references()
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)


def values_of(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from values_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_value_can_be_given(monkeypatch):
    changed = {
        bool: lambda old: not old,
        int: lambda old: old + 3,
        float: lambda old: old + 0.25,
        str: lambda old: f"{old}x",
        tuple: lambda old: old * 2,
    }
    default = dict(values_of(base_config()))
    new = {key: changed[type(value)](value) for key, value in default.items()}
    new |= {"data.classes": ("cat", "dog"), "plugins": ("json", "re")}
    new |= {"peft.rules": ({"target": "mlp", "method": "lora", "which": (0, 2)},)}
    assert len(new) > 40
    assert [key for key in new if new[key] == default[key]] == []
    config = parsed(monkeypatch, *(f"--config.{key}={value}" for key, value in new.items()))
    assert dict(values_of(config)) == new
    assert {key: type(value) for key, value in values_of(config)} == {key: type(value) for key, value in new.items()}


def test_numbers_and_tuples(monkeypatch):
    config = parsed(
        monkeypatch,
        "--config.optim.learning_rate.lora=1",
        "--config.seeds=(3, 4)",
        "--config.peft.train=('head/.*', 'norm/.*')",
        "--config.optim.clip_norm=1e-2",
    )
    assert (config.optim.learning_rate.lora, type(config.optim.learning_rate.lora)) == (1.0, float)
    assert config.seeds == (3, 4)
    assert config.peft.train == ("head/.*", "norm/.*")
    assert config.optim.clip_norm == 0.01


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.peft.metod=lora"], ["no key 'peft.metod'", "'peft.method'"]),
        (["--config.optm.steps=3"], ["no key 'optm.steps'", "'optim.steps'"]),
        (["--config.peft.lora.rang=3"], ["no key 'peft.lora.rang'", "'peft.lora.rank'"]),
        (["--config.learning_rate=3"], ["no key 'learning_rate'", "mean --config.optim.learning_rate.circulant or"]),
        (["--workdr=x"], ["unknown flag --workdr", "'workdir'"]),
        (["--method=lora"], ["unknown flag --method; did you mean --config.peft.method?"]),
        (["--peft.method=lora"], ["unknown flag --peft.method; did you mean --config.peft.method?"]),
        (["--steps=3"], ["unknown flag --steps; did you mean --config.optim.steps?"]),
        (["--batch_size", "3"], ["unknown flag --batch_size; did you mean --config.data.batch_size?"]),
        (["--num_classes=3"], ["unknown flag --num_classes; did you mean --config.model.num_classes?"]),
        (["--full=3"], ["unknown flag --full; did you mean --config.optim.learning_rate.full?"]),
        (["--mode=evalute"], ["mode", "evaluate"]),
        (["train"], ["unknown argument 'train'"]),
        (["--config=configs/digit.py"], ["no configuration 'configs/digit.py'", "did you mean 'configs/digits.py'"]),
        (["--config=/no/digits.py"], ["no configuration '/no/digits.py'", "did you mean 'configs/digits.py'"]),
        (["--config.optim.steps=1.5"], ["config.optim.steps", "1.5"]),
        (["--config.optim.steps=many"], ["config.optim.steps", "many"]),
        (["--config.optim.clip_norm=much"], ["config.optim.clip_norm", "much"]),
        (["--config.optim=3"], ["config.optim is a section: give one of its keys, such as --config.optim.accumulate"]),
        (["--config.optim.learning_rate=1e-3"], ["is a section", "such as --config.optim.learning_rate.circulant"]),
        (["--config.peft.full=True"], ["config.peft.full is a section without keys"]),
        (["--config.data.classes=cat,dog"], ["config.data.classes", "\"('cat','dog')\"", "got 'cat,dog'"]),
        (["--config.seeds=(0,1.5)"], ["config.seeds", "1.5"]),
        (
            ["--config.plugins=my_own"],
            ["config.plugins must be a tuple of module names", "\"('my_family',)\", got my_own"],
        ),
        (["--config.plugins=('no_such_module',)"], ["cannot import 'no_such_module'", "No module named"]),
        (["--config.peft.method=circulent"], ["config.peft.method", "did you mean 'circulant'"]),
        (["--config.peft.target=blocks/0/attention/qeury"], ["qeury", "blocks/0/attention/query"]),
        (["--config.data.name=none.npz"], ["no data file", "none.npz"]),
        (["--config.data.name=cifar10", "--config.data.dir=/nowhere"], ["cifar10", "/nowhere"]),
        (["--config.data.batch_size=30"], ["config.data.batch_size", "24 or 32"]),
        (["--config.model.checkpoint=/nowhere/x.npz"], ["/nowhere"]),
        (["--mode=evaluate"], ["no run in"]),
        (["--mode=merge"], ["no run in"]),
        ([f"{GLUE}:task=rt"], ["task must be one of", "got 'rt'", "did you mean 'rte'"]),
        (
            [f"{GLUE}:task=rte,method=circulent"],
            ["method must be one of", "'circulent'; did you mean 'circulant'"],
        ),
        ([f"{GLUE}:taks=rte"], ["the option must be one of", "got 'taks'", "did you mean 'task'"]),
        ([f"{GLUE}:task=rte", "--config.optim.steps=20"], ["config.optim.epochs=80", "--config.optim.epochs=0"]),
        ([f"{GLUE}:task=cola", "--config.data.dir=/nowhere"], ["glue/cola", "/nowhere"]),
        (["--mode=predict"], ["needs --input=FILE.tsv and --output=FILE.tsv"]),
        (["--mode=predict", "--input=in.tsv"], ["needs --input=FILE.tsv and --output=FILE.tsv"]),
        (["--mode=predict", "--input=in.tsv", "--output=out.tsv"], ["no run in"]),
        (["--mode=generate", "--input=in.jsonl"], ["needs --input=FILE.jsonl and --output=FILE.jsonl"]),
        (["--inptu=in.tsv"], ["unknown flag --inptu", "'input'"]),
    ],
)
def test_a_mistake_has_one_message_and_status_one(launched, tmp_path, arguments, parts):
    answer = launched(*arguments, f"--workdir={tmp_path / 'run'}")
    assert answer.status == 1
    assert answer.message.startswith("error: ") and "\n" not in answer.message
    assert [part for part in parts if part not in answer.message] == []


def test_a_configuration_is_found_from_any_folder(launched, tmp_path, monkeypatch):
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.modes, "describe_run", lambda config: given.append(config.peft.method))
    glue = "configs/bert_glue.py:task=rte,method=lora"
    for config in (["--config=configs/digits.py"], ["--config", "configs/digits.py"], [f"--config={glue}"]):
        assert launched(*config, "--mode=describe").status == 0
    assert given == ["circulant", "circulant", "lora"]


def test_a_configuration_is_looked_for_from_here(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = launched("--config=configs/digit.py")
    assert answer.status == 1 and "did you mean" not in answer.message
    assert f"'configs/digit.py' (looked for from {tmp_path})" in answer.message
    assert str(ROOT / "configs") in answer.message


def test_a_home_is_expanded(launched, tmp_path, monkeypatch):
    given = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(launch.answers, "predict_run", lambda *arguments: given.extend(arguments))
    answer = launched("--mode=predict", "--workdir=~/run", "--input=~/in.tsv", "--output=~/out.tsv")
    assert answer.status == 0
    assert given == [tmp_path / "run", {}, tmp_path / "in.tsv", tmp_path / "out.tsv"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("train_run", "config", "workdir")),
        (["--mode=train"], ("train_run", "config", "workdir")),
        (["--mode=evaluate"], ("evaluate_run", "workdir", "overrides")),
        (["--mode=merge"], ("merge_run", "workdir", "overrides")),
        (["--mode=export"], ("export_run", "workdir", "overrides", "hf", None, False)),
        (
            ["--mode=export", "--format=peft", "--rank=16", "--force"],
            ("export_run", "workdir", "overrides", "peft", 16, True),
        ),
        (["--mode=predict", "--input=i", "--output=o"], ("predict_run", "workdir", "overrides", Path("i"), Path("o"))),
        (
            ["--mode=generate", "--input=i", "--output=o", "--top_k=3", "--stop=a", "--stop=b, c", "--seed=4"],
            (
                *("generate_run", "workdir", "overrides", Path("i"), Path("o")),
                *(("a", "b, c"), 4, False, None, None, 3, None),
            ),
        ),
        (["--mode=describe"], ("describe_run", "config")),
    ],
)
def test_every_mode_is_its_own(launched, tmp_path, monkeypatch, arguments, expected):
    given = []
    places = [(room, name) for room in (launch.modes, launch.answers) for name in vars(room) if name.endswith("_run")]
    for room, name in places:
        monkeypatch.setattr(
            room,
            name,
            lambda *given_to, name=name, **options: given.append((name, *given_to, *options.values())),
        )
    config = parse(parsed(monkeypatch, "--config.data.dir=/d"))
    assert config.data.dir == "/d"
    assert launched("--config.data.dir=/d", f"--workdir={tmp_path}", *arguments).status == 0
    values = {"config": config, "workdir": tmp_path, "overrides": {"data.dir": "/d"}}
    assert given == [tuple(values.get(part, part) for part in expected)]


@pytest.mark.parametrize("mistake", ["file", "below", "foreign", "unwritable"])
def test_folders_that_will_not_do(launched, tmp_path, mistake):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    workdir, part = {
        "file": (tmp_path / "file", "is a file"),
        "below": (tmp_path / "file" / "run", "lies below a file"),
        "foreign": (tmp_path / "folder", "holds files but no run"),
        "unwritable": (Path("/proc/self"), "cannot be written"),
    }[mistake]
    answer = launched(f"--workdir={workdir}")
    assert answer.status == 1 and part in answer.message and str(workdir) in answer.message
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes").read_text() == "mine"


def test_describe_prints_and_leaves_nothing(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = launched("--mode=describe", "--config.model.num_classes=7", "--config.peft.method=lora")
    assert answer.status == 0
    assert "head/bias" in answer.out and "LowRank" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_has_the_status_of_its_signal(capsys):
    def interrupted(_):
        raise InterruptedRunError("SIGTERM: saved step 3", 143)

    def at_once(_):
        raise KeyboardInterrupt

    for step, status, part in ((interrupted, 143, "SIGTERM: saved step 3"), (at_once, 130, "SIGINT: stopped at once")):
        with pytest.raises(SystemExit) as end:
            launch.guarded(step, [])
        assert end.value.code == status
        assert part in capsys.readouterr().err


def test_too_little_memory_has_one_message(capsys):
    def large(_):
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(2**45))())

    with pytest.raises(SystemExit) as end:
        launch.guarded(large, [])
    assert end.value.code.startswith("error: the run does not fit into device memory: use a smaller")
    assert "RESOURCE_EXHAUSTED" in end.value.code and "\n" not in end.value.code

    def other(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError):
        launch.guarded(other, [])


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a module `my_own` with a fine-tuning method `mine` to the working directory, as a plugin of a user.

    The fixture returns a function that removes both from memory, as if the plugin had not been imported.
    """
    (tmp_path / "my_own.py").write_text(
        "import dataclasses\nfrom surm_jax.peft import Selection\n\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\nclass Mine(Selection):\n"
        "    name = 'mine'\n    patterns = ('.*/norm1/.*',)\n    order: int = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def forget():
        METHODS.pop("mine", None)
        sys.modules.pop("my_own", None)

    yield forget
    forget()


def test_a_method_of_ones_own_is_known_in_every_mode(launched, files, tmp_path, plugin, monkeypatch):
    values = {**tiny.flat_config(files), "optim.steps": 1}
    values |= {"plugins": "('my_own',)", "peft.method": "mine", "peft.mine.order": 2, "optim.learning_rate.mine": 0.1}
    # This configuration file is only needed to register the tiny model of the tests.
    job = f"--config={ROOT / 'tests' / 'training' / 'tiny_job.py'}:{files}"
    train = (job, f"--workdir={tmp_path / 'run'}", *(f"--config.{key}={value}" for key, value in values.items()))
    run = launched(*train)
    assert (run.status, run.message) == (0, "")
    assert "mine" in run.out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["plugins"], saved["peft"]["mine"]) == (["my_own"], {"order": 2})
    # Later modes read the plugins from the configuration of the run. They find them where the run was started.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for arguments in (("--mode=evaluate", train[1]), ("--mode=merge", train[1]), train):
        plugin()
        sys.path.remove(str(tmp_path))
        done = launched(*arguments)
        assert (done.status, done.message) == (0, "")
    plugin()
    (tmp_path / "my_own.py").unlink()
    gone = launched("--mode=evaluate", f"--workdir={tmp_path / 'run'}")
    assert gone.status == 1 and "cannot import 'my_own'" in gone.message and "\n" not in gone.message


def test_a_bug_keeps_its_traceback():
    def broken(_):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        launch.guarded(broken, [])


def process(files, workdir, *arguments):
    config = f"--config={ROOT / 'tests/training/tiny_job.py'}:{files}"
    return subprocess.Popen(
        [sys.executable, "launch.py", config, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        # Other tests must not read a program that a killed process has written in part.
        env={**os.environ, "SURM_JAX_CACHE": str(files / "cache"), "JAX_COMPILATION_CACHE_DIR": str(files / "own")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


LONG = (
    "--config.optim.steps=200",
    "--config.log.metrics_every=1",
    "--config.log.evaluate_every=50",
    "--config.log.checkpoint_every=20",
)


def stop_after(files, workdir, count, number):
    """Start or resume a run in another process, and stop it by a signal.

    Args:
        files: The folder that `tiny.write_files` filled.
        workdir: The folder of the run.
        count: The number of training steps that this process reports before it gets the signal.
        number: The number of the signal, such as `signal.SIGTERM`.

    Returns:
        The exit status of the process, and the text that it printed to the standard error.
    """
    with process(files, workdir, *LONG) as run:
        said = []
        for line in run.stderr:
            said.append(line)
            if sum("train_loss" in line for line in said) == count:
                run.send_signal(number)
                break
        said += run.stderr.readlines()
    return run.returncode, "".join(said)


@pytest.mark.exhaustive
def test_a_run_that_was_stopped_in_three_ways_ends_like_one_that_was_not(files, tmp_path):
    # This run is not interrupted. It runs at the same time as the others. The process would stop and wait if its output
    # filled the pipe before the test reads it, but the output is short enough.
    whole = process(files, tmp_path / "whole", *LONG)
    parts = tmp_path / "parts"

    status, said = stop_after(files, parts, 25, signal.SIGTERM)
    assert status == 143, said
    saved = int(
        re.search(r"SIGTERM: saved step (\d+) of 200 in .*parts/checkpoints; the same command goes on", said)[1]
    )
    assert 25 <= saved < 200 and "Traceback" not in said

    status, said = stop_after(files, parts, 45, signal.SIGKILL)
    assert status == -signal.SIGKILL, said
    assert f"going on from step {saved} of 200" in said

    status, said = stop_after(files, parts, 10, signal.SIGINT)
    assert status == 130, said
    again = int(re.search(r"going on from step (\d+) of 200", said)[1])
    assert saved < again < 200 and (again % 20 == 0 or again % 50 == 0)
    assert not (parts / "result.json").exists()

    last = process(files, parts, *LONG)
    assert "going on from step" in last.stderr.read()
    assert last.wait() == 0
    whole.communicate()
    assert whole.returncode == 0
    tiny.assert_same_run(tmp_path / "whole", parts)


@pytest.mark.exhaustive
def test_mistakes_in_a_process_of_their_own(files, tmp_path):
    """Check the whole text that a separate process prints for wrong arguments, with what absl and Python print."""
    (tmp_path / "file").write_text("mine")
    mistyped = process(files, tmp_path / "run", "--config.optim.stepss=3")
    said = mistyped.communicate()[1]
    assert said.startswith("error: the configuration has no key 'optim.stepss'; did you mean 'optim.steps'")
    assert said.count("\n") == 1
    no_folder = process(files, tmp_path / "file")
    said = no_folder.communicate()[1]
    assert said.startswith("error: the run's folder") and said.count("\n") == 1
    assert mistyped.returncode == no_folder.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def no_programs_yet(monkeypatch):
    """Start a test without JAX's cache of compiled programs, and restore its settings afterwards."""
    names = ("dir", "max_size")
    before = {name: getattr(jax.config, f"jax_compilation_cache_{name}") for name in names}
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(f"jax_compilation_cache_{name}", value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def test_programs_are_kept_in_the_cache_unless_jax_knows_better(no_programs_yet, tmp_path, monkeypatch):
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path / "cache"))
    compilation.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "programs")
    assert jax.config.jax_compilation_cache_max_size == 2**31
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    jax.config.update("jax_compilation_cache_max_size", 5)
    compilation.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert jax.config.jax_compilation_cache_max_size == 5


def text_process(files, workdir, *arguments):
    """Run the program in a separate process, and return the completed process.

    JAX's compilation cache is the folder `files / "programs"`, which shows what the process compiled.
    """
    programs = {"JAX_COMPILATION_CACHE_DIR": str(files / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run(
        [sys.executable, "launch.py", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "SURM_JAX_CACHE": str(files / "cache"), **programs},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.exhaustive
def test_text_by_the_command_line_and_another_seed_compiles_nothing(tmp_path):
    files = tiny_text.write_files(tmp_path)
    values = tiny_text.flat_config(files, "rte", **{"optim.epochs": 0.0, "optim.steps": 2, "data.lengths": (20,)})
    job = ["--config=configs/bert_glue.py:task=rte,method=circulant_adapter"]
    job += [f"--config.{key}={value}" for key, value in values.items()]

    def programs():
        return {path.name for path in (files / "programs").iterdir() if path.name.endswith("-cache")}

    first = text_process(files, tmp_path / "first", *job)
    assert first.returncode == 0, first.stderr
    assert re.findall(r"compiled for batches of (\d+) tokens in", first.stderr) == ["20"]
    assert "test accuracy" in first.stdout and "Traceback" not in first.stderr
    kept = programs()
    assert sum("train_step" in name for name in kept) == 1

    # Learning rates are arguments of the compiled training step, so another learning rate does not compile it again.
    # Only the small program that initialises the new head is compiled again for another seed.
    another = ["--config.seeds=(5,)", "--config.optim.learning_rate.circulant_adapter=0.5"]
    second = text_process(files, tmp_path / "second", *job, *another)
    assert second.returncode == 0, second.stderr
    assert {name.partition("-")[0] for name in programs() - kept} <= {"jit_init"}
    losses = [json.loads((tmp_path / run / "result.json").read_text())["metrics"] for run in ("first", "second")]
    assert losses[0] != losses[1]

    table, answers = tmp_path / "in.tsv", tmp_path / "out.tsv"
    table.write_bytes(b"sentence1\tsentence2\r\nthe cat\ta dog\r\nalone\r\n")
    asked = text_process(files, tmp_path / "first", "--mode=predict", f"--input={table}", f"--output={answers}")
    assert asked.returncode == 0, asked.stderr
    assert asked.stderr.splitlines()[-2] == f"{table}, line 3: 1 columns, expected 2 (sentence1, sentence2)"
    assert asked.stderr.splitlines()[-1] == f"{answers}: 1 rows; 1 malformed ones were left out"
    head, answer = (line.split("\t") for line in answers.read_text().splitlines())
    assert head == ["line", "label", "entailment", "not_entailment"]
    assert answer[0] == "2" and answer[1] in head[2:]
    assert float(answer[2]) + float(answer[3]) == pytest.approx(1, abs=2e-6)
