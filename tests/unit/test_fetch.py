"""Data from https:// and s3:// (cases A5, A6): real servers on this machine, which the allow-list has to name."""

from __future__ import annotations

import datetime
import gzip
import ipaddress
import json
import select
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from finetune_api.contract import Env, JobFile
from finetune_api.spec import DatasetSource
from finetune_api.validation import parse_spec
from finetune_trainer.data.fetch import fetch
from finetune_trainer.data.reading import rows
from finetune_trainer.job.context import Context
from finetune_trainer.process.errors import SourceUnavailable, UserError
from finetune_trainer.remote import retry
from finetune_trainer.remote.addresses import allowed_addresses
from tests.factory import MINIMAL
from tests.loopback import QuietHandler, serving

ROWS = b'{"text": "a"}\n{"text": "b"}\n'


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(JobFile(name="j", namespace="n", uid="12345678", spec=parse_spec(MINIMAL)), str(tmp_path / "workspace"))


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """https://localhost:PORT with a certificate that this process trusts."""
    folder = tmp_path_factory.mktemp("https")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, False).add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = folder / "server.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            path, body = self.path, ROWS
            if path.startswith("/to/"):
                self.send_response(302)
                self.send_header(
                    "Location",
                    {"metadata": "https://169.254.169.254/latest/x.jsonl", "plain": "http://localhost/x.jsonl", "loop": "/to/loop"}.get(
                        path[4:], "/rows.jsonl"
                    ),
                )
                self.end_headers()
                return
            if path == "/private.jsonl" and self.headers.get("Authorization") != "Bearer s3cr3t":
                self.send_response(401)
                self.end_headers()
                return
            if path.startswith("/busy/"):
                self.send_response(int(path[6:9]))
                self.send_header("Retry-After", "77")
                self.end_headers()
                return
            if path == "/rows.jsonl.gz":
                body = gzip.compress(ROWS)
            self.send_response(200 if path != "/gone.jsonl" else 404)
            self.send_header("Content-Length", str(len(body) + (7 if path == "/short.jsonl" else 0)))
            self.end_headers()
            self.wfile.write(body)

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    with serving(Handler, tls) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(pem))
        patch.setenv(Env.ALLOWED_HOSTS, "localhost")
        yield f"https://localhost:{port}"


def read(context: Context, uri: str, **more: Any) -> list[dict[str, Any] | None]:
    return [row.parsed().value for row in rows(context, DatasetSource(uri=uri, **more), "train")]


@pytest.mark.parametrize("path", ["rows.jsonl", "rows.jsonl.gz", "to/rows.jsonl"])
def test_rows_from_the_net(context: Context, server: str, path: str) -> None:
    assert read(context, f"{server}/{path}") == [{"text": "a"}, {"text": "b"}]


