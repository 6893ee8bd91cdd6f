"""The operator's progress server, to which a pod tells what it found, with a token that is good for that alone."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_api.contract import Env, Mounts

from ..process.errors import InfrastructureError
from .retry import PATIENCE, host_unavailable, with_retries


def post(path: str, body: dict[str, Any], *, timeout: float) -> None:
    """Send JSON once. Raises OSError, or ValueError for an address that is none."""
    authority = f"{Mounts.JOB}/ca.crt"
    context = ssl.create_default_context(cafile=authority if os.path.exists(authority) else None)
    token = Path(Mounts.TOKEN, "token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    address = f"{os.environ[Env.PROGRESS_URL]}{path}"
    request = urllib.request.Request(address, data=json.dumps(body).encode(), headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=timeout, context=context):
        pass


def deliver(path: str, body: dict[str, Any]) -> None:
    """Send JSON, again where that may help. Raises InfrastructureError, SourceUnavailable where the operator does not answer."""
    host = str(urlsplit(os.environ.get(Env.PROGRESS_URL, "")).hostname)

    def ask() -> None:
        try:
            post(path, body, timeout=60)
        except urllib.error.HTTPError as failure:
            told = f"answers {failure.code} {failure.read(200).decode(errors='replace')}".rstrip()
            if failure.code in PATIENCE or failure.code >= 500:
                raise host_unavailable(host, told) from None
            raise InfrastructureError("ReportNotDelivered", f"the operator at {host} {told}") from None
        except (FileNotFoundError, KeyError, ValueError) as failure:  # no token, no address
            raise InfrastructureError("ReportNotDelivered", f"nothing to report with: {failure}") from None

    def refused(why: str) -> Any:
        return InfrastructureError("ReportNotDelivered", why)

    with_retries(ask, host, refused)
