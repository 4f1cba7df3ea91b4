"""A table of test scores from runs named <arm>_<seed>: each run, mean and standard deviation, difference to the first arm.

python benchmark/table.py runs/worth/*/metrics.json
python benchmark/table.py benchmark/results/worth_starting_from/texts/*.json
"""

import json
import statistics
import sys
from pathlib import Path


def arms(paths: list[str]) -> dict[str, dict[str, float]]:
    """{arm: {seed: test metric in percent}} from the metrics.json files of complete fine-tuning runs."""
    found = {}
    for path in map(Path, paths):
        arm, seed = (path.parent.name if path.name == "metrics.json" else path.stem).rsplit("_", 1)
        found.setdefault(arm, {})[seed] = 100 * json.loads(path.read_text())["final"]["test/metric"]
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


if __name__ == "__main__":
    found = arms(sys.argv[1:])
    if not found:
        sys.exit("error: no metrics.json given")
    base = next(iter(found))  # the first one given
    print(f"| arm | each run | mean ± deviation | n | minus {base}, seed by seed |\n|---|---|---|---|---|")
    for arm, runs in found.items():
        both = [runs[seed] - found[base][seed] for seed in runs if seed in found[base] and arm != base]
        each = ", ".join(f"{value:.1f}" for value in runs.values())
        print(f"| {arm} | {each} | {spread(list(runs.values()))} | {len(runs)} | {spread(both) if both else ''} |")
