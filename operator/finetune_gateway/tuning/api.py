"""The routes of OpenAI's fine-tuning API. Lists come from what the watch knows, never from the API server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..access import Caller
from ..bodies import Refusal
from ..catalog import Endpoint
from ..relay import CutOff
from ..store.keeper import StoreAway
from .actor import ORGANIZATION, Actor, Actors
from .answers import has_results, job_object, results_id, status_of, unix, version_of
from .creating import Creator, Wish
from .events import checkpoint_of, table_of
from .files import Files, Receive, file_object, results_object
from .history import History
from .jobs import Job, Jobs, model_name
from .manifest import Reading, TrainingFile, spec_of
from .models import ModelMap
from .requests import CompleteUpload, CreateJob, CreateUpload, FilePage, Page, parse, parse_query
from .uploads import Uploads, upload_object

Handler = Callable[[Request, Actor], Awaitable[Response]]
_RETRIED = (408, 429)
_BODY = 2**20
"""Bytes of a request that is no file."""
_KEY = 256
_MOST_WRITTEN = 20_000
_LOOK_SECONDS = 0.05
_ENCODE = msgspec.json.Encoder().encode


class Incoming:
    """A request's body, of which it is known whether it has ended."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._ended = receive, False

    async def __call__(self) -> Any:
        message = await self._receive()
        self._ended = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def rest(self, most_bytes: int, most_seconds: float) -> None:
        """Read what is still to come, and drop it: who is cut off while they send never read why. Not without end."""
        left = most_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_seconds):
                while not self._ended and left > 0:
                    left -= len((await self()).get("body", b""))


