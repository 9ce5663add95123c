"""The paper's claims beside what was measured here: `experiments/results/README.md`.

    python -m experiments.report

Reads the csv files in `experiments/results/`, and two of `benchmarks/results/`, and writes nothing that does not follow
from them. A claim whose files are missing, or whose grid is not finished, is "not measured here".
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments import evidence, matrix_evidence
from experiments.command import command
from experiments.verdicts import VERDICTS, Measured


class Claim(NamedTuple):
    """A claim of the paper.

    Attributes:
        topic: its section in the page.
        text: what the paper says, and where.
        rule: when it is said to hold here.
        on: the model and the data that were used, or would be.
        command: what measures it; empty: there is nothing here that would.
        measure: what came out; None while it is not measured.
    """

    topic: str
    text: str
    rule: str
    on: str
    command: str
    measure: Callable[[], Measured | None]


DIGITS = "ViT of 0.2 M parameters pretrained on the digits 0 to 4, digits 5 to 9"
CIFAR = "ViT of 2.7 M parameters pretrained on five classes of CIFAR-10, the other five"
MINILM = "all-MiniLM-L6-v2, validation sets"
DATA = "--data=FOLDER_OF_PREPARED_TFDS_SETS"
PRETRAIN = f"python -m experiments.pretrain_cifar {DATA}"
CLAIMS = (
    Claim(
        "Matrices",
        "A 50 x 50 PSD matrix in 50 numbers: low rank is worst, then Kronecker, circulant, Toeplitz (Figure 1)",
        "in all trials; in part: in some, or with other factors of 50 x 50 matrices",
        "X X^T with normal X, 50 x 50, unit rows",
        "python -m experiments.psd",
        matrix_evidence.psd_order,
    ),
    Claim(
        "Matrices",
        "Near low rank targets are best approximated with r = 1, 2 or 4 (Figure 5)",
        "the smallest error of gradient descent at these is below that at all others",
        "G H^T + 0.05 R, 100 x 100, with 2 columns of G and H, which is our choice: r = 4 can hold them",
        "python -m experiments.approximation",
        matrix_evidence.near_low_rank,
    ),
    Claim(
        "Matrices",
        "On random targets the error of W(G, H) is not monotone in r (Figure 5)",
        "gradient descent has a larger error somewhere; the nearest cannot",
        "i.i.d. normal, 100 x 100",
        "python -m experiments.approximation",
        matrix_evidence.random_targets,
    ),
    Claim(
        "Matrices",
        "On the pinwheel LoRA's loss stays several times higher; structured layers reach the dense one (Figure 4)",
        "training loss of LoRA above 2 x the dense layer's, of the others below, in every seed; in part: in some",
        "5 spokes, 64 x 64, learning rates chosen by held-out loss",
        "python -m experiments.pinwheel",
        matrix_evidence.pinwheel,
    ),
    Claim(
        "Images",
        "Circulants on Q, K and V of ViT-B train 55K numbers, 0.06 %",
        "to the thousand",
        "ViT-B/16",
        "python -m benchmarks.step",
        evidence.counted,
    ),
    Claim(
        "Images",
        "5 to 7 points above LoRA at equal parameters on some sets (Table 1)",
        "5 points by one of the three updates",
        CIFAR,
        f"{PRETRAIN}; python -m experiments.image_table {DATA}",
        evidence.images,
    ),
    Claim(
        "Images",
        "About 2 % of the data reach full fine-tuning on all of it: CIFAR-10, STL-10; 20 %: SUN397 (Figure 6)",
        "circulants with 2 % at most 1 point below full fine-tuning with all, after as many steps; in part: with 20 %",
        CIFAR,
        f"{PRETRAIN}; python -m experiments.low_data {DATA}",
        evidence.low_data,
    ),
    Claim(
        "Images",
        "3.65 x fewer parameters than LoRA and 2.4 x fewer than LoRA-FIX at better accuracy (CLIP, Table 1)",
        "",
        "CLIP ViT-B/16; the ranks of its baselines are not stated",
        "",
        evidence.nothing,
    ),
    Claim(
        "Images",
        "In the top 2 on 10 sets of VTAB-1k (Table 2)",
        "on 10 sets or more; in part: on fewer",
        "ViT-B/16",
        "python -m experiments.image_table --vtab --name=vtab --model=augreg --variant=B/16 --sets caltech101 dtd ..."
        f" {DATA}",
        evidence.vtab,
    ),
    Claim(
        "Images",
        "iNat2021: full 69.98, circulant 69.01; ImageNet-1k comparable to full",
        "at most 1 point below full fine-tuning on both",
        "ViT-B/16",
        "python -m experiments.image_table --name=large --model=augreg --variant=B/16"
        f" --sets i_naturalist2021 imagenet2012 --methods circulant full {DATA}",
        evidence.large,
    ),
    Claim(
        "Language",
        "Adapters with up to 12 x fewer parameters at near-equal quality on GLUE",
        "12 x fewer beside the head, at most 1 point less on average",
        MINILM,
        f"python -m experiments.glue_minilm {DATA}",
        evidence.glue_adapters,
    ),
    Claim(
        "Language",
        "Of the structured updates the circulant is the most accurate on average",
        "its mean is above both others'",
        MINILM,
        f"python -m experiments.glue_minilm {DATA}",
        evidence.glue_best,
    ),
    Claim(
        "Language",
        "LLaMA-2-7B learns 10,000 pairs of UUIDs with W(G, H), r = 4, beside LoRA r = 256 and MoRA",
        "",
        "LLaMA-2-7B",
        "",
        evidence.nothing,
    ),
    Claim(
        "Segmentation",
        "SAM ViT-B on Synapse, Q and V adapted, beside LoRA r = 1",
        "",
        "SAM ViT-B",
        "",
        evidence.nothing,
    ),
    Claim(
        "Looking inside",
        "Trained circulants and Toeplitz matrices are non-singular everywhere, Kronecker products of maximal rank",
        "in every layer, all three; in part: one or two of them",
        DIGITS,
        "python launch.py; python -m experiments.analysis runs/digits; with METHOD toeplitz and kronecker: python"
        " launch.py --config.peft.method=METHOD --workdir=runs/digits_METHOD; python -m experiments.analysis"
        " runs/digits_METHOD",
        evidence.ranks,
    ),
    Claim(
        "Looking inside",
        "Leaving out K changes little",
        "at most 1 point",
        DIGITS,
        "python -m experiments.ablations",
        evidence.without_keys,
    ),
    Claim(
        "Looking inside",
        "A bias helps every adapter, the Kronecker one least",
        "all gain, the Kronecker one less than the others; in part: not less",
        DIGITS,
        "python -m experiments.ablations",
        evidence.adapter_bias,
    ),
    Claim(
        "Looking inside",
        "Toeplitz is two times slower than circulant",
        "1.8 x the time of a layer or more; in part: for some numbers of tokens",
        "symmetric pairs; ViT-B/16 with batch 8; two CPU cores",
        "python -m benchmarks.structured; python -m benchmarks.step",
        evidence.toeplitz_time,
    ),
)


def page(claims: Sequence[Claim]) -> str:
    """Returns the text of the page."""
    measured = {claim: claim.measure() for claim in claims}
    verdicts = [found.verdict for found in measured.values() if found is not None]
    summary = ", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in VERDICTS)
    parts = [
        f"""# What the paper claims, and what was measured here

