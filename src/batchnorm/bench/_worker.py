"""A process that measures: a job as JSON on stdin, one line of JSON for each result on stdout.

    echo '{"task": "machine", "device": "cpu", "threads": null}' | python -m batchnorm.bench._worker

Tasks: "machine" (the header and the speed of a copy), "cases" (each case of the list in turn), "host" (the host's time
for a layer in a chain, case by case), "steps" (whole training steps, round by round), "rank" (one of several processes
with synchronized layers). What anything else prints goes to stderr.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from batchnorm.bench import machine
from batchnorm.bench._rank import rank_answers
from batchnorm.bench.accuracy import complaint, errors, exact
from batchnorm.bench.case import OPERATIONS, Case
from batchnorm.bench.chain import chain_times
from batchnorm.bench.contenders import Contender, backend_of, inputs, operation, our_layer, rival
from batchnorm.bench.record import OURS
from batchnorm.bench.steps import step_answers
from batchnorm.bench.timing import clock_for, interleaved

__all__ = ["answers", "main", "measure_case"]


def main() -> None:
    """Do the job on stdin."""
    job = json.loads(sys.stdin.read())
    # stdout is the protocol's: what compilers and libraries print must not get between.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for answer in answers(job):
            out.write(json.dumps(answer) + "\n")
            out.flush()


def answers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results of a job, as they come."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    if job["task"] != "rank" and torch.device(job["device"]).type == "cuda":
        torch.cuda.set_device(torch.device(job["device"]).index or 0)
    if job["task"] == "machine":
        yield machine.answer(job)
    elif job["task"] == "host":
        for fields in job["cases"]:
            yield chain_times(Case(**{**fields, "shape": tuple(fields["shape"])}), job["rounds"])
    elif job["task"] == "steps":
        yield from step_answers(job)
    elif job["task"] == "rank":
        yield from rank_answers(job)
    else:
        for fields in job["cases"]:
            case = Case(**{**fields, "shape": tuple(fields["shape"])})
            try:
                yield measure_case(case, job["against"], job["rounds"])
            except RuntimeError as error:  # too little memory on the device, an operation that it lacks
                yield {"failure": str(error).strip().splitlines()[0]}


def measure_case(case: Case, against: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time our layer and the others on a case; a layer of ours that is wrong gets no time.

    The check comes after the timing, because its float64 copies would leave traces in the process's memory.
    """
    given = inputs(case)
    layer = our_layer(case, given)
    backends = {
        "training": backend_of(case, given, training=True),
        "inference": backend_of(case, given, training=False),
    }
    contenders = {OURS: Contender(layer, layer)}
    skipped: dict[str, str] = {}
    for name in against:
        try:
            contenders[name] = rival(name, case, given)
            skipped.update({f"{name} in {task}": why for task, why in contenders[name].lacks.items()})
        except RuntimeError as error:
            skipped[name] = str(error)
    times = {}
    for task in OPERATIONS:
        functions = {
            name: operation(task, each.function, each.layer, given)
            for name, each in contenders.items()
            if task in each.tasks
        }
        times[task] = interleaved(functions, clock_for(case.device), rounds)
    truth = exact(case, given)
    found = {
        name: errors(each.function, each.layer, truth, tasks=each.tasks) for name, each in contenders.items()
    }
    failure = complaint(found[OURS], given.x.dtype, backends["training"])
    wrong = complaint(found.get("cudnn", {}), given.x.dtype, "aten")
    if wrong:
        # A graph of cuDNN's that was put together wrongly would be compared with for its speed.
        skipped["cudnn"] = wrong
        for timed in times.values():
            timed.pop("cudnn", None)
    return {
        "failure": failure,
        "backends": backends,
        "skipped": skipped,
        "errors": found,
        "times": {} if failure else {task: _plain(timed) for task, timed in times.items()},
    }


def _plain(timed: dict[str, Any]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timed.items()}


if __name__ == "__main__":
    main()
