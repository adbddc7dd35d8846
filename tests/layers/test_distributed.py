"""Two processes under DistributedDataParallel, on gloo."""

from pathlib import Path

import processes
import torch
from helpers import same_bits

WORKER = Path(__file__).with_name("ddp_worker.py")
worker = processes.load(WORKER)


def test_two_processes_average_the_gradients_of_one_process_each(tmp_path: Path) -> None:
    processes.together(WORKER, worker.WORLD, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(worker.WORLD)]

    alone = [worker.network() for _ in range(worker.WORLD)]
    sent: list[torch.Tensor] = []
    for step in range(worker.STEPS):
        for rank, model in enumerate(alone):
            x, dy = worker.share(rank, step)
            # DistributedDataParallel sends rank 0's buffers to every rank before each call.
            for mine, first in zip(model.buffers(), sent or model.buffers(), strict=True):
                mine.copy_(first)
            model.zero_grad()
            model(x).backward(dy)
        sent = [value.clone() for value in alone[0].buffers()]
        for i, gradients in enumerate(zip(*(model.parameters() for model in alone), strict=True)):
            average = torch.stack([parameter.grad for parameter in gradients]).mean(0)
            for result in results:
                torch.testing.assert_close(result["gradients"][step][i], average)
            assert same_bits(results[0]["gradients"][step][i], results[1]["gradients"][step][i])
    for rank, model in enumerate(alone):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(results[rank]["state"][name], value)
        assert results[rank]["state"]["1.num_batches_tracked"].item() == worker.STEPS
