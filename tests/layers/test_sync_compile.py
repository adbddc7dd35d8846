"""SyncBatchNorm under torch.compile, whole, in two processes."""

from pathlib import Path

import pytest
import torch
from sync_worker import together


@pytest.mark.slow
def test_compiled_as_one_graph(tmp_path: Path) -> None:
    for result in together(2, tmp_path, task="compiled"):
        assert result["breaks"] == 0
        for way in ("gather", "reduce"):
            eager, compiled = result[way]
            for ours, theirs in zip(eager, compiled, strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