arXiv 2406.17740. Written by `python -m experiments.report` from the files in this folder; what is not in them is not
here. Of {len(claims)} claims: {summary}, not measured here: {len(claims) - len(verdicts)}.
"Holds" means: here, on a small model and small data, by the rule that is given; no more. The rules are ours. A
difference of means is given with its 95 % confidence interval over seeds (Welch's t-test), which has to be on one side
of what is claimed, or the claim is undecided; anything else is the mean ± the standard deviation."""
    ]
    for topic in dict.fromkeys(claim.topic for claim in claims):
        lines = ["| the paper says | measured here | | on | by |", "|---|---|---|---|---|"]
        for claim, found in measured.items():
            if claim.topic != topic:
                continue
            command = f"`{claim.command}`" if claim.command else "nothing here does this yet"
            text, verdict, on = found if found is not None else ("", "not measured here", "")
            rule = f" ({claim.rule})" if found is not None else ""
            lines.append(f"| {claim.text} | {text} | **{verdict}**{rule} | {on or claim.on} | {command} |")
        parts.append(f"## {topic}\n\n" + "\n".join(lines))
    pages = sorted(path.name for path in evidence.RESULTS.glob("*.md") if path.name != "README.md")
    parts.append("## All results\n\n" + "\n".join(f"- [{name}]({name})" for name in pages))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(arguments)
    (evidence.RESULTS / "README.md").write_text(page(CLAIMS))
    print(evidence.RESULTS / "README.md")


if __name__ == "__main__":
    command(main)
