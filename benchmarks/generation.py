"""Time text generation: without an adapter, with one, with a bank, and with merging and switching.

    python -m benchmarks.generation [--out=FILE.json] [--adapters=64] [--method=circulant] [--width=512] [--depth=8]
                                    [--vocabulary=32000] [--prompt=32] [--new=64] [--rounds=5]

The model is a Llama with random weights, with updates of Q, K and V. There is one prompt for each adapter. Every way
writes the same number of tokens for all prompts, greedily:

- `base`: the model has no adapter.
- `one`: one adapter serves the whole batch.
- `bank`: each prompt has its own adapter, in one batch (`surm_jax.load_bank`).
- `switch`: each adapter is merged into the model, which then continues the prompt of this adapter alone.

`to_one` is the time of a way over that of `one`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks.timing import benchmark, device, medians, setting, table, write
from surm_jax.generation import generate
from surm_jax.models import Decoder, DecoderConfig
from surm_jax.peft import METHODS, Rule, Update, adapt, load_adapter, load_bank, make_method, merge, save_adapter

UPDATES = sorted(name for name, method in METHODS.items() if issubclass(method, Update))
METHOD = flags.DEFINE_enum("method", "circulant", UPDATES, "The update on Q, K and V.")
SIZES = {
    name: flags.DEFINE_integer(name, default, what, lower_bound=1)
    for name, default, what in (
        ("adapters", 64, "Adapters, and prompts."),
        ("width", 512, "Width of the model, a multiple of 64."),
        ("depth", 8, "Blocks of the model."),
        ("vocabulary", 32_000, "Tokens that the model knows."),
        ("prompt", 32, "Tokens in each prompt."),
        ("new", 64, "New tokens of each prompt."),
        ("rounds", 5, "Rounds in which each way is timed."),
    )
}
COLUMNS = {"way": "", "ms": ".0f", "tokens_per_s": ".0f", "to_one": ".3f"}


def noisy_adapters(base: Decoder, count: int, folder: Path) -> list[Path]:
    """Write adapters with random parameters, each into its own folder, and return their folders."""
    folders = []
    for number in range(count):
        rules = [Rule("qkv", make_method(METHOD.value, {}))]
        model, adapter = adapt(base, rules, rngs=nnx.Rngs(number))
        rng = np.random.default_rng(number)
        for _, variable in nnx.to_flat_state(nnx.state(model, adapter.trainable)):
            variable[...] += jnp.asarray(0.02 * rng.normal(size=variable.shape), variable.dtype)
        folders.append(folder / str(number))
        save_adapter(folders[-1], model, adapter)
    return folders


def ways(base: Decoder, folders: list[Path], prompts: list[list[int]], new: int) -> dict[str, Callable[[], Any]]:
    """Return all ways to continue the prompts, as functions without arguments."""
    adapted = [load_adapter(folder, base)[0] for folder in folders]
    bank, every = load_bank(folders, base), range(len(folders))

    def written(model: nnx.Module, rows: list[list[int]], **options: Any) -> list[Any]:
        return generate(model, rows, max_new_tokens=new, end_tokens=(), batch_size=len(rows), **options)

    return {
        "base": lambda: written(base, prompts),
        "one": lambda: written(adapted[0], prompts),
        "bank": lambda: written(bank, prompts, adapters=every),
        "switch": lambda: [written(merge(adapted[index])[0], [prompts[index]])[0] for index in every],
    }


def main() -> None:
    """Time all ways, print a table of the results, and write them as rows to the file of `--out`."""
    sizes = {name: flag.value for name, flag in SIZES.items()}
    config = DecoderConfig(
        vocab_size=sizes["vocabulary"],
        width=sizes["width"],
        depth=sizes["depth"],
        heads=sizes["width"] // 64,
        kv_heads=sizes["width"] // 64,
        head_width=64,
        mlp_width=sizes["width"] * 11 // 4,
        max_positions=sizes["prompt"] + sizes["new"],
    )
    base = Decoder(config, rngs=nnx.Rngs(0))
    shape = (sizes["adapters"], sizes["prompt"])
    prompts = np.random.default_rng(0).integers(0, sizes["vocabulary"], shape).tolist()
    with tempfile.TemporaryDirectory() as folder:
        folders = noisy_adapters(base, sizes["adapters"], Path(folder))
        times = medians(ways(base, folders, prompts, sizes["new"]), sizes["rounds"])
    rows = [
        {
            "way": way,
            "method": METHOD.value,
            **{name: size for name, size in sizes.items() if name != "rounds"},
            **setting(),
            "ms": 1e3 * seconds,
            "tokens_per_s": sizes["adapters"] * sizes["new"] / seconds,
            "to_one": seconds / times["one"],
        }
        for way, seconds in times.items()
    ]
    print(f"{METHOD.value}, {sizes['adapters']} prompts, on {device()}, jax {jax.__version__}")
    print(table(rows, COLUMNS))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
