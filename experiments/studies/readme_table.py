"""The README's table of what γ does, from the folders of the four studies that it quotes, and its numbers as CSV.

    python -m gamma_po study bandit --preset p1 --output runs/p1
    python -m gamma_po study bandit --preset calibrate --output runs/calibrate
    python -m gamma_po study bandit --preset p2 --output runs/p2
    python -m gamma_po study bandit --preset challenge --rhos "[0.5,0.75]" --output runs/challenge
    python experiments/studies/readme_table.py runs/p1 runs/calibrate runs/p2 runs/challenge

An asterisk: the difference survives Holm's correction for all comparisons of its study. A test holds the README to
experiments/studies/readme_table.csv, which this writes.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

METRIC, FLIPS, RHOS = "win_rate_kl1", 0.4, (0.5, 0.75)
CLEAN, NOISY = "map, calibrated on 300 clean pairs", "map, calibrated on 3000 noisy pairs"
ORACLE = "oracle: no flipped pairs"
ROWS = {  # study -> arm and counterpart -> as the README says it
    "p1": {
        ("kl", "dpo"): "γ-DPO (KL margin) − DPO",
        ("kl", "kl, matched slope"): "γ-DPO − its matched slope",
        ("kl", "kl shuffled"): "γ-DPO − γ-DPO shuffled",
        ("kl reversed", "dpo"): "γ-DPO reversed − DPO",
        ("map", "dpo"): "map of the reference's margin − DPO",
        ("map", "map, matched slope"): "map − its matched slope",
        ("map", "map shuffled"): "map − map shuffled",
        ("map reversed", "dpo"): "map reversed − DPO",
        (ORACLE, "dpo"): "DPO without the flipped pairs − DPO",
    },
    "calibrate": {
        (CLEAN, "dpo"): "map, strength and sign from 300 clean pairs − DPO",
        ("dpo on the 300 clean pairs alone", "dpo"): "DPO trained on those 300 clean pairs alone − DPO",
        (NOISY, "dpo"): "map, strength and sign from 3,000 noisy pairs − DPO",
        ("dpo on the 3000 noisy pairs, too", "dpo"): "DPO trained on those 3,000 noisy pairs, too − DPO",
    },
    "p2": {
        ("kl", "dpo"): "γ-DPO − DPO",
        ("kl", "kl, matched slope"): "γ-DPO − its matched slope",
        ("kl", "kl shuffled"): "γ-DPO − γ-DPO shuffled",
        ("kl reversed", "dpo"): "γ-DPO reversed − DPO",
        ("map", "dpo"): "map − DPO",
        ("map", "map, matched slope"): "map − its matched slope",
        (ORACLE, "dpo"): "DPO without the flipped pairs − DPO",
    },
    "challenge": {
        ("cross-fitted agreement", "dpo"): "the best that was tried: pairs that cross-fitted networks agree with − DPO",
        (
            "best linear average, prior known",
            "dpo",
        ): "best linear average of the labels, told where rewards come from − DPO",
    },
}
NAMES = {"p1": "P1, one β", "calibrate": "Calibrated", "p2": "P2, tuned", "challenge": "Challenge, tuned"}
COLUMNS = (
    "study",
    "commit",
    "comparisons",
    "arm",
    "against",
    "rho",
    "flip_rate",
    "metric",
    "mean",
    "low",
    "high",
    "holm",
)
FILE = Path(__file__).with_name("readme_table.csv")


def selected(study: str, folder: Path) -> list[dict[str, object]]:
    """Return the rows of a study that the README quotes, differences in points."""
    commit = json.loads((folder / "study.json").read_text())["commit"]
    with open(folder / "comparisons.csv", newline="") as file:
        everything = list(csv.DictReader(file))
    found = {
        (row["arm"], row["against"], float(row["rho"])): row
        for row in everything
        if row["metric"] == METRIC and float(row["flip_rate"]) == FLIPS
    }
    rows = []
    for arm, against in ROWS[study]:
        for rho in RHOS:
            row = found[arm, against, rho]
            points = {end: f"{100 * float(row[f'difference_{end}']):+.2f}" for end in ("mean", "low", "high")}
            place = {"arm": arm, "against": against, "rho": rho, "flip_rate": FLIPS, "metric": METRIC}
            whole = {"study": study, "commit": commit, "comparisons": len(everything)}
            rows.append(whole | place | points | {"holm": "*" if row["survives_holm"] == "true" else ""})
    return rows


def line(text: str, cells: list[dict[str, object]]) -> str:
    """Return a row of the table."""
    return f"| {text} | " + " | ".join(f"{c['mean']} [{c['low']}, {c['high']}]{c['holm']}" for c in cells) + " |"


def main(folders: list[str]) -> None:
    """Write the CSV and print the table."""
    rows = []
    for study, folder in zip(ROWS, folders, strict=True):
        own = selected(study, Path(folder))
        rows += own
        for number, text in enumerate(ROWS[study].values()):
            of = f"commit {str(own[0]['commit'])[:8]}, {own[0]['comparisons']} comparisons"
            head = f"{NAMES[study]} ({of}): " if number == 0 else ""
            sys.stdout.write(line(head + text, own[2 * number : 2 * number + 2]) + "\n")
    with open(FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
