"""Whole training steps: the network as it is, with its batch norms fused, and without them, each in its turn."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import BatchNormError
from batchnorm.bench.networks import network
from batchnorm.bench.record import FUSED, GRAPH, PLAIN, REMOVED
from batchnorm.bench.timing import CpuClock, CudaClock
from batchnorm.nn.batch_norm import Extras
from batchnorm.ops import explain_backend
from batchnorm.surgery import fuse, remove

__all__ = ["step_answers"]

_CLASSES = 1000
# On a GPU the first steps choose kernels and get memory, and a sample is long enough that the host can run ahead.
_WARM = {"cpu": 1, "cuda": 8}
_SAMPLE_SECONDS = {"cpu": 0.0, "cuda": 0.05}
# Between the first outputs of the network as it is and fused, of the largest. Rounding grows from layer to layer: on
# a CPU with ResNet-50, 2 images of 64² and 8 of 96²: 1e-4, 0.13 to 0.29, 0.03 to 0.05; without batch norm 17 to 22.
_TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 0.6, torch.float16: 0.3}


def step_answers(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was set up, under "setup", and then each round's seconds a step, under "seconds", by contender."""
    try:
        model = network(job["network"])
    except BatchNormError as error:
        yield {"refused": str(error)}
        return
    setting = _Setting(job)
    steps = setting.steps(model)
    yield {"setup": setting.found}
    if not setting.found["failure"]:
        yield from _rounds(steps, setting, job["rounds"])


class _Setting:
    """What all contenders share, and what is found out about them before they are timed."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        self.device = torch.device(job["device"])
        self.layout = torch.channels_last if job["layout"] == "channels-last" else torch.contiguous_format
        self.dtype: torch.dtype = getattr(torch, job["dtype"])
        self.graph, self.backend = job["mode"] == GRAPH, job["backend"]
        self.clock = CudaClock() if self.device.type == "cuda" else CpuClock()
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        shape = (job["batch"], 3, job["image"], job["image"])
        self.x = torch.randn(shape, device=self.device).contiguous(memory_format=self.layout)
        self.target = torch.randint(_CLASSES, (job["batch"],), device=self.device)
        self.found: dict[str, Any] = {"failure": "", "skipped": {}, "off": None, "memory": {}}

    def steps(self, model: nn.Module) -> "dict[str, _Step]":
        """Everyone, warm and ready to be timed."""
        model = model.to(self.device).to(memory_format=self.layout).train()  # type: ignore[call-overload]
        changes = fuse(model)
        for module in changes.model.modules():
            if isinstance(module, Extras):
                module.backend = self.backend
        like = torch.empty(2, 1, device=self.device, dtype=self.dtype)
        self.found["backend"] = self.backend or explain_backend(like).chosen
        self.found["norms"] = sum(isinstance(each, Extras) for each in changes.model.modules())
        self.found["left"] = len(changes.skipped)
        self.found["parameters"] = sum(each.numel() for each in model.parameters())
        models = {PLAIN: model, FUSED: changes.model, REMOVED: remove(model).model}
        steps: dict[str, _Step] = {}
        outputs: dict[str, Tensor] = {}
        for name, each in models.items():
            try:
                step = _Step(each, self)
                outputs[name] = step.first_output()
                self.found["memory"][name] = step.warm_up()
                steps[name] = step.captured() if self.graph else step
            except (
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:  # too little memory, an output that is no tensor
                self.found["skipped"][name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.found["failure"] = self._failure(outputs)
        return steps

    def _failure(self, outputs: Mapping[str, Tensor]) -> str:
        for name in (PLAIN, FUSED):
            if name in self.found["skipped"]:
                return f"the {name} network: {self.found['skipped'][name]}"
        difference = (outputs[FUSED] - outputs[PLAIN]).abs().max()
        off = self.found["off"] = float(difference / outputs[PLAIN].abs().max())
        tolerance = _TOLERANCE[self.dtype]
        if not off <= tolerance:
            return (
                f"the fused network's first output is off by {off:.1e} of its largest value, over {tolerance}"
            )
        return ""


class _Step:
    """A network with its optimizer, and one training step of it."""

    def __init__(self, model: nn.Module, setting: _Setting) -> None:
        self.model, self.setting = model, setting
        on_gpu = setting.device.type == "cuda"
        # So small that a network without batch norm does not run away.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=on_gpu or None)
        self.run: Callable[[], object] = self.launch

    def output(self) -> Tensor:
        """Forward, under autocast for half types."""
        setting = self.setting
        half = setting.dtype != torch.float32
        # Weights that are cast once for several uses would be cast outside of a graph.
        cache = not setting.graph
        with torch.autocast(
            setting.device.type, setting.dtype if half else None, enabled=half, cache_enabled=cache
        ):
            scores = self.model(setting.x)
        if not isinstance(scores, Tensor):
            raise TypeError(f"its output is a {type(scores).__name__}, expected a tensor of scores")
        return scores

    def launch(self) -> None:
        """One step, launched by the host."""
        self.optimizer.zero_grad(set_to_none=True)
        self._update()

    def _update(self) -> None:
        nn.functional.cross_entropy(self.output().float(), self.setting.target).backward()
        self.optimizer.step()

    def first_output(self) -> Tensor:
        """Of training mode, before any step, with the same dropout for everyone."""
        torch.manual_seed(1)
        with torch.no_grad():
            return self.output().float()

    def warm_up(self) -> int | None:
        """Run some steps; on a GPU, the bytes that a step needs at most beyond what is there before it."""
        device = self.setting.device
        if device.type != "cuda":
            for _ in range(_WARM["cpu"]):
                self.launch()
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM["cuda"]):
                self.launch()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.launch()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def captured(self) -> "_Step":
        """The same as one CUDA graph: gradients are written into the graph's own memory in every replay."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update()
        self.run = graph.replay
        return self


def _rounds(steps: Mapping[str, _Step], setting: _Setting, rounds: int) -> Iterator[dict[str, Any]]:
    """Everyone in turn, every other round backwards."""
    kind = setting.device.type
    pace = {name: setting.clock.sample(step.run, 1) for name, step in steps.items()}
    calls = {name: max(1, math.ceil(_SAMPLE_SECONDS[kind] / seconds)) for name, seconds in pace.items()}
    for number in range(rounds):
        order = list(steps)[:: -1 if number % 2 else 1]
        taken = {name: setting.clock.sample(steps[name].run, calls[name]) for name in order}
        yield {"seconds": {name: taken[name] for name in steps}}