def test_the_token_goes_to_that_host_alone(context: Context, server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answers 401; check the uri and secretRef"):
        read(context, f"{server}/private.jsonl")
    (tmp_path / "token").write_text("s3cr3t\n")
    context.job.secrets["train"] = str(tmp_path)
    assert len(read(context, f"{server}/private.jsonl")) == 2


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("to/metadata", "AddressNotAllowed"),
        ("to/plain", "RedirectRefused"),
        ("to/loop", "TooManyRedirects"),
        ("gone.jsonl", "DatasetNotFound"),
    ],
)
def test_a6_redirects_are_checked_again(context: Context, server: str, path: str, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        fetch(context, DatasetSource(uri=f"{server}/{path}"), "train")
    assert refused.value.reason == reason


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_server_that_is_busy_or_broken_is_waited_for(context: Context, server: str, code: int) -> None:
    with pytest.raises(SourceUnavailable, match=f"localhost answers {code}") as away:
        fetch(context, DatasetSource(uri=f"{server}/busy/{code}.jsonl"), "train")
    assert (away.value.host, away.value.retry_after) == ("localhost", 77)


def test_a_server_that_is_not_there_is_waited_for(context: Context, server: str, no_pause: None) -> None:
    for uri, host in (("https://localhost:1/rows.jsonl", "localhost"), ("https://nowhere.invalid/rows.jsonl", r"nowhere\.invalid")):
        with pytest.raises(SourceUnavailable, match=f"{host} (cannot be reached|has no address)"):
            fetch(context, DatasetSource(uri=uri), "train")


def test_an_authority_that_is_not_trusted_is_named_with_the_way_out(
    context: Context, server: str, no_pause: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(SourceUnavailable, match=r"certificate verify failed.*trainer\.caBundle"):
        fetch(context, DatasetSource(uri=f"{server}/rows.jsonl"), "train")


def test_through_a_proxy(context: Context, server: str, no_pause: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is asked by name and looks the name up; what has an address that is not public here is refused all the same."""
    asked: list[tuple[str, str | None]] = []

    class Proxy(QuietHandler):
        def do_CONNECT(self) -> None:
            asked.append((self.path, self.headers.get("Proxy-Authorization")))
            self.send_response(200)
            self.end_headers()
            with socket.create_connection(("127.0.0.1", int(server.rpartition(":")[2]))) as far:
                ends = [self.connection, far]
                while ready := select.select(ends, [], [], 5)[0]:
                    for end in ready:
                        if not (data := end.recv(65536)):
                            return
                        (far if end is self.connection else self.connection).sendall(data)

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Proxy) as port:
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://me:pass%21@127.0.0.1:{port}")
        assert len(read(context, f"{server}/rows.jsonl")) == 2
        assert asked == [(server.removeprefix("https://"), "Basic bWU6cGFzcyE=")]
        with pytest.raises(SourceUnavailable, match="nowhere"):  # the far end's certificate is another's
            fetch(context, DatasetSource(uri="https://nowhere.invalid/rows.jsonl"), "train")
        assert asked[-1][0] == "nowhere.invalid:443"
        monkeypatch.setenv(Env.ALLOWED_HOSTS, "")
        with pytest.raises(UserError, match="not public"):
            fetch(context, DatasetSource(uri=f"{server}/other.jsonl"), "train")


def test_half_a_file_is_tried_again(context: Context, server: str, no_pause: None) -> None:
    with pytest.raises(SourceUnavailable, match="bytes arrived|IncompleteRead"):
        fetch(context, DatasetSource(uri=f"{server}/short.jsonl"), "train")
    assert not list(Path(context.layout.data).rglob("short.jsonl"))


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "10.96.0.1", "192.168.1.1", "::1", "fd00::1", "0.0.0.0"])
def test_a6_addresses_that_are_not_public(host: str) -> None:
    with pytest.raises(UserError, match="which is not public"):
        allowed_addresses(host, 443)


def test_s3_with_keys_and_an_endpoint(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto in place of S3: the protocol is real, the store is not."""
    import boto3
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1")
        client.create_bucket(Bucket="data")
        client.put_object(Bucket="data", Key="team/rows.jsonl.gz", Body=gzip.compress(ROWS))
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            (tmp_path / key).write_text("a")
        context.job.secrets["train"] = str(tmp_path)
        assert read(context, "s3://data/team/rows.jsonl.gz", s3_endpoint=endpoint) == [{"text": "a"}, {"text": "b"}]
        with pytest.raises(UserError, match="NoSuchKey; check the uri"):
            read(context, "s3://data/none.jsonl", s3_endpoint=endpoint)
    finally:
        server.stop()
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "")
    with pytest.raises(UserError, match="not public"):
        read(context, "s3://data/other.jsonl", s3_endpoint="http://127.0.0.1:1")


def test_f34_what_was_fetched_stays(context: Context, server: str) -> None:
    source = DatasetSource(uri=f"{server}/rows.jsonl")
    path = fetch(context, source, "train")
    path.write_text(json.dumps({"text": "kept"}) + "\n")
    assert read(context, source.uri) == [{"text": "kept"}], "within one job the source is read once"
