"""What the scripts of this folder share: runs that are kept seed by seed, and tables between markers in a page."""

import argparse
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from batchnorm._files import write_whole
from batchnorm.comparison.measures import t_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
SCHEMA_VERSION = 1

Run = dict[str, Any]


def main(
    kind: str,
    summary: str,
    one_seed: Callable[[int], Run],
    tables: Callable[[list[Run]], Mapping[str, str]],
    page: Path,
    *,
    seeds: int = 10,
) -> None:
    """The command line of a script with one run a seed: results/`kind`.json, and with --docs the page's tables.

    A seed that is in the file already is not run again, so a run that was stopped goes on where it was.
    """
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many runs (default: {seeds})")
    parser.add_argument("--again", action="store_true", help="run the seeds that are there, too")
    parser.add_argument("--docs", action="store_true", help=f"write the tables of {page.name}")
    parser.add_argument("--no-run", dest="run", action="store_false", help="only what --docs says")
    arguments = parser.parse_args()
    path = RESULTS / f"{kind}.json"
    runs = [] if arguments.again or not path.exists() else stored(kind)
    if arguments.run:
        torch.set_num_threads(1)  # the networks are small
        for seed in range(arguments.seeds):
            if seed not in {run["seed"] for run in runs}:
                runs.append({"seed": seed, **one_seed(seed)})
                keep(kind, runs)
    if arguments.docs:
        write_whole(page, filled(page.read_text(encoding="utf-8"), tables(runs), page))


def stored(kind: str) -> list[Run]:
    """The runs in results/`kind`.json."""
    runs: list[Run] = json.loads((RESULTS / f"{kind}.json").read_text(encoding="utf-8"))["runs"]
    return runs


def keep(kind: str, runs: Sequence[Run], *, by: str = "seed") -> None:
    """Write results/`kind`.json, the runs in the order of what tells them apart."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "runs": sorted(runs, key=lambda run: run[by]),
    }
    write_whole(RESULTS / f"{kind}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def filled(page: str, tables: Mapping[str, str], where: object) -> str:
    """The page with its tables made anew; what stands outside of the markers stays."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(
            pattern, lambda found, table=table: found[1] + table + found[2], page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"error: got {count} places marked {name} in {where}, expected 1")
    return page


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def percent(values: Sequence[float]) -> str:
    """Shares as their mean in per cent and the 95 % interval of the mean over the seeds."""
    found = t_interval([100 * value for value in values])
    if found.low is None or found.high is None:
        return f"{found.mean:.1f} %"
    return f"{found.mean:.1f} % ({found.low:.1f} to {found.high:.1f})"


def points(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean difference of paired shares in points, its 95 % interval, and whether that holds 0."""
    found = t_interval([100 * (a - b) for a, b in zip(values, others, strict=True)])
    if found.low is None or found.high is None:
        return f"{found.mean:+.1f}"
    seen = "" if found.excludes(0) else ": no difference seen"
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}){seen}"
