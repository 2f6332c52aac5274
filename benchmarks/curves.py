"""Draw how runs of `lacy train` went on the held-out documents: losses and AUC over ground-truth tokens.

    python benchmarks/curves.py RUN [RUN ...] --out curves.svg

A run is named by its folder. Wants matplotlib.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from lacy.trainer.logs import read

PANELS = {
    "nll_other": "Loss of tokens that are not factual, nats",
    "nll_factual": "Loss of factual tokens, nats",
    "auc_factual_wrong": "AUC of p(<CALL>) for factual and wrong tokens",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    arguments = parser.parse_args()
    plt.rcParams |= {"svg.hashsalt": "lacy", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4), layout="constrained")
    for run in arguments.runs:
        learned, valid = validations(run)
        for axis, name in zip(axes, PANELS, strict=True):
            axis.plot([tokens / 1e6 for tokens in learned], [record[name] for record in valid], label=run.name)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("million learned tokens")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(arguments.out, metadata={"Date": None})


def validations(run: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The validations of a run, and how many tokens had been learned at each."""
    learned, valid, seen = [], [], {0: 0}
    for record in read(run):
        if "loss" in record:
            seen[record["step"]] = record["gt_tokens"]
        else:
            learned.append(seen[record["step"]])
            valid.append(record)
    return learned, valid


if __name__ == "__main__":
    main()