class FineTuning:
    """Answers, put together from its parts."""

    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        uploads: Uploads,
        history: History,
        creator: Creator,
        actors: Actors,
        models: ModelMap,
        reading: Reading,
        caller: Callable[[Any], Awaitable[Caller]],
        body_seconds: float,
        most_bytes: int,
        watch_seconds: float,
    ) -> None:
        """`caller`: who asks, by the scope of a request. `watch_seconds`: how long another gateway's job may take to be seen here."""
        self._jobs, self._files, self._uploads, self._history, self._creator = jobs, files, uploads, history, creator
        self._actors, self._models, self._reading, self._caller = actors, models, reading, caller
        self._body_seconds, self._most_bytes, self._watch_seconds = body_seconds, most_bytes, watch_seconds
        self._written: dict[str, tuple[Job, bytes]] = {}
        """By UID: a job's answer as bytes, as long as the job is the same."""

    def _bytes(self, job: Job) -> bytes:
        known = self._written.get(job.uid)
        if known is not None and known[0] is job:
            return known[1]
        if len(self._written) > _MOST_WRITTEN:
            self._written.clear()
        found = _ENCODE(job_object(job))
        self._written[job.uid] = (job, found)
        return found

    def routes(self) -> list[Route]:
        """All of them."""
        jobs, job = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job}"
        permissions = "/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions"
        return [
            self._route("/v1/files", "POST", self.create_file, "create"),
            self._route("/v1/files", "GET", self.list_files),
            self._route("/v1/files/{file}", "GET", self.retrieve_file),
            self._route("/v1/files/{file}", "DELETE", self.delete_file, "create"),
            self._route("/v1/files/{file}/content", "GET", self.file_content),
            self._route("/v1/uploads", "POST", self.create_upload, "create"),
            self._route("/v1/uploads/{upload}/parts", "POST", self.add_part, "create"),
            self._route("/v1/uploads/{upload}/complete", "POST", self.complete_upload, "create"),
            self._route("/v1/uploads/{upload}/cancel", "POST", self.cancel_upload, "create"),
            self._route(jobs, "POST", self.create_job, "create"),
            self._route(jobs, "GET", self.list_jobs),
            self._route(job, "GET", self.retrieve_job),
            self._route(f"{job}/cancel", "POST", self.cancel_job, "patch"),
            self._route(f"{job}/pause", "POST", self.pause_job, "patch"),
            self._route(f"{job}/resume", "POST", self.resume_job, "patch"),
            self._route(f"{job}/events", "GET", self.list_events),
            self._route(f"{job}/checkpoints", "GET", self.list_checkpoints),
            *(self._route(permissions, method, self.permissions) for method in ("GET", "POST")),
            self._route(f"{permissions}/{{permission}}", "DELETE", self.permissions),
            self._route("/v1/models/{model:path}", "DELETE", self.delete_model),
        ]

    def _route(self, path: str, method: str, handler: Handler, verb: str = "list") -> Route:
        async def endpoint(request: Request) -> Response:
            incoming = Incoming(request.receive)
            try:
                caller = await self._caller(dict(request.scope))
                actor = await self._actors.actor(caller, request.headers.get(ORGANIZATION, ""), verb)
                return await handler(Request(request.scope, incoming), actor)
            except (StoreAway, Refusal) as failure:
                refusal = failure if isinstance(failure, Refusal) else _away()
            if refusal.status != 408:  # who was too slow has had their time
                await incoming.rest(2 * self._most_bytes, self._body_seconds)
            raise told_to_retry(refusal)

        return Route(path, endpoint, methods=[method])

    async def create_file(self, request: Request, actor: Actor) -> Response:
        """POST /v1/files."""
        return JSONResponse(file_object(await self._files.create(actor.namespace, request.headers, request.receive)))

    async def list_files(self, request: Request, actor: Actor) -> Response:
        """GET /v1/files."""
        found, more = await self._files.page(actor.namespace, parse_query(FilePage, request.query_params.multi_items()))
        return _page([file_object(file) for file in found], more)

    async def _results(self, actor: Actor, identifier: str) -> tuple[Job, str] | None:
        """The job whose step metrics have that id, and they."""
        job = next((job for job in self._jobs.of(actor.namespace) if has_results(job) and results_id(job) == identifier), None)
        return None if job is None else (job, table_of(await self._history.points(job)))

    async def retrieve_file(self, request: Request, actor: Actor) -> Response:
        """GET /v1/files/ID."""
        identifier = request.path_params["file"]
        if (results := await self._results(actor, identifier)) is not None:
            job, table = results
            return JSONResponse(results_object(identifier, job.name, unix(job.status.finished_at) or 0, len(table.encode())))
        return JSONResponse(file_object(await self._files.find(actor.namespace, identifier)))

    async def file_content(self, request: Request, actor: Actor) -> Response:
        """GET /v1/files/ID/content."""
        identifier = request.path_params["file"]
        if (results := await self._results(actor, identifier)) is not None:
            return Response(results[1], media_type="text/csv")
        file = await self._files.find(actor.namespace, identifier)
        headers = {"Content-Disposition": "attachment", "Content-Length": str(file.bytes), "X-Content-Type-Options": "nosniff"}
        return StreamingResponse(_cut_off(await self._files.content(file)), headers=headers, media_type="application/octet-stream")

    async def delete_file(self, request: Request, actor: Actor) -> Response:
        """DELETE /v1/files/ID."""
        file = await self._files.find(actor.namespace, request.path_params["file"])
        uri = self._files.uri(file)
        for job in self._jobs.of(actor.namespace):
            waiting = status_of(job) in ("validating_files", "queued") and not job.status.is_true("DataReady")
            if waiting and job.spec is not None and uri in job.spec.source_uris:
                told = f"{file.id} is not read yet by {job.id}: cancel the job, or wait until it has validated its files"
                raise Refusal(400, told, code="file_in_use", param="file_id")
        await self._files.remove(file)
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})

    async def create_upload(self, request: Request, actor: Actor) -> Response:
        """POST /v1/uploads."""
        asked = parse(CreateUpload, await self._body(request))
        return JSONResponse(upload_object(await self._uploads.create(actor.namespace, asked)))

    async def add_part(self, request: Request, actor: Actor) -> Response:
        """POST /v1/uploads/ID/parts."""
        upload = await self._uploads.find(actor.namespace, request.path_params["upload"])
        return JSONResponse(await self._uploads.add_part(upload, request.headers, request.receive))

    async def complete_upload(self, request: Request, actor: Actor) -> Response:
        """POST /v1/uploads/ID/complete."""
        upload = await self._uploads.find(actor.namespace, request.path_params["upload"])
        return JSONResponse(upload_object(*await self._uploads.complete(upload, parse(CompleteUpload, await self._body(request)))))

    async def cancel_upload(self, request: Request, actor: Actor) -> Response:
        """POST /v1/uploads/ID/cancel."""
        upload = await self._uploads.find(actor.namespace, request.path_params["upload"])
        return JSONResponse(upload_object(await self._uploads.cancel(upload)))

    async def create_job(self, request: Request, actor: Actor) -> Response:
        """POST /v1/fine_tuning/jobs."""
        raw = await self._body(request)
        asked = parse(CreateJob, raw)
        self._models.find(asked.model)
        training = await self._training_file(actor, asked.training_file, "training_file")
        held_out = await self._training_file(actor, asked.validation_file, "validation_file") if asked.validation_file else None
        spec = spec_of(asked, self._models, training, held_out, self._reading)
        tries, key = request.headers.get("x-stainless-retry-count", "0"), request.headers.get("idempotency-key", "")
        if len(key) > _KEY:
            raise Refusal(400, f"Idempotency-Key has more than {_KEY} characters", code="invalid_value", param="Idempotency-Key")
        body = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
        wish = Wish(asked, spec, body, tries.isdecimal() and int(tries[:9]) > 0, key)
        return JSONResponse(job_object(await self._creator.create(actor, wish)))

    async def _body(self, request: Request) -> dict[str, Any]:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_seconds):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > _BODY:
                        raise Refusal(413, f"the body has more than {_BODY} bytes", code="body_too_large", connection="close")
        except TimeoutError:
            told = f"the body did not come within {self._body_seconds:g} s"
            raise Refusal(408, told, code="body_timeout", connection="close") from None
        try:
            found = msgspec.json.decode(b"".join(parts))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise Refusal(400, "the body is no JSON, or nested too deeply", code="invalid_json") from None
        if not isinstance(found, dict):
            raise Refusal(400, "the body is no JSON object", code="invalid_json")
        return found

    async def _training_file(self, actor: Actor, identifier: str, param: str) -> TrainingFile:
        file = await self._files.find(actor.namespace, identifier, param)
        if file.problem:
            raise Refusal(400, f"{param} {identifier} cannot be used: {file.problem}", code="invalid_training_file", param=param)
        return TrainingFile(file.id, self._files.uri(file), file.rows, file.form)

    async def list_jobs(self, request: Request, actor: Actor) -> Response:
        """GET /v1/fine_tuning/jobs."""
        items = request.query_params.multi_items()
        wanted = {name[9:-1]: value for name, value in items if name.startswith("metadata[") and name.endswith("]")}
        page = parse_query(Page, [(name, value) for name, value in items if not name.startswith("metadata[")])
        found: Sequence[Job] = self._jobs.of(actor.namespace)
        if wanted:
            found = [job for job in found if wanted.items() <= (job.request.get("metadata") or {}).items()]
        if page.after is not None:
            start = next((index for index, job in enumerate(found) if job.id == page.after), None)
            if start is None:
                raise no_job(page.after, "after")
            found = found[start + 1 :]
        return _page_of(
            b",".join(map(self._bytes, found[: page.limit])), [job.id for job in found[: page.limit]], more=len(found) > page.limit
        )

    async def _job(self, request: Request, actor: Actor) -> Job:
        """What another gateway made a moment ago, the watch may not have brought yet."""
        identifier, until = request.path_params["job"], time.monotonic() + self._watch_seconds
        while (job := self._jobs.find(actor.namespace, identifier)) is None:
            if time.monotonic() >= until:
                raise no_job(identifier)
            await asyncio.sleep(_LOOK_SECONDS)
        return job

    async def retrieve_job(self, request: Request, actor: Actor) -> Response:
        """GET /v1/fine_tuning/jobs/ID."""
        return JSONResponse(job_object(await self._job(request, actor)))

    async def cancel_job(self, request: Request, actor: Actor) -> Response:
        """POST .../cancel: for good. Of one that is cancelled already, once more the same answer."""
        job = await self._job(request, actor)
        if status_of(job) != "cancelled":
            _check_running(job, "cancelled")
            job = await self._creator.set_policy(actor, job, cancel=True)
        return JSONResponse(job_object(job))

    async def pause_job(self, request: Request, actor: Actor) -> Response:
        """POST .../pause."""
        return await self._suspend(request, actor, suspend=True)

    async def resume_job(self, request: Request, actor: Actor) -> Response:
        """POST .../resume."""
        return await self._suspend(request, actor, suspend=False)

    async def _suspend(self, request: Request, actor: Actor, *, suspend: bool) -> Response:
        job = await self._job(request, actor)
        _check_running(job, "paused" if suspend else "resumed")
        return JSONResponse(job_object(await self._creator.set_policy(actor, job, suspend=suspend)))

    async def list_events(self, request: Request, actor: Actor) -> Response:
        """GET .../events."""
        job, page = await self._job(request, actor), parse_query(Page, request.query_params.multi_items())
        found = await self._history.page(job, page.after, page.limit)
        if found is None:
            raise Refusal(404, f"no such event: {str(page.after)[:128]}", code="not_found", param="after")
        events, more = found
        return _page([event.to_wire() for event in events], more)

    async def list_checkpoints(self, request: Request, actor: Actor) -> Response:
        """GET .../checkpoints."""
        job, page = await self._job(request, actor), parse_query(Page, request.query_params.multi_items())
        after = page.after.replace("ftckpt_", "ftevent-") if page.after else None
        found = await self._history.page(job, after, page.limit, "checkpoint")
        if found is None:
            raise Refusal(404, f"no such checkpoint: {str(page.after)[:128]}", code="not_found", param="after")
        events, more = found
        points = {event.step: json.loads(event.data) for event in await self._history.points(job)} if events else {}
        return _page([checkpoint_of(job, event, points.get(event.step, {})) for event in events], more)

    async def permissions(self, request: Request, actor: Actor) -> Response:
        """Of checkpoints, among projects of OpenAI's: there is nothing like it."""
        told = "permissions of checkpoints are not supported: what a namespace may use, its roles say (docs/gateway.md)"
        raise Refusal(400, told, code="unsupported_operation")

    async def delete_model(self, request: Request, actor: Actor) -> Response:
        """A version is removed by its FineTunedModel, which knows who serves it."""
        told = "models cannot be deleted here: a FineTunedModel removes its versions by spec.retention (docs/models.md)"
        raise Refusal(400, told, code="unsupported_operation", param="model")

    def served(self, caller: Caller, endpoints: Iterable[Endpoint]) -> dict[str, tuple[int, str]]:
        """Names ft:... that a caller may use, with when they were made and whose they are.

        What is served at an endpoint of theirs; with a key for fine-tuning, also what came of their namespace's jobs otherwise.
        """
        found: dict[str, tuple[int, str]] = {}
        whole = caller.key.namespace if caller.key is not None and caller.key.fine_tuning else ""
        by_namespace: dict[str, list[Endpoint]] = {}
        for endpoint in endpoints:
            by_namespace.setdefault(endpoint.namespace, []).append(endpoint)
        for namespace in {whole, *by_namespace} - {""}:
            names = {name for endpoint in by_namespace.get(namespace, ()) for name in endpoint.names()}
            for job in self._jobs.of(namespace):
                if status_of(job) == "succeeded" and (namespace == whole or version_of(job) in names):
                    found[model_name(job)] = (unix(job.status.finished_at) or 0, namespace)
        return found


