"""The key that admissions are sealed with: in a Secret of the operator's namespace, which tenants cannot read.

Knows nothing of what is sealed.
"""

from __future__ import annotations

import base64
import logging
import secrets

from ..settings import Settings
from .errors import APIError
from .transport import Cluster

log = logging.getLogger("finetune.seal")
_DATA = "key"


async def ensure_seal_key(cluster: Cluster, settings: Settings) -> str:
    """The key in the chart's Secret, made when there is none. Several operators may look at once: who loses takes the winner's.

    Without a Secret, or where it may not be read, a new one: what was sealed with another is not believed.
    """
    while settings.seal_secret:
        try:
            found = await cluster.get("Secret", settings.namespace, settings.seal_secret)
            if known := (found.get("data") or {}).get(_DATA):
                return base64.b64decode(known).decode("ascii", errors="replace")
            found["data"] = {**(found.get("data") or {}), _DATA: base64.b64encode(secrets.token_hex(32).encode()).decode()}
            await cluster.replace({"apiVersion": "v1", "kind": "Secret", **found})
        except APIError as failure:
            if failure.conflict:
                continue
            if failure.transient:
                raise
            log.warning(
                "Secret %s/%s cannot be used: admissions of jobs whose status is lost are not believed: %s",
                settings.namespace,
                settings.seal_secret,
                failure,
            )
            break
    return settings.seal_key or secrets.token_hex(32)
