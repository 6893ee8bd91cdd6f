"""`finetune keys`: API keys of the gateway. A key is shown once; the cluster keeps its hash."""

from __future__ import annotations

import base64
import contextlib
import secrets
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from kubernetes import client, config
from rich.table import Table
from rich.text import Text

from finetune_api.api_keys import KEY_ID, KEY_PREFIX, KEYS_SECRET, KEYS_SECRET_TYPE, ApiKey, digest_of_key
from finetune_api.scalars import printable, seconds

from .cluster import namespace_of
from .options import Context, Kubeconfig
from .output import Format, Output, console, dump

keys = typer.Typer(help="API keys of the gateway.", no_args_is_help=True, rich_markup_mode=None)
Id = Annotated[str, typer.Argument(help="What the key is called, such as ci; metrics and lists have it.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Whose models the key is for; else that of the context.")]
System = Annotated[str, typer.Option(help="Namespace of the gateway.")]
_SECONDS = 30
_TRIES = 5


class KeySecret:
    """The Secret with an entry for each key."""

    def __init__(self, kubeconfig: str | None, context: str | None, system: str) -> None:
        connection = config.new_client_from_config(kubeconfig, context=context)
        self._core, self._auth = client.CoreV1Api(connection), client.AuthenticationV1Api(connection)
        self._system = system

    def entries(self) -> dict[str, ApiKey | None]:
        """By id; None for one that cannot be read."""
        return self._read()[0]

    def _read(self) -> tuple[dict[str, ApiKey | None], Any]:
        try:
            found = self._core.read_namespaced_secret(KEYS_SECRET, self._system, _request_timeout=_SECONDS)
        except client.ApiException as failure:
            if failure.status != 404:
                raise
            return {}, None
        return {identifier: _entry(value) for identifier, value in (found.data or {}).items()}, found

    def put(self, identifier: str, key: ApiKey) -> bool:
        """False where the id is taken."""
        value = base64.b64encode(key.model_dump_json(by_alias=True, exclude_none=True).encode()).decode()
        for _ in range(_TRIES):
            known, found = self._read()
            if identifier in known:
                return False
            try:
                self._write({identifier: value}, found)
            except client.ApiException as failure:
                if failure.status != 409:  # somebody else wrote meanwhile
                    raise
                continue
            self._tell("APIKeyCreated", f"API key {identifier} for namespace {key.namespace}", key.created_by)
            return True
        raise client.ApiException(409, "the Secret of the keys is written by others all the time; try again")

    def revoke(self, identifier: str) -> bool:
        """False where there is none."""
        known, found = self._read()
        if identifier not in known:
            return False
        self._write({identifier: None}, found, conditional=False)
        self._tell("APIKeyRevoked", f"API key {identifier}", self.user())
        return True

    def _write(self, data: dict[str, str | None], found: Any, *, conditional: bool = True) -> None:
        if found is None:
            body = {"metadata": {"name": KEYS_SECRET}, "type": KEYS_SECRET_TYPE, "data": data}
            self._core.create_namespaced_secret(self._system, body, _request_timeout=_SECONDS)
            return
        version = {"metadata": {"resourceVersion": found.metadata.resource_version}} if conditional else {}
        self._core.patch_namespaced_secret(KEYS_SECRET, self._system, {**version, "data": data}, _request_timeout=_SECONDS)

    def user(self) -> str:
        """Who this is, as the API server knows them; empty where it does not tell."""
        with contextlib.suppress(client.ApiException):
            found = self._auth.create_self_subject_review({}, _request_timeout=_SECONDS)
            return str(found.status.user_info.username or "")
        return ""

    def _tell(self, reason: str, what: str, by: str) -> None:
        """On record, where the user may write Events; the API server's audit log has the change in any case."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        about = {"apiVersion": "v1", "kind": "Secret", "name": KEYS_SECRET, "namespace": self._system}
        event = {
            "metadata": {"generateName": f"{KEYS_SECRET}-"},
            "involvedObject": about,
            "reason": reason,
            "message": f"{what}{f' by {by}' if by else ''}",
            "type": "Normal",
            "source": {"component": "finetune-cli"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        with contextlib.suppress(client.ApiException):
            self._core.create_namespaced_event(self._system, event, _request_timeout=_SECONDS)


def _entry(value: str) -> ApiKey | None:
    with contextlib.suppress(ValueError):
        return ApiKey.model_validate_json(base64.b64decode(value))
    return None


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@keys.command()
def create(
    name: Id,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Most tokens a minute, of prompts and answers.")] = None,
    expires: Annotated[str | None, typer.Option(help="How long it is taken, such as 90d.")] = None,
    fine_tuning: Annotated[bool, typer.Option("--fine-tuning", help="Also for the fine-tuning API, where it is on.")] = False,
    description: Annotated[str, typer.Option(help="Who uses it, and for what.")] = "",
    namespace: Namespace = None,
    system_namespace: System = "finetune-system",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Make a key and print it: it cannot be shown again."""
    if (refusal := KEY_ID.refusal(name)) is not None:
        raise typer.BadParameter(refusal, param_hint="NAME")
    now = datetime.now(UTC)
    try:
        until = _time(now + timedelta(seconds=seconds(expires))) if expires is not None else None
    except ValueError as failure:
        raise typer.BadParameter(str(failure), param_hint="--expires") from None
    secret = KeySecret(kubeconfig, context, system_namespace)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    made = ApiKey(
        hash=digest_of_key(key),
        namespace=namespace_of(kubeconfig, context, namespace),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        fine_tuning=fine_tuning,
        description=description,
        created_at=_time(now),
        created_by=secret.user(),
        expires_at=until,
    )
    if not secret.put(name, made):
        raise typer.BadParameter(f"there is a key {name}; revoke it first, or take another name", param_hint="NAME")
    print(f"key {name} for the models of namespace {made.namespace}; it is not shown again:", file=sys.stderr)
    print(key)


@keys.command("list")
def list_(
    output: Format = Output.TABLE,
    system_namespace: System = "finetune-system",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """All keys, without the keys themselves."""
    found = KeySecret(kubeconfig, context, system_namespace).entries()
    if output is Output.NAME:
        print("\n".join(found))
        return
    if output is not Output.TABLE:
        dump(
            [
                {"id": name, **({} if key is None else key.model_dump(mode="json", by_alias=True, exclude={"hash"}, exclude_none=True))}
                for name, key in found.items()
            ],
            output,
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("ID", "NAMESPACE", "REQUESTS/MIN", "TOKENS/MIN", "EXPIRES", "CREATED", "BY", "FINE-TUNING", "DESCRIPTION"):
        table.add_column(column)
    for name, key in found.items():
        if key is None:
            table.add_row(name, "cannot be read: it is refused")
            continue
        limits = [str(limit or "") for limit in (key.requests_per_minute, key.tokens_per_minute)]
        words = (
            name,
            key.namespace,
            *limits,
            key.expires_at or "",
            key.created_at or "",
            key.created_by,
            "yes" * key.fine_tuning,
            key.description,
        )
        table.add_row(*(Text(printable(word)) for word in words))
    console.print(table)


@keys.command()
def revoke(name: Id, system_namespace: System = "finetune-system", kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Refuse a key from now on."""
    if not KeySecret(kubeconfig, context, system_namespace).revoke(name):
        print(f"there is no key {name}", file=sys.stderr)
        raise typer.Exit(2)
    console.print(f"key {name} revoked", highlight=False)
