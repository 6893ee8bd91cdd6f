"""What several blocks of the spec refer to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..base import APIModel
from ..scalars import PLAIN_NAME, DNSSubdomain


class SecretReference(APIModel):
    """A Secret of the job's own namespace."""

    name: DNSSubdomain
    """Name of the Secret."""
    key: Annotated[str, Field(min_length=1, max_length=253), PLAIN_NAME] = "token"
    """Key within the Secret that holds the token; only this key is mounted, only into the stage that needs it."""
