"""The report of a run: the content of `result.json`, and a table for the terminal."""

import importlib.metadata
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from surm_jax.peft import Description

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")


def make_result(
    method: str,
    tests: Mapping[str, Mapping[str, float]],
    description: Description,
    *,
    seed: int,
    metrics: Sequence[str],
    classes: Sequence[str],
    corrupt: Mapping[str, int],
    steps: int,
    seconds: float,
    examples_per_second: float | None,
    adapter_bytes: int,
) -> dict[str, Any]:
    """Return the result of a run with one seed, a dictionary for `result.json`.

    Args:
        method: The name of the adaptation method, such as "lora".
        tests: For each test split, the task's metrics after the last step, with `loss` and `examples`.
        description: The table of what was trained, with the numbers of parameters.
        seed: The seed of the run.
        metrics: The names of the task's metrics. The first one, on the first test split, is the main metric.
        classes: The names of the classes. It is empty if the labels are real numbers.
        corrupt: The number of examples in each split that could not be read and were skipped.
        steps: The number of updates.
        seconds: The working time of the run, summed over all its starts, including compilation and evaluation.
        examples_per_second: The training speed, without compilation, evaluation and checkpoints. None if it could not
            be measured, as in a run of one step.
        adapter_bytes: The size of the adapter folder in bytes.
    """
    measured = {f"{split}_{name}": values[name] for split, values in tests.items() for name in (*metrics, "loss")}
    return {
        "method": method,
        "seeds": [seed],
        "metric": next(iter(measured)),
        "metrics": measured,
        "classes": list(classes),
        "examples": {split: values["examples"] for split, values in tests.items()},
        "corrupt_examples": dict(corrupt),
        "parameters": {
            "trainable": description.trainable,
            "adapter": description.adapter,
            "total": description.total,
        },
        "steps": steps,
        "seconds": round(seconds, 2),
        "examples_per_second": examples_per_second and round(examples_per_second, 1),
        "adapter_bytes": adapter_bytes,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def combine(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the results of several seeds into one result.

    Every metric becomes a dictionary with `mean`, `std` (the standard deviation with denominator n - 1) and `seeds`
    (the value of each seed). The working times are added. The number of unreadable examples in each split is the
    largest over the seeds. All other entries are those of the first seed.

    Args:
        results: The result of each seed, by the seed.
    """
    first = next(iter(results.values()))
    metrics = {}
    for name in first["metrics"]:
        values = [result["metrics"][name] for result in results.values()]
        metrics[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values), "seeds": values}
    return {
        **first,
        "seeds": list(results),
        "metrics": metrics,
        "corrupt_examples": {
            split: max(result["corrupt_examples"][split] for result in results.values())
            for split in first["corrupt_examples"]
        },
        "seconds": round(sum(result["seconds"] for result in results.values()), 2),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table as text, with one line for each result.

    The columns are the method, the number of trained parameters, its share of all parameters, the main metric, the
    working time in seconds, and the size of the adapter folder.

    >>> result = {"method": "circulant", "metric": "test_accuracy", "metrics": {"test_accuracy": 0.953},
    ...           "seconds": 21.0, "adapter_bytes": 9210, "parameters": {"trainable": 1861, "total": 203525}}
    >>> print(table([result]))
    method     trained    share  test accuracy  seconds  adapter
    circulant    1,861  0.914 %         95.3 %     21.0   9.2 kB
    """
    metric = results[0]["metric"]
    rows = [("method", "trained", "share", metric.replace("_", " "), "seconds", "adapter")]
    for result in results:
        parameters = result["parameters"]
        rows.append(
            (
                result["method"],
                f"{parameters['trainable']:,}",
                f"{100 * parameters['trainable'] / parameters['total']:.3f} %",
                _percent(result["metrics"][metric]),
                f"{result['seconds']:.1f}",
                f"{result['adapter_bytes'] / 1000:,.1f} kB",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for method, *numbers in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([method.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _percent(metric: float | Mapping[str, float]) -> str:
    if isinstance(metric, Mapping):
        return f"{100 * metric['mean']:.1f} ± {100 * metric['std']:.1f} %"
    return f"{100 * metric:.1f} %"
