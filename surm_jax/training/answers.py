"""The modes of `launch.py` that read new examples: predict labels them, and generate continues them."""

import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from surm_jax import data
from surm_jax.atomic import replacing
from surm_jax.devices.mesh import make_mesh, put_batch
from surm_jax.errors import UserError
from surm_jax.generation import GENERATION_NAME, Answer, Sampling, generate, read_settings
from surm_jax.models import Decoder, Model
from surm_jax.peft import load_adapter
from surm_jax.pretrained import locate
from surm_jax.record.inputs import check_inputs, read_inputs
from surm_jax.record.progress import track
from surm_jax.record.workdir import read_result
from surm_jax.tasks.base import Questions, Task, make_model, task_for
from surm_jax.tasks.causal_lm import find_tokenizer
from surm_jax.training.config import RunConfig
from surm_jax.training.inputs import inputs_without_data
from surm_jax.training.modes import ADAPTER_NAME, jitted
from surm_jax.training.parsing import saved_config
from surm_jax.training.setup import load_base


def predict_run(workdir: Path, overrides: Mapping[str, Any], source: Path, target: Path) -> None:
    """Predict the labels of new examples with the trained adapter of a run, and write them to a file.

    The data set that the run was trained on is not needed.

    Args:
        workdir: The folder of a run with one seed.
        overrides: New values of configuration keys, such as `model.checkpoint` if the pretrained weights were moved.
        source: The file of new examples. For text it is a table (`surm_jax.tasks.sentences.read_sentences`).
        target: The file to which the predictions are written. It is written completely or not at all.

    Raises:
        UserError: The run has several seeds or is not complete, its task cannot predict from files, or a file cannot be
            read or written.
    """
    config = _config(workdir, overrides)
    questions = task_for(config.data.name).read_questions(config.data, source)
    classes = tuple(read_result(workdir)["classes"])
    _require_target(target, source)
    questions.write(target, classes, _logits(config, workdir, max(1, len(classes)), questions))


def generate_run(
    workdir: Path,
    overrides: Mapping[str, Any],
    source: Path,
    target: Path,
    *,
    stops: tuple[str, ...] = (),
    seed: int = 0,
    stream: bool = False,
    **options: float | None,
) -> None:
    """Continue prompts with the trained adapter of a run, and write the answers to a file of JSON lines.

    An answer has "line", the number of the line of its prompt, "answer", the new text, "tokens", the number of new
    tokens, and "finish": "end" after a token that ends a text, "stop" before a text of `stops`, and "length" after
    `max_new_tokens`. The file is written when all answers are known. So a command that was stopped begins again.

    Args:
        workdir: The folder of a run with one seed.
        overrides: New values of configuration keys, such as `data.eval_batch_size`.
        source: The file of prompts (`surm_jax.data.read_prompts`). A message names each malformed line.
        target: The file of answers.
        stops: Texts before which an answer ends.
        seed: The seed of random choices. An answer depends on it and on the place of the prompt in the file.
        stream: Whether to print the answers, one after another, as they are written.
        **options: `max_new_tokens`, and the fields of `surm_jax.generation.Sampling`. What is missing or None has the
            value in the `generation_config.json` of the model (`surm_jax.generation.read_settings`).

    Raises:
        UserError: The run has several seeds, is not complete or is not about text that continues, a file cannot be
            read or written, no prompt is well-formed, or an option is out of range.
    """
    if "" in stops:
        raise UserError("--stop is empty: every answer would end before its first letter")
    config = _config(workdir, overrides)
    task = task_for(config.data.name)
    if task.reads != "prompts":
        raise UserError(f"--mode=generate continues text, but this run is about {task.reads} ({config.data.name})")
    read_result(workdir)
    _require_target(target, source)
    checkpoint = locate(config.model.checkpoint)
    geometry = task.geometry(config.model, config.data, 1)
    tokenizer = find_tokenizer(checkpoint)
    writing = _writing(tokenizer, geometry, options)
    prompts = _prompts(source, tokenizer, geometry.max_tokens - writing["max_new_tokens"])
    shown = _Shown(tokenizer, prompts, stops)
    model, mesh = _load(config, workdir, task, geometry, checkpoint)
    with jax.set_mesh(mesh):
        answers = generate(
            cast(Decoder, model),
            prompts.tokens,
            **writing,
            stop=shown.stops if stops else None,
            seed=seed,
            batch_size=1 if stream else config.data.eval_batch_size,
            watch=shown.print if stream else None,
        )
    if stream:
        print()
    _write(target, shown, answers)


def _prompts(source: Path, tokenizer: data.PromptTokenizer, most_tokens: int) -> data.Prompts:
    """Read the prompts in a file, and print a line about each that is malformed."""
    prompts = data.read_prompts(source, tokenizer, most_tokens=most_tokens)
    for complaint in prompts.malformed:
        print(complaint, file=sys.stderr)
    return prompts


