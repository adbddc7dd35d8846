"""How well `batchnorm.check` finds what is wrong: a corpus of models with known mistakes, and of healthy ones.

    pip install --no-deps -r tests/no-deps.txt
    python benchmarks/check_corpus.py [NAME ...] [--again] [--speed] [--docs] [--no-run]

Every broken model is made by a seeded builder (check_broken_*.py) that makes a mistake as people make it, and says
which rules must find it and where. The healthy ones (check_healthy.py) are architectures of torchvision and timm after
a short training. The results go to benchmarks/results/check.json, model by model: a run that was stopped goes on where
it was. --docs writes the tables of docs/checking.md anew from them. --speed times `check` on ResNet-50, which wants an
idle machine.
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import check_broken_calls
import check_broken_held_out
import check_broken_layers
import check_broken_runs
import check_broken_training
import check_healthy
import pages
import torch
from check_cases import CASES
from check_cases import judged as judged_broken
from check_nets import torchvision

import batchnorm
from batchnorm._files import write_whole
from batchnorm.bench.machine import describe
from batchnorm.checks.rule import all_rules

KIND, PAGE = "check", pages.DOCS / "checking.md"
MODULES = (
    check_broken_layers,
    check_broken_training,
    check_broken_runs,
    check_broken_calls,
    check_broken_held_out,
)
SPEED = "speed of check"

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these models")
    parser.add_argument("--again", action="store_true", help="run the models that are there, too")
    parser.add_argument("--speed", action="store_true", help="time check on ResNet-50, and run no model")
    parser.add_argument("--docs", action="store_true", help=f"write the tables of {PAGE.name}")
    parser.add_argument("--no-run", dest="run", action="store_false", help="only what --docs says")
    arguments = parser.parse_args()
    path = pages.RESULTS / f"{KIND}.json"
    runs = {run["name"]: run for run in (pages.stored(KIND) if path.exists() else [])}
    if arguments.speed:
        runs[SPEED] = {"name": SPEED, "group": "speed", **speed()}
        pages.keep(KIND, list(runs.values()), by="name")
    elif arguments.run:
        torch.set_num_threads(1)  # the networks are small
        todo = corpus()
        if unknown := set(arguments.names) - set(todo):
            parser.error(f"got {', '.join(sorted(unknown))}, expected names of models: {', '.join(todo)}")
        # What is no longer in the corpus is no longer in its results.
        runs = {name: run for name, run in runs.items() if name in todo or name == SPEED}
        for name in arguments.names or todo:
            if name not in runs or arguments.again:
                runs[name] = timed(name, todo[name])
                pages.keep(KIND, list(runs.values()), by="name")
                print(told(runs[name]), flush=True)
    if arguments.docs:
        write_whole(PAGE, pages.filled(PAGE.read_text(encoding="utf-8"), tables(list(runs.values())), PAGE))


def corpus() -> dict[str, Callable[[], Run]]:
    """What runs each model, by its name: the broken ones, then the healthy ones."""
    found: dict[str, Callable[[], Run]] = {}
    for case in CASES.values():
        found[case.name] = lambda case=case: {  # type: ignore[misc]
            "group": "broken",
            "what": case.what,
            **judged_broken(case()),
        }
    for model in check_healthy.every():
        found[model.name] = lambda model=model: {  # type: ignore[misc]
            "group": "healthy",
            "source": model.source,
            "steps": model.steps,
            **check_healthy.judged(model),
        }
    return found


def timed(name: str, run: Callable[[], Run]) -> Run:
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, and of what is wrong with the broken models
        found = run()
    return {"name": name, **found, "seconds": round(time.perf_counter() - begin, 1)}


def told(run: Run) -> str:
    """One line while it runs."""
    if run["group"] == "healthy":
        said = [f"{each['code']} {each['severity']} at {each['module']}" for each in run["findings"]]
        return f"{run['name']}: {', '.join(said) or 'healthy'}"
    missed = [f"{code} missed" for code, each in run["found"].items() if not each["found"]]
    others = [f"{each['code']} {each['severity']} not expected" for each in run["unexpected"]]
    return f"{run['name']}: {', '.join(missed + others) or 'found'}"


def speed() -> Run:
    """`check` on ResNet-50: without data, and with 8 batches of 8 pictures of 224x224."""
    model = torchvision("resnet50")
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 224, 224, generator=random) for _ in range(8)]
    without = []
    for _ in range(3):
        begin = time.perf_counter()
        batchnorm.check(model)
        without.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    batchnorm.check(model, batches=batches)
    return {"without": min(without), "with": time.perf_counter() - begin, "machine": describe("cpu")}


# Tables


def tables(runs: list[Run]) -> dict[str, str]:
    groups: dict[str, list[Run]] = {"broken": [], "healthy": [], "speed": []}
    for run in runs:
        groups[run["group"]].append(run)
    return {
        "summary": summary(groups["broken"], groups["healthy"]),
        "rules": by_rule(groups["broken"]),
        "missed": missed(groups["broken"]),
        "healthy": by_source(groups["healthy"]),
        "alarms": alarms(groups["healthy"]),
        "models": by_model(groups["broken"]),
        "speed": speeds(groups["speed"]),
    }


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def counted(broken: list[Run]) -> dict[str, int]:
    """What the table of the summary counts."""
    must = [each for run in broken for each in run["found"].values()]
    right = sum(each["severity"] in ("error", "warning") for each in must)
    follow = sum(len(run["follows"]) for run in broken)
    wrong = sum(len({each["code"] for each in run["unexpected"]}) for run in broken)
    return {
        "models": len(broken),
        "must": len(must),
        "found": sum(each["found"] for each in must),
        "right": right + follow,
        "wrong": wrong,
    }


def summary(broken: list[Run], healthy: list[Run]) -> str:
    of = counted(broken)
    ill = sum(bool(run["findings"]) for run in healthy)
    rows = [
        ["broken models", f"{of['models']}"],
        ["mistakes that rules must find", f"{of['must']}"],
        ["found (recall)", f"{of['found']}, {share(of['found'], of['must'])}"],
        [
            "warnings and errors in broken models that name the mistake or follow from it (precision)",
            f"{of['right']} of {of['right'] + of['wrong']}, {share(of['right'], of['right'] + of['wrong'])}",
        ],
        ["healthy models", f"{len(healthy)}, with {sum(run['layers'] for run in healthy):,} batch norms"],
        ["healthy models with a warning or an error", f"{ill}"],
    ]
    return pages.markdown(["what", "how many"], rows)


def by_rule(broken: list[Run]) -> str:
    must: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for run in broken:
        for code, each in run["found"].items():
            must[code] += 1
            found[code] += each["found"]
    rows = [
        [code, rule.title, rule.severity, str(must[code]), str(found[code])]
        for code, rule in all_rules().items()
    ]
    return pages.markdown(["rule", "what", "severity", "broken models", "found"], rows)


def missed(broken: list[Run]) -> str:
    rows = []
    for run in broken:
        for code, each in run["found"].items():
            if not each["found"]:
                said = f"said only: {each['message']}" if each["message"] else "nothing said"
                rows.append([run["what"], f"{code} missed", said])
        rows += [[run["what"], f"{each['code']} not expected", each["message"]] for each in run["unexpected"]]
    return pages.markdown(["model", "what", "in words"], rows or [["none", "", ""]])


def by_source(healthy: list[Run]) -> str:
    rows = []
    for source in dict.fromkeys(run["source"] for run in healthy):
        some = [run for run in healthy if run["source"] == source]
        names = "; ".join(run["name"].removeprefix(f"{source}: ") for run in some)
        layers = sum(run["layers"] for run in some)
        rows.append([source, str(len(some)), f"{layers:,}", names])
    return pages.markdown(["from", "models", "batch norms", "which"], rows)


def alarms(healthy: list[Run]) -> str:
    rows = [
        [run["name"], each["code"], each["severity"], f"{each['module']}: {each['message']}"]
        for run in healthy
        for each in run["findings"]
    ]
    return pages.markdown(["model", "rule", "severity", "in words"], rows or [["none", "", "", ""]])


def by_model(broken: list[Run]) -> str:
    rows = []
    for run in sorted(broken, key=lambda run: (sorted(run["found"]), run["name"])):
        codes = [code if each["found"] else f"{code} (missed)" for code, each in run["found"].items()]
        rows.append([", ".join(sorted(codes)), run["what"].replace("|", "\\|")])
    return pages.markdown(["rules", "the model and its mistake"], rows)


def speeds(runs: list[Run]) -> str:
    if not runs:
        return pages.markdown(["ResNet-50", "seconds"], [["not measured", ""]])
    (run,) = runs
    rows = [
        ["without batches", f"{run['without']:.2f}"],
        ["8 batches of 8 pictures of 224×224", f"{run['with']:.1f}"],
    ]
    return pages.markdown(["ResNet-50", "seconds"], rows)


if __name__ == "__main__":
    main()
