"""What several blocks of the spec refer to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..base import APIModel
from ..scalars import DNSSubdomain

ModuleName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
LabelMap = Annotated[
    dict[str, Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]],
    Field(max_length=32),
]


class SecretReference(APIModel):
    """A Secret of the job's own namespace."""

    name: DNSSubdomain
    """Name of the Secret."""
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)] = "token"
    """Key within the Secret that holds the token; only this key is mounted, only into the stage that needs it."""
