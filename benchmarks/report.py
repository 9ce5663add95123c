"""Writes docs/speed.md and docs/speed.png from benchmarks/results/*.json, the files that the benchmarks' `--out` wrote.

python -m benchmarks.report
"""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from surm_jax.structured import EXECUTIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]

HEAD = """# Speed

What a structured update costs beside the frozen layer and LoRA of rank 1. Written by `python -m benchmarks.report`
from `benchmarks/results/`; the command above each table measures its rows anew, from the project's root, and puts them
there. Times are medians over rounds in which all programs take turns. Every layer program computes the output, the
gradient of the input and those of the update's parameters.

`frozen` is the kernel alone, the floor. `LoRA` is the textbook form `x @ W + (x @ B) @ A^T`. The executions `fft`,
`dense`, `fused` and `auto` are explained in `surm_jax/structured/products/execution.py`: `auto` takes what
`surm_jax/structured/products/choice.json` found fastest, and `--config.peft.execution=` or
`surm_jax.adapt(..., execution=)` forces one. Our own LoRA is the row `LowRank`. `auto` and the execution it stands for
are one program: the difference between their columns is the noise of the measurement.

![cost of a layer by family](speed.png)
"""


TAIL = """## What bounds it

- A circulant's parameters get their gradient from the spectra of the input and of the output's gradient: two real FFTs
  a row, beside two products with a kernel. That is all it costs over the frozen layer, and more than the two inner
  products a row of LoRA r = 1 where the width is small.
- `W(G, H)` and the Toeplitz pairs need several FFTs a row, forth and back. With many tokens a product of
  input and output gradient, reduced to the parameters, is as fast at width 768.
- `fused` holds `W + M` once, as large as the kernel, and `dense` twice that; LoRA's textbook form does not.
"""


def read(name: str) -> list[Row]:
    """The rows of a file in benchmarks/results."""
    return json.loads((RESULTS / name).read_text())


def markdown(rows: list[Row], columns: dict[str, str]) -> str:
    """A table; `columns` maps keys to format specifications, numbers to the right."""
    rule = "|".join("---:" if spec else "---" for spec in columns.values())
    lines = [f"| {' | '.join(columns)} |", f"|{rule}|"]
    for row in rows:
        lines.append("| " + " | ".join("" if row[k] is None else format(row[k], s) for k, s in columns.items()) + " |")
    return "\n".join(lines)


