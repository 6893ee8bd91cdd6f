"""Use of models by key, model and day, as the gateway tells it from its store. Pure."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import APIModel

USAGE_PATH = "/finetune/v1/usage"
"""At the gateway's address of users. GET: a UsageReport."""
Count = Annotated[int, Field(ge=0)]


class UsageRow(APIModel):
    """What one key, or one user of a Kubernetes token, asked of one version in a day."""

    day: str
    """In UTC, as YYYY-MM-DD."""
    namespace: str
    model: str
    """Of the FineTunedModel, or of the FineTuneEndpoint where its base was asked."""
    version: int | None = None
    """Unset: the base."""
    key: str = ""
    """Id of the API key; empty for a token of Kubernetes."""
    user: str = ""
    """Who holds the token, as the API server knows them; empty for an API key."""
    requests: Count = 0
    errors: Count = 0
    """Of the requests: those that were answered with a status of 400 and more, or broken off by the gateway or the replica."""
    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class UsageReport(APIModel):
    """All that the caller may see of it."""

    since: str
    """First day."""
    rows: list[UsageRow]
