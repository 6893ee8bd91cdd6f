"""What `make test` says, and when it fails."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.__main__ import main


def test_all_are_told_and_any_code_but_0_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (good := tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    (bad := tmp_path / "test_bad.py").write_text("def test_bad(): assert 'this' == 'that'\n")
    assert main([str(good), "-v"], ([str(good)], [str(bad)]), 0) == 1
    told = capsys.readouterr().out
    assert "::test_good PASSED" in told and "assert 'this' == 'that'" in told
    last = [line.strip("= ") for line in told.splitlines()[-6:]]
    assert last[1].startswith("1 passed in") and last[3].startswith("1 passed in") and last[5].startswith("1 failed in"), last
    assert main([str(good), "-k", "nothing"], ([str(good)],), 0) == 5, "nothing was tested"