def _writing(tokenizer: data.PromptTokenizer, geometry: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` for options of the command line, and the defaults of the model for others."""
    folder = tokenizer.files[0].parent
    settings, given = read_settings(folder), {name: value for name, value in options.items() if value is not None}
    new = given.pop("max_new_tokens", settings.max_new_tokens)
    if new is None:
        raise UserError(f"{folder / GENERATION_NAME} limits prompt and answer together: give --max_new_tokens")
    # Training teaches the end token of the tokenizer, which the settings of the model need not name.
    named = geometry.end_tokens if settings.end_tokens is None else settings.end_tokens
    ends = tuple({*named, *({tokenizer.end} - {None})})
    return {
        "max_new_tokens": new,
        "sampling": Sampling(**{**vars(settings.sampling), **given}),
        "end_tokens": ends,
    }


def _write(target: Path, shown: "_Shown", answers: Sequence[Answer]) -> None:
    prompts = shown.prompts
    rows = [
        {
            "line": line,
            "answer": shown.text(index, answer.tokens),
            "tokens": len(answer.tokens),
            "finish": answer.finish,
        }
        for index, (line, answer) in enumerate(zip(prompts.lines, answers, strict=True))
    ]
    try:
        with replacing(target) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    print(f"{target}: {len(rows)} answers; {len(prompts.malformed)} malformed lines were left out", file=sys.stderr)


class _Shown(NamedTuple):
    """The texts of answers, each of which ends before the first of the texts `ends`."""

    tokenizer: data.PromptTokenizer
    prompts: data.Prompts
    ends: tuple[str, ...]

    def whole(self, index: int, tokens: list[int]) -> str:
        return self.tokenizer.decode_after(self.prompts.tokens[index], tokens)

    def text(self, index: int, tokens: list[int]) -> str:
        whole = self.whole(index, tokens)
        return whole[: min((place for end in self.ends if (place := whole.find(end)) >= 0), default=len(whole))]

    def stops(self, index: int, tokens: list[int]) -> bool:
        whole = self.whole(index, tokens)
        return any(end in whole for end in self.ends)

    def print(self, index: int, tokens: list[int]) -> None:
        """Print what the last token adds to an answer. Incomplete letters wait for their last token."""
        if len(tokens) == 1:
            print(f"\n[line {self.prompts.lines[index]}]", end=" ")
        before, now = (self.text(index, part).rstrip("\ufffd") for part in (tokens[:-1], tokens))
        print(now[len(before) :], end="", flush=True)


def _config(workdir: Path, overrides: Mapping[str, Any]) -> RunConfig:
    config = saved_config(workdir, overrides)
    if config.data.name != (name := saved_config(workdir).data.name):
        raise UserError(f"config.data.name={name} belongs to the run in {workdir}: predictions do not read other data")
    if len(config.seeds) > 1:
        raise UserError(
            f"{workdir} holds a run for each of {len(config.seeds)} seeds: choose one, such as"
            f" --workdir={workdir / f'seed-{config.seeds[0]}'}"
        )
    return config


def _require_target(target: Path, source: Path) -> None:
    """Check, before anything is computed, that answers can be written to the path `target`.

    Raises:
        UserError: The folder of `target` does not exist, `target` is itself a folder or write-protected, or `target` is
            the same file as `source`, which holds the examples.
    """
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UserError(f"cannot write {target}: it is write-protected or on a read-only file system")
    if target.is_file() and source.exists() and target.samefile(source):
        raise UserError(f"the output would overwrite the input {source}: give another --output")


def _load(
    config: RunConfig, workdir: Path, task: type[Task], geometry: Any, checkpoint: Path | None
) -> tuple[Model, jax.sharding.Mesh]:
    """Load the adapted model of a run, after checking that all files beside the data are those that the run has read.

    Args:
        config: The configuration of the run.
        workdir: The folder of the run.
        task: The class of the task.
        geometry: The configuration of the model.
        checkpoint: The file or folder of the pretrained weights.
    """
    check_inputs(workdir, read_inputs(workdir), inputs_without_data(config, task, geometry, checkpoint))
    sizes = {"config.data.eval_batch_size": config.data.eval_batch_size}
    mesh = make_mesh(config.mesh.data, sizes, config.mesh.fsdp)
    with jax.set_mesh(mesh):
        base = load_base(functools.partial(make_model, geometry, config.seeds[0]), checkpoint, mesh)
        model, _ = load_adapter(workdir / ADAPTER_NAME, base, execution=config.peft.execution)
    return cast(Model, model), mesh


def _logits(config: RunConfig, workdir: Path, outputs: int, questions: Questions) -> np.ndarray:
    """Run the trained model of a run on new examples, and return its logits in the order of the examples.

    Args:
        config: The configuration of the run.
        workdir: The folder of the run.
        outputs: The number of outputs of the model.
        questions: The new examples.

    Returns:
        An array of shape (examples, outputs), float32.
    """
    task, checkpoint = task_for(config.data.name), locate(config.model.checkpoint)
    geometry = task.geometry(config.model, config.data, outputs)
    batches = questions.batches(checkpoint, geometry, config.data.eval_batch_size, config.data.lengths)
    model, mesh = _load(config, workdir, task, geometry, checkpoint)
    logits = np.zeros((questions.count, outputs), np.float32)
    with jax.set_mesh(mesh):
        state, forward = jitted(model, task.forward)
        for batch in track(batches, "predict"):
            kept = batch["mask"]
            logits[batch["index"][kept]] = np.asarray(forward(state, put_batch(batch, mesh)))[kept]
    return logits