async def _cut_off(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same; a storage that fails on the way breaks the answer off, as nothing can be said any more."""
    try:
        async for piece in pieces:
            yield piece
    except Refusal as failure:
        raise CutOff(failure.message) from None


def _check_running(job: Job, what: str) -> None:
    if (status := status_of(job)) in ("succeeded", "failed", "cancelled"):
        raise Refusal(400, f"{job.id} has {status}: it cannot be {what}", code="invalid_job_state")


def no_job(identifier: str, param: str = "fine_tuning_job_id") -> Refusal:
    """There is none, or it is another's: nobody can tell which."""
    return Refusal(404, f"no such fine-tuning job: {identifier[:128]}", code="fine_tune_not_found", param=param)


def _away() -> Refusal:
    """The store does not answer."""
    return Refusal(503, "the store of the gateway does not answer now", code="store_unavailable", kind="server_error", retry_after="5")


def told_to_retry(refusal: Refusal) -> Refusal:
    """The refusal, which says whether the same request may succeed later: SDKs would repeat a 409, which is of no use here."""
    if all(name != b"x-should-retry" for name, _ in refusal.headers):
        again = refusal.status in _RETRIED or refusal.status >= 500
        refusal.headers.append((b"x-should-retry", b"true" if again else b"false"))
    return refusal


def _page(data: list[dict[str, Any]], more: bool) -> Response:
    return _page_of(b",".join(map(_ENCODE, data)), [item["id"] for item in data], more=more)


def _page_of(data: bytes, ids: list[str], *, more: bool) -> Response:
    rest = {"object": "list", "has_more": more, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return Response(b'{"data":[' + data + b"]," + _ENCODE(rest)[1:], media_type="application/json")
