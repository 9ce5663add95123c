"""Time a linear layer with a structured update in this package and in PyTorch, in one run.

    python -m benchmarks.peers [--out=FILE.json] [--width=768] [--tokens=6304] [--rounds=11]

The packages of `requirements-peers.txt` must be installed. The PyTorch layers are a frozen `nn.Linear` in float32, with
one of these updates:

- `torch frozen`: no update. The only gradient is that with respect to the input.
- `torch lora`: LoRA with r = 1.
- `torch circulant`: the circulant update by FFTs, as in the released code of arXiv 2406.17740.
- `torch toeplitz pair`: the product of two symmetric Toeplitz matrices by four FFTs, padded to a power of two as in the
  same code.
- `peft c3a`: the layer of the package `peft` with one block of size n. The versions 0.18.0 to 0.21.2 of peft compute a
  wrong gradient with respect to the INPUT: the backward pass reads entry `a + i` of the trained vector where the
  forward pass needs entry `a - i`. Its time is reported all the same.

Every step computes the output and the gradients with respect to the input and the trained parameters. `ratio_to_ours`
is the time of a PyTorch layer over that of this package's layer with the same kind of update and the execution `auto`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from absl import flags

from benchmarks.layer import frozen_step, random_update, step
from benchmarks.timing import benchmark, device, medians, setting, table, write

WIDTH = flags.DEFINE_integer("width", 768, "Features in and out.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 6304, "Rows of the input.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 11, "How often each program is timed.", lower_bound=1)

#: For each PyTorch layer, the update of this package that it is compared with, as (family, options).
COUNTERPARTS = {
    "torch frozen": ("frozen", {}),
    "torch lora": ("LowRank", {"rank": 1}),
    "torch circulant": ("Circulant", {}),
    "torch toeplitz pair": ("SymmetricToeplitzPair", {}),
    "peft c3a": ("Circulant", {}),
}


class LoRA(torch.nn.Module):
    """A linear layer with a LoRA update of rank 1: `W x + B A x`."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.A = torch.nn.Parameter(torch.randn(1, base.in_features) * 0.02)
        self.B = torch.nn.Parameter(torch.randn(base.out_features, 1) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `W x + B A x` for every row x of the input."""
        return self.base(x) + x @ self.A.T @ self.B.T


class Circulant(torch.nn.Module):
    """A linear layer with a circulant update: `W x + C x`, where C is the circulant matrix of a trained vector."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.c = torch.nn.Parameter(torch.randn(base.in_features) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `W x + C x` for every row x of the input."""
        n = self.c.shape[0]
        return self.base(x) + torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.c), n=n)


class SymmetricToeplitzPair(torch.nn.Module):
    """A linear layer updated by the product of two symmetric Toeplitz matrices T2 and T1: `W x + T2 T1 x`.

    For the products, each Toeplitz matrix is embedded in a circulant matrix whose size is a power of two.
    """

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.t1 = torch.nn.Parameter(torch.randn(base.in_features) * 0.02)
        self.t2 = torch.nn.Parameter(torch.randn(base.in_features) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `W x + T2 T1 x` for every row x of the input."""
        return self.base(x) + self.product(self.t2, self.product(self.t1, x))

    @staticmethod
    def product(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `T x` for every row x of an array, where t is the first column of the symmetric Toeplitz matrix T."""
        n = t.shape[0]
        size = 1 << (2 * n - 1).bit_length()
        column = torch.cat([t, t.new_zeros(size - 2 * n + 1), t[1:].flip(0)])
        return torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(column), n=size)[..., :n]


def c3a(base: torch.nn.Linear) -> torch.nn.Module:
    """Return the layer of `peft` with a circulant update (C3A) of one block, which is as large as the kernel."""
    model = torch.nn.Sequential(base)
    config = peft.C3AConfig(target_modules=["0"], block_size=base.in_features, init_weights=False)
    return peft.get_peft_model(model, config)


def torch_step(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    """Return a function that computes the layer's output, and the gradients for its input and trained parameters.

    Args:
        layer: The layer.
        x: The input.
        dy: The gradient with respect to the output.
    """
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(layer(x), [x, *trained], dy) and None


def main() -> None:
    """Time all layers, print a table of the results, and write them as rows to the file of `--out`."""
    width, tokens = WIDTH.value, TOKENS.value
    rng = np.random.default_rng(0)
    shapes = ((tokens, width), (width, width), (tokens, width))
    x, kernel, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    base = torch.nn.Linear(width, width, bias=False)
    base.weight.data = torch.tensor(kernel.T.copy() * width**-0.5)
    base.requires_grad_(False)
    layers = {
        "torch frozen": base,
        "torch lora": LoRA(base),
        "torch circulant": Circulant(base),
        "torch toeplitz pair": SymmetricToeplitzPair(base),
        "peft c3a": c3a(base),
    }
    programs: dict[str, Callable[[], Any]] = {
        name: torch_step(layer, torch.tensor(x), torch.tensor(dy)) for name, layer in layers.items()
    }
    x, kernel, dy = jnp.asarray(x), jnp.asarray(kernel) * width**-0.5, jnp.asarray(dy)
    for family, options in COUNTERPARTS.values():
        update = None if family == "frozen" else random_update(family, width, options)
        function = frozen_step if update is None else functools.partial(step, execution="auto")
        compiled = jax.jit(function).lower(x, kernel, update, dy).compile()
        programs[f"ours {family}"] = functools.partial(compiled, x, kernel, update, dy)
    times = medians(programs, ROUNDS.value)
    rows = [
        {
            "layer": name,
            "width": width,
            "tokens": tokens,
            "dtype": "float32",
            **setting(),
            "torch": torch.__version__,
            "peft": peft.__version__,
            "ms": 1e3 * seconds,
            "ratio_to_ours": seconds / times[f"ours {COUNTERPARTS[name][0]}"] if name in COUNTERPARTS else None,
        }
        for name, seconds in times.items()
    ]
    print(
        f"width {width}, {tokens} tokens, float32, on {device()}; torch {torch.__version__} with"
        f" {torch.get_num_threads()} threads, peft {peft.__version__}, jax {jax.__version__}"
    )
    print(table(rows, {"layer": "", "ms": ".2f", "ratio_to_ours": ".2f"}))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
