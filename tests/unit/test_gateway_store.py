"""The gateway's store on SQLite and on a real PostgreSQL: what is counted, by whom it is seen, and what happens while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest
from aiohttp import web
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from finetune_api.usage import USAGE_PATH
from finetune_cli.__main__ import main
from finetune_cli.output import console
from finetune_gateway import metrics
from finetune_gateway.choosing import Target
from finetune_gateway.ledger import MOST_TOKENS, Amount, Ledger, Use, user_name
from finetune_gateway.settings import Settings, from_environment
from finetune_gateway.store import files, history, uploads, usage
from finetune_gateway.store.database import REVISION, VERSION_TABLE, engine_of, migrate
from finetune_gateway.store.keeper import Store, StoreAway, today
from finetune_gateway.store.tables import METADATA, USAGE, WRITERS
from tests.gateway import KEY, Replica, Running, endpoint, running, served, until
from tests.servers import postgresql
from tests.unit.test_gateway import ASK, ask, scraped

TARGET = Target(("team-a", "chat"), "support-bot", 3, ("127.0.0.1:1",))
_NUMBERS = itertools.count()


class Line:
    """A TCP connection to a server that can be cut: everywhere, or when a client says a word and before it hears the answer."""

    def __init__(self, port: int) -> None:
        self._to, self.port = port, 0
        self.down = False
        self.word, self._said = b"", False
        self._open: set[asyncio.StreamWriter] = set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.transport.abort()
            return
        back, forth = await asyncio.open_connection("127.0.0.1", self._to)
        self._open |= {writer, forth}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    if self._said and source is back:  # the server has done it, and nobody hears of it
                        self.word, self._said = b"", False
                        break
                    self._said = bool(self.word) and self.word in data
                    sink.write(data)
            for end in (writer, forth):
                end.transport.abort()

        await asyncio.gather(pump(reader, forth), pump(back, writer), return_exceptions=True)

    def cut(self) -> None:
        self.down = True
        for writer in self._open:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def laid(self) -> AsyncIterator[Line]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self.cut()
            server.close()


class Place:
    """An empty database that can be taken away."""

    def __init__(self, url: str, file: Path | None = None, line: Line | None = None) -> None:
        self.url, self._file, self.line = url, file, line

    def take_away(self) -> None:
        if self.line is not None:
            self.line.cut()
        elif self._file is not None:
            self._file.parent.rename(self._file.parent.with_suffix(".away"))

    def bring_back(self) -> None:
        if self.line is not None:
            self.line.down = False
        elif self._file is not None:
            self._file.parent.with_suffix(".away").rename(self._file.parent)


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    with postgresql() as port:
        yield port


@pytest.fixture(params=["sqlite", "postgresql"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    if request.param == "sqlite":
        (tmp_path / "claim").mkdir()
        yield Place(f"sqlite:///{tmp_path}/claim/gateway.db", tmp_path / "claim" / "gateway.db")
        return
    port, name = request.getfixturevalue("server"), f"t{next(_NUMBERS)}"
    with psycopg.connect(host="127.0.0.1", port=port, user="team", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    async with Line(port).laid() as line:
        yield Place(f"postgresql://team:pass%40word@127.0.0.1:{line.port}/{name}", line=line)


@contextlib.asynccontextmanager
async def store_of(place: Place, ledger: Ledger | None = None, **settings: Any) -> AsyncIterator[tuple[Store, Ledger]]:
    ledger = ledger or Ledger(today)
    store = Store(Settings(database=place.url, **settings), ledger)
    try:
        yield store, ledger
    finally:
        await store.close()


async def all_of(store: Store, days: int = 30) -> list[tuple[str, ...]]:
    """(key, user, model@version, requests, errors, prompt, completion) of team-a, all days together."""
    query = usage.Query(today() - timedelta(days=days))
    found = await store.rows(query, usage.Seen(frozenset(["team-a"]), "", ""))
    return [(r.key, r.user, f"{r.model}@{r.version}", r.requests, r.errors, r.prompt_tokens, r.completion_tokens) for r in found]


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    async with Replica().serving() as found:
        yield found


async def told(gateway: Running, token: str = KEY, **parameters: Any) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
        session.get(gateway.url + USAGE_PATH, params=parameters) as response,
    ):
        return response.status, await response.json()


def counts(report: dict[str, Any]) -> dict[tuple[str, str, str], tuple[int, int, int, int]]:
    """By namespace, model and caller."""
    assert all(row["day"] == datetime.now(UTC).date().isoformat() for row in report["rows"])
    return {
        (row["namespace"], f"{row['model']}@{row.get('version')}", row["key"] or row["user"]): (
            row["requests"],
            row["errors"],
            row["promptTokens"],
            row["completionTokens"],
        )
        for row in report["rows"]
    }


async def test_what_was_asked_is_kept_and_seen_by_those_who_may(place: Place, replica: Replica) -> None:
    """A key sees its own, a user what they may use all of, and elsewhere their own; the end of the gateway writes what is left."""
    bob, many = ("team-b", "support-bot@2", "bob"), {"bob": {("team-a", "chat"), ("team-b", "chat")}, "alice": {("team-a", "")}}
    async with running(database=place.url) as gateway:
        pod = served(replica.address, "support-bot@3", "support-bot@2")
        gateway.see(endpoint(pod), endpoint(pod, namespace="team-b", version=2))
        gateway.reviews.users = {"a": "alice", "b": "bob"}
        gateway.reviews.rights = many  # type: ignore[assignment]
        assert (await told(gateway, "a"))[0] == 503, "nothing was written yet"
        assert [(await ask(gateway))[0] for _ in range(2)] == [200, 200]
        assert (await ask(gateway, {**ASK, "stream": True, "stream_options": {"include_usage": True}, "model": "chat"}))[0] == 200
        assert (await ask(gateway, {**ASK, "model": "team-b/support-bot"}, token="b"))[0] == 200
        assert (await ask(gateway, token="alice-is-not-here"))[0] == 401

        async def fails(_: web.Request) -> web.Response:
            return web.json_response({"error": {}}, status=422)

        replica.instead = fails
        assert (await ask(gateway, {**ASK, "model": "team-a/support-bot"}, token="b"))[0] == 422
        replica.instead = None
        assert gateway.parts.store is not None and await gateway.parts.store.flush()
        of_key = {("team-a", "support-bot@3", "ci"): (2, 0, 14, 10), ("team-a", "chat@None", "ci"): (1, 0, 7, 3)}
        of_bob = {("team-a", "support-bot@3", "bob"): (1, 1, 0, 0), bob: (1, 0, 7, 5)}
        assert counts((await told(gateway))[1]) == of_key
        assert counts((await told(gateway, "b"))[1]) == of_bob
        assert counts((await told(gateway, "a"))[1]) == {**of_key, ("team-a", "support-bot@3", "bob"): (1, 1, 0, 0)}
        for asked, wanted in (
            ({"key": "ci", "model": "support-bot"}, 1),
            ({"model": "team-a/support-bot@3"}, 2),
            ({"model": "chat@3"}, 0),
            ({"namespace": "team-b"}, 0),
            ({"user": "bob", "days": "1"}, 1),
        ):
            assert len((await told(gateway, "a", **asked))[1]["rows"]) == wanted, asked
        for name, value in (("days", "0"), ("days", "1e3"), ("model", "../x"), ("other", "x"), ("key", "a\0b")):
            status, answer = await told(gateway, "a", **{name: value})
            assert (status, answer["error"]["param"]) == (400, name)
        gateway.key("ftk_" + "b" * 43, identifier="ci", namespace="team-b")
        assert counts((await told(gateway, "ftk_" + "b" * 43))[1]) == {}, "another namespace's key of the same id"
        assert (await told(gateway, "nobody"))[0] == 401
        assert (await ask(gateway))[0] == 200
    async with running(database=place.url) as gateway:
        assert gateway.parts.store is not None and await gateway.parts.store.flush()
        assert counts((await told(gateway))[1])["team-a", "support-bot@3", "ci"] == (3, 0, 21, 15)


async def test_a_store_that_is_away_holds_up_no_request(place: Place, replica: Replica) -> None:
    """What was counted meanwhile is there once when it is back; the metrics tell."""
    async with running(database=place.url, flush_seconds=0.02) as gateway:
        gateway.see(endpoint(served(replica.address, "support-bot@3")))
        store = gateway.parts.store
        assert store is not None
        place.take_away()
        task = asyncio.create_task(store.run())
        failures = metrics.STORE_FAILURES._value.get()
        assert [(await ask(gateway))[0] for _ in range(3)] == [200] * 3
        await until(lambda: metrics.STORE_FAILURES._value.get() > failures and metrics.USAGE_PENDING._value.get() == 3)
        assert (await told(gateway))[0] == 503
        place.bring_back()
        await until(lambda: metrics.USAGE_PENDING._value.get() == 0, 10)
        assert counts((await told(gateway))[1]) == {("team-a", "support-bot@3", "ci"): (3, 0, 21, 15)}
        place.take_away()
        assert (await ask(gateway))[0] == 200
        await until(lambda: metrics.USAGE_PENDING._value.get() == 1)
        if place.line is not None:  # an open file is read wherever it was moved to
            status, answer = await told(gateway)
            assert (status, answer["error"]["code"]) == (503, "store_unavailable")
        place.bring_back()
        await until(lambda: metrics.USAGE_PENDING._value.get() == 0, 10)
        assert counts((await told(gateway))[1])["team-a", "support-bot@3", "ci"] == (4, 0, 28, 20)
        assert "finetune_gateway_usage_pending_requests 0.0" in await scraped(gateway)
        task.cancel()


async def test_a_batch_that_was_written_unheard_counts_once(place: Place) -> None:
    """On PostgreSQL the connection is cut between COMMIT and its answer; SQLite has no such moment but the end of the process."""
    async with store_of(place) as (store, ledger):
        ledger.request(TARGET, "ci", "", error=False)
        assert await store.flush()
        ledger.request(TARGET, "ci", "", error=True)
        if place.line is not None:
            place.line.word = b"COMMIT"
        else:
            write = store._write

            def unheard(*batch: Any) -> None:
                write(*batch)
                store._write = write  # type: ignore[method-assign]
                raise OperationalError("x", {}, Exception("killed"))

            store._write = unheard  # type: ignore[method-assign]
        assert not await store.flush()
        ledger.request(TARGET, "ci", "", error=False)
        assert await store.flush() and await all_of(store) == [("ci", "", "support-bot@3", 2, 1, 0, 0)]
        assert await store.flush() and await all_of(store) == [("ci", "", "support-bot@3", 3, 1, 0, 0)]


async def test_gateways_that_start_at_once_make_the_tables_once(place: Place) -> None:
    """And add to the same rows without waiting for each other in a circle."""
    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(store_of(place)) for _ in range(4)]
        for turn in range(3):
            for number, (_, ledger) in enumerate(found):
                for key in ("a", "b", "c") if number % 2 else ("c", "b", "a"):
                    ledger.request(TARGET, key, "", error=False)
                    ledger.tokens(TARGET, key, "", 10, turn)
            assert all(await asyncio.gather(*(store.flush() for store, _ in found)))
        assert await all_of(found[0][0]) == [(key, "", "support-bot@3", 12, 0, 120, 12) for key in "abc"]


def _differences(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert context.get_current_revision() == REVISION
        return list(compare_metadata(context, METADATA))


async def test_migrations_make_the_tables_and_a_later_release_is_gone_on_with(place: Place) -> None:
    engine = engine_of(place.url)
    await asyncio.to_thread(migrate, engine)
    assert await asyncio.to_thread(_differences, engine) == []
    with await asyncio.to_thread(engine.connect) as connection:
        await asyncio.to_thread(connection.execute, text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        await asyncio.to_thread(connection.commit)
    engine.dispose()
    async with store_of(place) as (store, ledger):
        ledger.request(TARGET, "ci", "", error=False)
        assert await store.flush() and len(await all_of(store)) == 1


async def test_files_uploads_and_the_history_of_jobs(place: Place) -> None:
    """On both: pages in order without gaps where times are equal, nothing of another namespace, and each event once."""
    rows = [files.File(f"file-{n}", "team-a", "r.jsonl", "fine-tune", 1, 100 + n // 2, "same", "messages", 1, "") for n in range(5)]
    told = [
        {"id": f"e{n}", "job": "u", "created_at": 100 + n // 3, "position": n % 2, "level": "info", "type": ("metrics", "message")[n % 2]}
        | {"message": "m", "data": "", "step": n}
        for n in range(7)
    ]
    async with store_of(place) as (store, _):
        await store.flush()
        for row in rows:
            await store.write(lambda connection, row=row: files.add(connection, row))
        for ascending in (True, False):
            seen: list[files.File] = []
            while more := await store.read(
                partial(files.page, namespace="team-a", after=(seen or [None])[-1], limit=2, purpose="fine-tune", ascending=ascending)
            ):
                seen += more
            assert seen == (rows if ascending else rows[::-1])
        assert await store.read(lambda connection: files.find(connection, "team-b", "file-0")) is None
        assert await store.write(lambda connection: [files.remove(connection, row) for row in rows]) == [False] * 4 + [True]
        for _ in range(2):
            await store.write(lambda connection: history.add(connection, told))
        found: list[Any] = []
        while events := await store.read(partial(history.page, job="u", after=found[-1]["id"] if found else None, limit=2)):
            found += events
        assert [event["id"] for event in found] == ["e6", "e5", "e3", "e4", "e1", "e2", "e0"]
        assert await store.read(lambda connection: history.page(connection, "u", "x", 2)) is None
        assert [point["step"] for point in await store.read(lambda connection: history.points(connection, "u"))] == [0, 2, 4, 6]
        await store.write(lambda connection: history.forget(connection, 102))
        assert len(await store.read(lambda connection: history.points(connection, "u"))) == 1
        upload = uploads.Upload("upload_1", "team-a", "r.jsonl", "fine-tune", 3, 100, uploads.PENDING, "")
        await store.write(lambda connection: (uploads.add(connection, upload), uploads.add_part(connection, upload, "part_1", 3)))
        assert await store.read(lambda connection: uploads.parts(connection, upload)) == {"part_1": 3}
        assert await store.read(lambda connection: uploads.stale(connection, "team-a", 101)) == [upload]
        ends = [await store.write(lambda connection: uploads.end(connection, upload, uploads.COMPLETED, rows[0])) for _ in range(2)]
        assert ends == [True, False] and await store.read(lambda connection: uploads.parts(connection, upload)) == {}
        assert (await store.read(lambda connection: uploads.find(connection, "team-a", "upload_1"))).file == "file-0"  # type: ignore[union-attr]


async def test_old_days_are_forgotten_and_long_answers_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with store_of(place, usage_days=10) as (store, _):
        assert await store.flush()
        days = [today() - timedelta(days=ago) for ago in (0, 10, 11)]
        batch = [(Use(day, "team-a", "chat", 0, "ci", ""), Amount(requests=1)) for day in days]

        def write(old: date) -> tuple[int, int]:
            with store._engine.begin() as connection:
                usage.add(connection, "other", 1, batch, old)
                usage.forget(connection, today(), 10)
                return (
                    len(connection.execute(USAGE.select()).all()),
                    len(connection.execute(WRITERS.select()).all()),
                )

        assert await asyncio.to_thread(write, today() - timedelta(days=31)) == (2, 0)
        monkeypatch.setattr(usage, "MOST_ROWS", 1)
        async with running(database=place.url) as gateway:
            assert gateway.parts.store is not None and await gateway.parts.store.flush()
            status, answer = await told(gateway)
            assert (status, answer["error"]["code"]) == (400, "too_many_rows")
            assert (await told(gateway, days=1))[0] == 200


async def test_the_command_line_tells_it(place: Place, replica: Replica) -> None:
    def finetune(url: str, *words: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("FINETUNE_GATEWAY_URL", url)
            patch.setenv("FINETUNE_API_KEY", KEY)
            patch.setattr(console, "_width", 160)
            patch.setattr(sys, "argv", ["finetune", "usage", *words])
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

    async with running(database=place.url) as gateway:
        gateway.see(endpoint(served(replica.address, "support-bot@3")))
        for _ in range(2):
            await ask(gateway)
        code, _, why = await asyncio.to_thread(finetune, gateway.url)
        assert code == 1 and "cannot tell what was used now" in why
        assert gateway.parts.store is not None and await gateway.parts.store.flush()
        code, out, _ = await asyncio.to_thread(finetune, gateway.url, "--key", "ci", "--daily")
        day = datetime.now(UTC).date().isoformat()
        assert code == 0 and [line.split() for line in out.splitlines()] == [
            ["DAY", "NAMESPACE", "MODEL", "CALLER", "REQUESTS", "ERRORS", "PROMPT", "COMPLETION"],
            [day, "team-a", "support-bot@3", "ci", "2", "0", "14", "10"],
            ["TOTAL", "2", "0", "14", "10"],
        ]
        code, out, _ = await asyncio.to_thread(finetune, gateway.url, "-o", "json", "--model", "support-bot@3")
        assert json.loads(out)["rows"][0]["completionTokens"] == 10
        code, _, why = await asyncio.to_thread(finetune, gateway.url, "--days", "99999")
        assert code == 2 and "days is a whole number" in why


async def test_without_a_store_nothing_is_kept_or_imported() -> None:
    async with running() as gateway:
        status, answer = await told(gateway)
        assert (status, answer["error"]["code"]) == (404, "no_store")
    imports = "import sys, finetune_gateway.__main__; print([m for m in ('sqlalchemy', 'alembic', 'psycopg') if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", imports, stdout=subprocess.PIPE)
    assert await process.communicate() == (b"[]\n", None)


def test_the_ledger_is_bounded_and_takes_no_nonsense() -> None:
    day = date(2026, 11, 29)
    ledger = Ledger(lambda: day, most_rows=2)
    for key in ("a", "b", "c", "a"):
        ledger.request(TARGET, key, "", error=False)
    ledger.tokens(TARGET, "c", "", 1, 1)
    ledger.tokens(TARGET, "a", "", 2**62, 5)
    assert (ledger.lost, ledger.requests) == (1, 3)
    assert ledger.take()[0] == (Use(day, "team-a", "support-bot", 3, "a", ""), Amount(2, 0, MOST_TOKENS, 5))
    assert ledger.requests == 0 and not ledger.take()
    assert user_name("system:serviceaccount:a:b") == "system:serviceaccount:a:b"
    strange = [user_name(name) for name in ("a\0", "a\1", "a\ud800", "x" * 254, "x" * 255)]
    assert len(set(strange)) == 5 and all(name.isprintable() and len(name) <= 253 for name in strange)


@pytest.mark.parametrize("url", ["mysql://u:secret-pass@h/d", "postgresql://u:secret-pass@h", "sqlite://", "secret-pass"])
def test_a_url_is_refused_without_being_told(url: str) -> None:
    with pytest.raises(ValueError, match="FINETUNE_GATEWAY_DATABASE: write sqlite") as refused:
        from_environment({"FINETUNE_GATEWAY_DATABASE": url})
    assert "secret-pass" not in str(refused.value)
    settings = from_environment({"FINETUNE_GATEWAY_DATABASE": "postgresql://u:secret-pass@h:port/d?sslmode=verify-full&sslrootcert=/a/b"})
    assert "secret-pass" not in repr(settings)
    with pytest.raises(ValueError, match="cannot be read") as unread:
        engine_of(settings.database)
    assert "secret-pass" not in str(unread.value) and unread.value.__suppress_context__


async def test_a_password_is_in_no_log(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    store = Store(Settings(database="postgresql://team:secret-pass@127.0.0.1:1/d"), Ledger(today))
    assert not await store.flush()
    with pytest.raises(StoreAway):
        await store.rows(usage.Query(today()), usage.Seen(frozenset(), "", ""))
    await store.close()
    assert "the store does not answer" in caplog.text and "secret-pass" not in caplog.text
