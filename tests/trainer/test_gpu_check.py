"""`make gpu` on the CPU: everything but CUDA, so that it is right on the day when there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu import __main__ as command


@pytest.mark.timeout(900)
def test_all_of_it_but_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    code = command.main(["--device", "cpu", "--small", "--runs", "lora", "--out", str(out)])
    words, found = capsys.readouterr().out, json.loads(out.read_text())
    assert code == 0, words
    assert found["verdict"] == "passed" and found["machine"]["versions"]["torch"]
    run = found["runs"]["lora"]
    assert run["phase"] == "Succeeded" and run["kernels"] == "sdpa attention" and run["measured"] is None and run["mfu"] is None
    assert run["plan"]["perDeviceBatchSize"] == 2 and len(run["losses"]) == 6 and run["tokens_per_second"] > 0
    other = run["trl"]
    assert other["tokens_per_second"] > 0 and other["attention"] == "sdpa" and len(other["losses"]) == 6
    assert run["losses"][0] == pytest.approx(other["losses"][0], rel=0.02)  # the same model, rows of the same kind
    unchecked = "\n".join(found["not_checked"])
    for what in ("own GPU", "padding-free attention and Liger", "estimated against measured memory", "tokens per second beside trl sft"):
        assert what in unchecked
    assert "not checked" in words and "tokens/s" in words