def measured_by(module: str, file: str, **flags: Any) -> str:
    """The command that measures all rows of a file anew, as a block of markdown."""
    words = [f"python -m benchmarks.{module}", *(f"--{name}={value}" for name, value in flags.items())]
    text = " ".join([*words, f"--out=benchmarks/results/{file}"])
    lines = textwrap.wrap(text, 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "```sh\n" + " \\\n".join(lines) + "\n```"


def listed(rows: list[Row], key: str) -> str:
    """The values of a column for a flag that lists them; what is frozen is always timed."""
    return ",".join(dict.fromkeys(str(row[key]) for row in rows if row[key] != "frozen"))


def layer_rows(rows: list[Row]) -> list[Row]:
    """One line for each variant: the times of its executions side by side, as multiples of LoRA's."""
    lines: dict[str, Row] = {}
    for row in rows:
        if row["family"] == "frozen":
            continue
        options = " ".join(f"{key}={value}" for key, value in row["options"].items())
        name = f"{row['family']} {options}".strip()
        line = lines.setdefault(name, {"family": name, "numbers": row["parameters"]})
        if row["execution"] == "auto":
            line |= {"ms": row["ms"], "to frozen": row["ratio_to_frozen"], "MB at peak": row["peak_bytes"] / 1e6}
        line[row["execution"]] = row["ratio_to_lora"]
    return sorted(lines.values(), key=lambda line: line["auto"])


def layer_sections() -> list[str]:
    """One for each size and precision in structured.json."""
    rows, parts = read("structured.json"), []
    for width, tokens, dtype in dict.fromkeys((row["width"], row["tokens"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["width"], row["tokens"], row["dtype"]) == (width, tokens, dtype)]
        executions = [name for name in EXECUTIONS if any(row["execution"] == name for row in here)]
        columns = {"family": "", "numbers": ","} | dict.fromkeys(executions, ".2f")
        columns |= {"ms": ".1f", "to frozen": ".2f", "MB at peak": ".1f"}
        frozen = next(row for row in here if row["family"] == "frozen")
        flags = {"families": listed(here, "family"), "sizes": f"{width}x{tokens}", "dtypes": dtype}
        again = measured_by("structured", "structured.json", **flags)
        parts.append(f"""## One layer, {width} x {width}, {tokens:,} tokens, {dtype}

{again}

On {frozen["device"]}, jax {frozen["jax"]}. Multiples of LoRA's time by execution; `ms`, `to frozen` and `MB at peak`
(arguments, results and temporaries) are those of `auto`.
The frozen layer takes {frozen["ms"]:.1f} ms and {frozen["peak_bytes"] / 1e6:.1f} MB.

{markdown(layer_rows(here), columns)}""")
    return parts


def peer_section() -> str:
    """What is in peers.json."""
    rows = read("peers.json")
    first = rows[0]
    return f"""## Beside PyTorch and peft

{measured_by("peers", "peers.json", width=first["width"], tokens=first["tokens"])}

Width {first["width"]}, {first["tokens"]:,} tokens, float32, on {first["device"]}; needs requirements-peers.txt:
torch {first["torch"]}, peft {first["peft"]}, jax {first["jax"]}. `ratio_to_ours`: the peer's time over that of our
matrix of the same kind. The gradient that peft's C3A computes for its input is not the right one: see
`benchmarks/peers.py`.

{markdown(rows, {"layer": "", "ms": ".1f", "ratio_to_ours": ".2f"})}"""


def bert_section() -> str:
    """What is in bert.json."""
    rows = read("bert.json")
    first = rows[0]
    columns = {"step": "", "parameters": ",", "ms": ",.0f", "examples_per_s": ".1f", "ratio_to_circulant": ".2f"}
    return f"""## A training step of {first["model"]} beside PyTorch

{measured_by("bert", "bert.json", variant=variant(first), batch=first["batch"], length=first["length"])}

Batch {first["batch"]}, {first["length"]} tokens, float32, on {first["device"]}; needs requirements-peers.txt:
torch {first["torch"]}, transformers {first["transformers"]}, peft {first["peft"]}, jax {first["jax"]}.
Updates of Q, K and V and a trained classifier, same weights and batch; forward, backward and AdamW. peft's C3A computes
a wrong gradient for its input: see `benchmarks/peers.py`.

{markdown(rows, columns)}"""


def variant(row: Row) -> str:
    """The flag of a row's model: `B/16` of `ViT-B/16`."""
    return row["model"].partition("-")[2]


def step_command(file: str, rows: list[Row], **flags: Any) -> str:
    """The command of a file that `benchmarks.step` wrote."""
    flags |= {"variant": variant(rows[0]), "batch": rows[0]["batch"], "methods": listed(rows, "method")}
    return measured_by("step", file, **flags)


def step_section() -> str:
    """What is in step.json."""
    rows = [
        {**row, "MB at peak": row["peak_bytes"] / 1e6, "MB of AdamW": row["optimizer_bytes"] / 1e6}
        for row in read("step.json")
    ]
    columns = {"method": "", "parameters": ",", "ms": ",.0f", "ratio_to_frozen": ".3f", "ratio_to_lora": ".3f"}
    first = rows[0]
    return f"""## A training step of {first["model"]}

{step_command("step.json", rows)}

Batch {first["batch"]}, float32, on {first["device"]}, jax {first["jax"]}. Forward, backward and AdamW; `frozen`:
forward and the gradient of the image. Updates run as `auto` says, on Q, K and V; adapters stand after attention and
MLP.

{markdown(rows, columns | {"MB of AdamW": ",.1f", "MB at peak": ",.0f"})}"""


def bank_section() -> str:
    """What is in bank.json."""
    rows = read("bank.json")
    columns = {"adapters": "", "one_ms": ",.0f", "bank_ms": ",.0f", "loop_ms": ",.0f"}
    first = rows[0]
    flags = {"variant": variant(first), "adapters": listed(rows, "adapters")}
    flags |= {name: first[name] for name in ("method", "batch", "image_size")}
    return f"""## Many adapters in one batch

{measured_by("bank", "bank.json", **flags)}

{first["model"]} at {first["image_size"]} pixels, batch {first["batch"]}, {first["method"]} updates on Q, K and V and a
head for every adapter, forward pass, float32, on {first["device"]}, jax {first["jax"]}.
`bank`: each example has its own adapter, in one program (`surm_jax.load_bank`). `one`: one adapter for all. `loop`: the
examples of one adapter after those of the other.

{markdown(rows, columns | {"bank_to_one": ".3f", "loop_to_bank": ".2f"})}"""


def depth_section() -> str:
    """What is in depth.json."""
    rows = read("depth.json")
    first = rows[0]
    columns = {"depth": "", "layers": "", "trace_s": ".1f", "compile_s": ".1f", "instructions": ",", "temp_bytes": ","}
    flags = {name: first[name] for name in ("width", "method", "remat")}
    return f"""## Compiling deep models

{measured_by("depth", "depth.json", depths=listed(rows, "depth"), **flags)}

A ViT of width {first["width"]}, batch {first["batch"]}, {first["method"]} on Q, K and V,
`config.model.remat={first["remat"]}`, on {first["device"]}, jax {first["jax"]}. `scanned`: with
`config.model.scan_layers`. A scan keeps more for the gradient than a loop: use it with `config.model.remat=block`.

{markdown(rows, columns)}"""


def input_section() -> str:
    """What is in input.json."""
    (row,) = read("input.json")
    columns = {"ms": ",.0f", "wait_ms": ".2f", "share_waiting": ".2%", "ratio_to_one_batch": ".3f"}
    columns |= {"images_per_s": ",.0f", "images_needed_per_s": ",.1f"}
    flags = {"set": row["set"], "variant": variant(row), "batch": row["batch"], "steps": row["steps"]}
    return f"""## Waiting for data

{measured_by("input", "input.json", data="FOLDER_OF_PREPARED_TFDS_SETS", **flags)}

{row["set"]} at {row["image_size"]} pixels into a training step of {row["model"]}, batch
{row["batch"]}, {row["steps"]} steps, on {row["device"]}, jax {row["jax"]}. `share_waiting` is the part of a step in
which no batch was ready; `images_per_s` what the input makes alone on these cores, `images_needed_per_s` what the step
would take.

{markdown([row], columns)}"""


def devices_section() -> str:
    """What is in devices.json."""
    rows = read("devices.json")
    columns = {"method": "", "devices": "", "ms": ",.0f", "examples_per_s": ".1f", "MB on a device": ",.0f"}
    rows = [{**row, "MB on a device": row["peak_bytes"] / 1e6} for row in rows]
    first = rows[0]
    return f"""## Several devices

{step_command("devices.json", rows, devices=listed(rows, "devices"))}

{first["model"]}, batch {first["batch"]}, on {first["device"]}, jax {first["jax"]}. The devices are simulated and
share the two cores, so that examples a second can only stay the same. Bytes are those on one device.

{markdown(rows, columns)}"""


def figure() -> Figure:
    """Bars: the time of a layer by family, `auto`, as a multiple of the frozen layer's."""
    rows = [row for row in read("structured.json") if row["tokens"] == 6304 and row["dtype"] == "float32"]
    lora = next(row["ratio_to_frozen"] for row in rows if (row["family"], row["execution"]) == ("LowRank", "fft"))
    lines = layer_rows(rows)[::-1]
    picture = Figure(figsize=(7.5, 0.34 * len(lines) + 1), layout="constrained")
    axes = picture.subplots()
    axes.barh([line["family"] for line in lines], [line["to frozen"] for line in lines], color="#4477aa", height=0.62)
    for place, line in enumerate(lines):
        axes.text(line["to frozen"] + 0.01, place, f"{line['to frozen']:.2f}", va="center", fontsize=9)
    for value, label, style in ((1.0, "frozen layer", "-"), (lora, "LoRA r = 1, textbook form", "--")):
        axes.axvline(value, color="#333333", linewidth=1, linestyle=style, label=label)
    axes.set_xlim(0, 1.15 * max(line["to frozen"] for line in lines))
    axes.set_xlabel(f"time over the frozen layer's\n768 x 768, 6,304 tokens, forward and backward, {rows[0]['device']}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def page() -> str:
    """The text of docs/speed.md."""
    parts = [
        HEAD.rstrip(),
        *layer_sections(),
        peer_section(),
        step_section(),
        bert_section(),
        bank_section(),
        depth_section(),
        input_section(),
        devices_section(),
        TAIL.rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes both files."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(arguments)
    (ROOT / "docs" / "speed.md").write_text(page())
    figure().savefig(ROOT / "docs" / "speed.png", dpi=120)


if __name__ == "__main__":
    main()
