"""Make the tables and the picture of `docs/speed.md` from the measurements in `benchmarks/results/`.

    python -m benchmarks.speed

This command draws the picture, `docs/speed.png`. The tables are inserted by `python -m benchmarks.pages`.
"""

import json
from pathlib import Path
from typing import Any

from experiments.tables import markdown, new_figure
from surm_jax.structured import EXECUTIONS

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """Return the rows of the file `benchmarks/results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def layer_lines(rows: list[Row]) -> list[Row]:
    """Return the lines of a table of single layers, one for each family with its options.

    A line has, for each execution (a way to compute the product), the time as a multiple of LoRA's time. The lines are
    sorted by the time of the execution `auto`.

    Args:
        rows: The rows of `benchmarks.structured` for one width, number of tokens and dtype.
    """
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


def layer_table(rows: list[Row]) -> str:
    """Return the markdown table of single layers for one width, number of tokens and dtype.

    The first line is the frozen layer without an update.
    """
    executions = [name for name in EXECUTIONS if any(row["execution"] == name for row in rows)]
    columns = {"family": "", "numbers": ","} | dict.fromkeys(executions, ".2f")
    frozen = next(row for row in rows if row["family"] == "frozen")
    first = {"family": "frozen", "numbers": 0, "ms": frozen["ms"], "to frozen": 1.0}
    first["MB at peak"] = frozen["peak_bytes"] / 1e6
    return markdown([first, *layer_lines(rows)], columns | {"ms": ".1f", "to frozen": ".2f", "MB at peak": ".1f"})


def step_table(rows: list[Row], columns: dict[str, str]) -> str:
    """Return a markdown table of training steps. Sizes are shown in megabytes.

    Args:
        rows: The rows of `benchmarks.step`. The sizes in megabytes are added to them.
        columns: The columns to show, as in `markdown`.
    """
    for row in rows:
        row |= {"MB of AdamW": row["optimizer_bytes"] / 1e6, "MB at peak": row["peak_bytes"] / 1e6}
    return markdown(rows, columns)


def tables() -> dict[str, str]:
    """Return all tables in markdown, by name.

    The tables of single layers are named `WIDTHxTOKENS`, followed by the dtype if it is not float32.
    """
    sizes: dict[str, list[Row]] = {}
    for row in read("structured"):
        dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
        sizes.setdefault(f"{row['width']}x{row['tokens']}{dtype}", []).append(row)
    ratios = {"ratio_to_frozen": ".3f", "ratio_to_lora": ".3f"}
    return {size: layer_table(rows) for size, rows in sizes.items()} | {
        "peers": markdown(read("peers"), {"layer": "", "ms": ".1f", "ratio_to_ours": ".2f"}),
        "step": step_table(
            read("step"),
            {"method": "", "parameters": ",", "ms": ",.0f", **ratios, "MB of AdamW": ",.1f", "MB at peak": ",.0f"},
        ),
        "bert": markdown(
            read("bert"),
            {"step": "", "parameters": ",", "ms": ",.0f", "examples_per_s": ".1f", "ratio_to_circulant": ".2f"},
        ),
        "bank": markdown(
            read("bank"),
            {"adapters": "d", **dict.fromkeys(("one_ms", "bank_ms", "loop_ms"), ",.0f"), "bank_to_one": ".3f",
             "loop_to_bank": ".2f"},
        ),
        "quantised": markdown(read("quantised"), {"base": "", "base_mb": ".1f", "trained_mb": ".2f"}),
        "cache": markdown(read("cache"), {"cache": "", "ms": ",.1f", "faster": ",.0f", "set_up_s": ".1f"}),
        "start": markdown(read("start"), {"until": "", "seconds": ".1f"}),
        "depth": markdown(
            read("depth"),
            {"depth": "d", "layers": "", "trace_s": ".1f", "compile_s": ".1f", "instructions": ",", "temp_bytes": ","},
        ),
        "input": markdown(
            read("input"),
            {"ms": ",.0f", "wait_ms": ".2f", "share_waiting": ".2%", "ratio_to_one_batch": ".3f",
             "images_per_s": ",.0f", "images_needed_per_s": ",.1f"},
        ),
        "devices": step_table(
            read("devices"),
            {"method": "", "devices": "d", "ms": ",.0f", "examples_per_s": ".1f", "MB at peak": ",.0f"},
        ),
    }  # fmt: skip


def draw(path: Path) -> None:
    """Draw the time of a layer with an update of each family, as a multiple of the time of the frozen layer.

    The products are computed in the way that `auto` chooses.
    """
    rows = [row for row in read("structured") if row["tokens"] == 6304 and row["dtype"] == "float32"]
    lora = next(row["ratio_to_frozen"] for row in rows if (row["family"], row["execution"]) == ("LowRank", "fft"))
    lines = layer_lines(rows)[::-1]
    figure = new_figure(7.5, 0.34 * len(lines) + 1)
    axes = figure.subplots()
    axes.barh([line["family"] for line in lines], [line["to frozen"] for line in lines], color="#4477aa", height=0.62)
    for place, line in enumerate(lines):
        axes.text(line["to frozen"] + 0.01, place, f"{line['to frozen']:.2f}", va="center", fontsize=9)
    for value, label, style in ((1.0, "frozen layer", "-"), (lora, "LoRA r = 1, textbook form", "--")):
        axes.axvline(value, color="#333333", linewidth=1, linestyle=style, label=label)
    axes.set_xlim(0, 1.15 * max(line["to frozen"] for line in lines))
    axes.set_xlabel(f"time over the frozen layer's\n768 x 768, 6,304 tokens, forward and backward, {rows[0]['device']}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(Path(__file__).resolve().parent.parent / "docs" / "speed.png")
