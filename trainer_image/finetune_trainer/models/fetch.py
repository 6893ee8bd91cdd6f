"""Find or download models and adapters, and note where they are: safetensors only, remote code only when asked for and allowed.

Fetching is prepare's; later stages ask `local_path` and reach no hub.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from finetune_api.uris import URI, parse_uri
from finetune_api.versions import BaseModelReference

from ..job.context import Context
from ..process.errors import UserError
from ..remote.artifacts import from_bucket, from_mlflow, from_registry
from ..remote.retry import hub_host, with_retries
from ..remote.s3 import s3_client, s3_host
from .versions import fetch_parent
from .weights import ADAPTER_CONFIG, check_whole, fingerprint

_FIELDS = {"model": "model.uri", "teacher": "tuning.distillation.teacher.uri", "adapter": "tuning.continueFrom"}
_APART = "name its base in model.uri and the adapter in tuning.continueFrom"
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")


def fetch_model(context: Context, name: str, uri: str, *, remote_code: bool = False, config: str = "config.json") -> str:
    """In prepare: find or download a model or adapter (`name`: model, teacher, adapter), check it, and note where it is."""
    parsed, revision = parse_uri(uri), ""
    if parsed.scheme == "model":
        folder = fetch_parent(context, parsed)
    elif parsed.scheme == "pvc":
        folder = context.mounted(parsed)
    else:
        folder, revision = _fetched(context, name, uri, config) or _download(context, name, uri, remote_code)
    return note_model(context, name, uri, folder, revision=revision, remote_code=remote_code, config=config)


def note_model(
    context: Context, name: str, uri: str, folder: Path, *, revision: str = "", remote_code: bool = False, config: str = "config.json"
) -> str:
    """Check what lies in a folder, and note where it is. Raises UserError."""
    if not (folder / config).is_file():
        raise UserError("ModelNotFound", f"{shown(name, uri)} holds no {config}; {_instead(folder)}")
    if config == "config.json" and (folder / ADAPTER_CONFIG).is_file():  # transformers would load another base, that of the adapter
        raise UserError("ModelNotReadable", f"{shown(name, uri)} holds a model and an adapter ({ADAPTER_CONFIG}): {_APART}")
    check_whole(folder, shown(name, uri), config)
    _check_configs(folder, shown(name, uri), remote_code=remote_code)
    noted = {"path": str(folder), "uri": uri, "revision": revision, "fingerprint": fingerprint(folder, config)}
    context.write_json(context.layout.reference(name), noted)
    return str(folder)


def shown(name: str, uri: str) -> str:
    """What messages call a model: the field that names it, and its value."""
    return f"{_FIELDS[name]} {uri}"


def fetch_base_model(context: Context) -> str:
    """In prepare: the folder of the base model."""
    model = context.spec.model
    return fetch_model(context, "model", model.uri, remote_code=model.trust_remote_code)


def local_path(context: Context, name: str = "model") -> str:
    """The folder of a model or adapter that prepare fetched."""
    return str(context.read_json(context.layout.reference(name))["path"])


def base_reference(context: Context) -> BaseModelReference:
    """The base as prepare found it."""
    noted = context.read_json(context.layout.reference("model"))
    return BaseModelReference(uri=noted["uri"], revision=noted.get("revision", ""), fingerprint=noted["fingerprint"])


def _fetched(context: Context, name: str, uri: str, config: str) -> tuple[Path, str] | None:
    """What an earlier try of this job fetched whole: a branch that has moved since does not move the job."""
    try:
        known = context.read_json(context.layout.reference(name))
        folder = Path(known["path"])
        return (folder, str(known.get("revision", ""))) if known["uri"] == uri and (folder / config).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download(context: Context, name: str, uri: str, remote_code: bool) -> tuple[Path, str]:
    """The folder, and which state of the source it is: a commit, a manifest's digest, a version; empty where nothing tells it."""
    parsed, where = parse_uri(uri), _where(context, name)
    patterns = [*_FILES, *(["*.py"] if remote_code else [])]
    field = name
    if name == "adapter" and parsed.scheme == "hf" and name not in context.job.secrets:
        field = "model"  # the base's token

    def refused(why: str) -> UserError:
        return UserError("SourceNotFound", f"{uri}: {why}; check the uri and its revision, and secretRef if it is gated or private")

    def ask() -> tuple[Path, str]:
        match parsed.scheme:
            case "s3":
                return from_bucket(context, s3_client(context, field, where.s3_endpoint), parsed, patterns)
            case "oci":
                return from_registry(context, field, parsed, where.plain_http, patterns)
            case "mlflow":
                return from_mlflow(context, field, parsed, where.plain_http, patterns)
        return _from_hub(context, parsed, context.secret(field), patterns)

    host = {"s3": s3_host(where.s3_endpoint), "hf": hub_host()}.get(parsed.scheme, parsed.name)
    return with_retries(ask, host, refused)


def _from_hub(context: Context, uri: URI, token: str | None, patterns: list[str]) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    cache = f"{context.layout.cache}/models"
    folder = Path(snapshot_download(uri.name, revision=uri.revision or None, token=token, allow_patterns=patterns, cache_dir=cache))
    return folder, folder.name


@dataclass(frozen=True)
class _Where:
    """How a source is reached."""

    s3_endpoint: str | None
    plain_http: bool


def _where(context: Context, name: str) -> _Where:
    """What the spec says of the base, the teacher or the adapter."""
    tuning = context.spec.tuning
    if name == "adapter":
        return _Where(tuning.continue_from_s3_endpoint, tuning.continue_from_plain_http)
    teacher = tuning.distillation.teacher if tuning.distillation is not None and name == "teacher" else None
    model = teacher or context.spec.model
    return _Where(model.s3_endpoint, model.plain_http)


def _instead(folder: Path) -> str:
    """What to name in place of a folder that holds no model."""
    if (folder / ADAPTER_CONFIG).is_file():
        return f"it is an adapter: {_APART}"
    inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
    more = f"; {', '.join(inside[:3])} inside it would do" if inside else ""
    return f"name the folder that from_pretrained would load{more}"


def _check_configs(folder: Path, uri: str, *, remote_code: bool) -> None:
    """Its settings can be read; one that names code of its own is refused before any library reads its configuration (case A7)."""
    for name in _CONFIGS:
        try:
            document = json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise UserError("ModelNotReadable", f"{uri}: {name} is no JSON object; copy or download the model again") from None
        stops = document.get("eos_token_id")
        if not all(isinstance(stop, int) for stop in (stops if isinstance(stops, list) else [stops] if stops is not None else [])):
            raise UserError(
                "ModelNotReadable", f"{uri}: {name}: eos_token_id is {stops!r}; write the number of a token, or a list of numbers"
            )
        if document.get("auto_map") and not remote_code:
            raise UserError(
                "RemoteCode",
                f"{uri} brings Python code ({name}: auto_map). Read that code, then set model.trustRemoteCode: true; an administrator must allow it for the namespace",
            )
