"""S3 and what speaks its protocol: one client for rows, models and targets. Knows nothing of what the objects hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from finetune_api.contract import S3_KEYS, Env
from finetune_api.uris import URI

from ..job.context import Context, read_secret
from .addresses import allowed_addresses
from .retry import CONNECT_TIMEOUT, READ_TIMEOUT


def s3_host(endpoint: str | None) -> str:
    """Who is asked, where an error does not say so itself."""
    return str(urlsplit(endpoint or os.environ.get(Env.S3) or "https://s3.amazonaws.com").hostname)


def s3_client(context: Context, field: str, endpoint: str | None) -> Any:
    """A client with the keys of a field's Secret; see `client_of`."""
    return client_of(context.job.secrets.get(field), endpoint)


def client_of(keys: str | None, endpoint: str | None) -> Any:
    """A client with the keys in a folder; a local run takes those of its environment. Never the node's own role.

    Raises UserError where the user's endpoint has an address that is not public and not allowed (case A6).
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    if endpoint is not None:
        parts = urlsplit(endpoint)
        allowed_addresses(str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80))
    key, secret = (read_secret(keys, name) or os.environ.get(name) for name in S3_KEYS)
    settings = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"total_max_attempts": 2},
        signature_version=None if key else UNSIGNED,
        s3={"addressing_style": "path"} if endpoint or os.environ.get(Env.S3) else None,
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, region_name=region, config=settings
    )


def objects_below(client: Any, uri: URI) -> Iterator[tuple[str, int]]:
    """Names below a prefix, and their sizes in bytes."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=uri.name, Prefix=f"{uri.path}/"):
        for found in page.get("Contents", ()):
            yield found["Key"].removeprefix(f"{uri.path}/"), found["Size"]


def error_code(failure: Exception) -> str:
    """What S3 calls an error, such as NoSuchKey; empty where it is none of S3's."""
    response = getattr(failure, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
