"""The command line in the test's own process, which has imported it already; tests/e2e and tests/unit run it as users do."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest

from finetune_cli.__main__ import main
from finetune_cli.output import console
from tests.component.conftest import Api


def finetune(api: Api, *words: str, code: int = 0, namespaced: bool = True) -> str:
    """What `finetune` prints, with its exit code checked."""
    where = ["-n", api.namespace] if namespaced else []
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setattr(sys, "argv", ["finetune", *words, "--kubeconfig", str(api.cluster.kubeconfig), *where])
        patch.setattr(console, "width", 200)
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) == code, out.getvalue()
    return out.getvalue()
