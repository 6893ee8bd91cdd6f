"""Results in an OCI registry: Debian's docker-registry, and oras-py as a reader of its own."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import oras.provider
import oras.schemas
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from jsonschema import validate

from finetune_api.contract import DOCKER_CONFIG, Env
from finetune_api.uris import parse_uri
from finetune_trainer.export import registry as target
from finetune_trainer.job.context import Context
from finetune_trainer.models.fetch import fetch_base_model
from finetune_trainer.process.errors import InfrastructureError, SourceUnavailable, UserError
from finetune_trainer.process.redaction import redact
from finetune_trainer.remote import retry
from finetune_trainer.remote.registry import Registry, digest_of
from finetune_trainer.stages.check import check
from finetune_trainer.stages.publish import publish
from tests.loopback import QuietHandler, serving
from tests.servers import PASSWORD, USER, registry
from tests.unit.test_results import Shelf, forms_are_restored

SECRET = {"name": "push"}
TEAM = "team/support"


class Place:
    """A repository of its own in a registry, and jobs that publish to it and read from it."""

    def __init__(self, host: str, store: Path, folder: Path) -> None:
        self.host, self.store, self.folder, self.shelf = host, store, folder, Shelf(folder)
        self.repository = f"{TEAM}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
        self.secret(USER, PASSWORD)
        self._client = Registry(self.context(), "publish-0", parse_uri(self.uri), plain=True)

    @property
    def uri(self) -> str:
        return f"oci://{self.host}/{self.repository}:v1"

    def secret(self, user: str, password: str, host: str = "") -> None:
        (self.folder / "secret").mkdir(exist_ok=True)
        auth = {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}
        (self.folder / "secret" / DOCKER_CONFIG).write_text(json.dumps({"auths": {host or self.host: auth}}))

    def context(self, uid: str = "11111111-a", name: str = "j", **blocks: Any) -> Context:
        asked = {"publish": [{"uri": self.uri, "secretRef": SECRET, "plainHTTP": True}]}
        context = self.shelf.context(uid, name=name, **{**asked, **blocks})
        context.job.secrets.update({field: str(self.folder / "secret") for field in ("publish-0", "model", "adapter")})
        return context

    def reading(self, uri: str = "", uid: str = "11111111-a", **more: Any) -> Context:
        return self.context(uid, model={"uri": uri or self.uri, "secretRef": SECRET, "plainHTTP": True, **more})

    def client(self) -> Registry:
        return self._client

    def tags(self) -> list[str]:
        folder = self.store / "docker/registry/v2/repositories" / self.repository / "_manifests/tags"
        return sorted(p.name for p in folder.iterdir()) if folder.exists() else []

    def uploads(self) -> list[Path]:
        return list((self.store / "docker/registry/v2/repositories" / self.repository).glob("_uploads/*/startedat"))

    def blob(self, digest: str) -> Path:
        return self.store / "docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"

    def push(self, layers: list[tuple[str, bytes, str | None]], tag: str = "v1") -> str:
        """Something that another tool pushed: media type, content and file name of each layer; its digest."""
        client = self.client()
        described = []
        for kind, body, name in layers:
            client.put_blob(digest_of(body), body)
            annotations = {"annotations": {target.FILEPATH: name}} if name is not None else {}
            described.append({"mediaType": kind, "digest": digest_of(body), "size": len(body), **annotations})
        client.put_blob(digest_of(b"{}"), b"{}")
        config = {"mediaType": target.CONFIG_TYPE, "digest": digest_of(b"{}"), "size": 2}
        manifest = {"schemaVersion": 2, "mediaType": target.MANIFEST, "artifactType": target.ARTIFACT_TYPE, "config": config}
        return str(client.put_manifest({**manifest, "layers": described}, tag)["digest"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("registry")
    with registry(folder) as host:
        yield host, folder / "store"


@pytest.fixture
def place(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
    monkeypatch.setattr(retry, "_PAUSES", (0.01,))
    return Place(*server, tmp_path)


def published(place: Place) -> dict[str, bytes]:
    """What another reader gets, by the names that it goes by."""
    client = oras.provider.Registry(insecure=True, auth_backend="basic")
    client.auth.set_basic_auth(USER, PASSWORD)
    folder = place.folder / "pulled"
    client.pull(f"{place.host}/{place.repository}:v1", outdir=str(folder), config_path=str(place.folder / "secret" / DOCKER_CONFIG))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_result_in_a_registry(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked first, written once, read back; ORAS pulls it and its digests are right; publishing again changes nothing."""
    assert check(place.context()).reason == "TargetsReady"
    assert not place.tags() and not place.uploads(), "asking leaves nothing behind"
    result = publish(place.context())
    assert place.tags() == ["v1", "v1-image"] and not place.uploads()
    assert set(published(place)) == {"README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "finetune.json"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=place.folder / "pulled", check=True)
    assert result.result["artifacts"][0]["bytes"] == sum(map(len, published(place).values()))

    manifest = place.client().manifest("v1")
    assert manifest is not None and manifest.document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest.document["layers"]}
    assert kinds["adapter_model.safetensors"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["adapter_config.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert kinds["README.md"] == "application/vnd.cncf.model.doc.v1.raw"
    config = json.loads(b"".join(place.client().blob(manifest.document["config"]["digest"])))
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest.document["layers"]]}
    assert set(config) == {"descriptor", "config", "modelfs"}, "the specification knows no other"

    before = {path: path.stat().st_mtime_ns for path in place.store.rglob("*") if place.repository in str(path) and path.is_file()}
    assert publish(place.context()) == result
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = check(place.context(uid="22222222-b"))
    assert (found.reason, found.result) == ("Restored", result.result), "made again from a backup"
    forms_are_restored(monkeypatch, place.context)


def test_the_image_holds_the_same_files(place: Place) -> None:
    """For each platform, as a container runtime reads it: layers in order, each the tar whose digest the configuration names."""
    publish(place.context())
    client = place.client()
    index = client.manifest("v1-image")
    assert index is not None and index.media_type == target.INDEX
    assert [m["platform"] for m in index.document["manifests"]] == [
        {"architecture": "amd64", "os": "linux"},
        {"architecture": "arm64", "os": "linux"},
    ]
    for described in index.document["manifests"]:
        manifest = client.manifest(described["digest"])
        assert manifest is not None and len(manifest.body) == described["size"]
        validate(manifest.document, oras.schemas.manifest)
        config = json.loads(b"".join(client.blob(manifest.document["config"]["digest"])))
        assert (config["architecture"], config["os"]) == (described["platform"]["architecture"], "linux")
        files: dict[str, bytes] = {}
        for layer, diff_id in zip(manifest.document["layers"], config["rootfs"]["diff_ids"], strict=True):
            body = b"".join(client.blob(layer["digest"]))
            assert diff_id == f"sha256:{hashlib.sha256(body).hexdigest()}" and layer["size"] == len(body)
            assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                for entry in archive:
                    assert (entry.isreg(), entry.mtime, entry.uid, entry.mode) == (True, 0, 0, 0o644)
                    files[entry.name] = archive.extractfile(entry).read()  # type: ignore[union-attr]
        assert files == published(place)


@pytest.mark.parametrize("call", [1, 3, 4])
def test_what_was_killed_in_the_middle_is_not_seen_and_is_gone_on_with(call: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first manifest, before the image's tag, before the artifact's."""
    put, calls = Registry.put_manifest, iter(range(1, 100))

    def killed(client: Registry, *words: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return put(client, *words)

    monkeypatch.setattr(Registry, "put_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(place.context())
    assert "v1" not in place.tags() and check(place.context()).reason == "TargetsReady"
    monkeypatch.setattr(Registry, "put_manifest", put)
    publish(place.context())
    assert len(published(place)) == 5


@pytest.mark.parametrize("tag", ["v1", "v1-image"])
def test_a21_what_is_anothers_is_never_overwritten(tag: str, place: Place) -> None:
    place.push([("application/vnd.cncf.model.doc.v1.raw", b"thesis", "thesis.tex")], tag)
    for ask in (check, publish):
        with pytest.raises(UserError, match="something that no FineTuneJob published") as taken:
            ask(place.context())
        assert taken.value.reason == "TargetTaken" and place.tags() == [tag]


def test_a21_nor_is_another_jobs_result(place: Place) -> None:
    publish(place.context())
    before = place.client().manifest("v1")
    for ask in (check, publish):
        with pytest.raises(UserError, match=r"holds the result of job n/j \(11111111-a\), which was to make another"):
            ask(place.context(uid="22222222-b", tuning={"method": "dora"}))
        assert place.client().manifest("v1") == before


def test_of_two_that_publish_at_once_one_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's manifest comes right after this one's: reading back tells."""
    put = Registry.put_manifest

    def late(client: Registry, document: dict[str, Any], tag: str | None = None) -> Any:
        found = put(client, document, tag)
        if tag == "v1":
            record = {"job": {"name": "k", "namespace": "n", "uid": "33333333-c", "spec": "sha256:0"}}
            put(client, {**document, "annotations": {**document["annotations"], target._RECORD: json.dumps(record)}}, tag)
        return found

    monkeypatch.setattr(Registry, "put_manifest", late)
    with pytest.raises(UserError, match="holds the result of job n/k"):
        publish(place.context())


def test_its_own_result_is_replaced_and_a_damaged_one_is_told(place: Place) -> None:
    publish(place.context())
    context = place.context()
    Path(context.layout.output, "adapter_model.safetensors").write_bytes(b"other weights")
    publish(context)
    assert published(place)["adapter_model.safetensors"] == b"other weights"
    digest = digest_of(b"other weights")
    place.blob(digest).write_bytes(b"other wEights")
    with pytest.raises(InfrastructureError, match=f"{digest} is not there as it was sent") as found:
        publish(context)
    assert found.value.reason == "VerificationFailed"


def test_credentials_that_do_not_do(place: Place) -> None:
    place.secret(USER, "wrong-password")
    for ask in (check, publish):
        with pytest.raises(UserError, match="answers 401: secretRef may not push") as refused:
            ask(place.context())
        assert refused.value.reason == "PublishRefused"
    place.secret(USER, PASSWORD, "ghcr.io")
    with pytest.raises(UserError, match=r"has no credentials for 127.*, only for ghcr\.io"):
        publish(place.context())
    (place.folder / "secret" / DOCKER_CONFIG).write_text("token")
    with pytest.raises(UserError, match="no Docker configuration; make it with kubectl create secret docker-registry"):
        publish(place.context())
    place.secret(USER, "another-password")
    Registry(place.context(), "publish-0", parse_uri(place.uri), plain=True)
    assert redact("said another-password") == "said ***", "it is within the Secret's value"


def test_tokens_for_a_repository(place: Place, tmp_path: Path) -> None:
    """As most public registries ask: another server gives tokens for a repository and a purpose, and the password goes there alone."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tokens")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    (tmp_path / "roots.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    scopes: list[str] = []

    class Tokens(QuietHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            known = self.headers.get("Authorization") == "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            kind, repository, actions = query["scope"][0].split(":")
            scopes.append(",".join(sorted(actions.split(","))))  # a registry names them in any order
            access = [{"type": kind, "name": repository, "actions": actions.split(",")}]
            times = {"nbf": int(now.timestamp()) - 60, "exp": int(now.timestamp()) + 3600, "iat": int(now.timestamp())}
            claims = {"iss": "tests", "sub": USER, "aud": "registry", "jti": "1", **times, "access": access}
            chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
            parts = [
                base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=")
                for p in ({"typ": "JWT", "alg": "RS256", "x5c": chain}, claims)
            ]
            sealed = base64.urlsafe_b64encode(key.sign(b".".join(parts), padding.PKCS1v15(), hashes.SHA256())).rstrip(b"=")
            body = json.dumps({"token": b".".join([*parts, sealed]).decode()}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    (tmp_path / "tokens").mkdir()
    with serving(Tokens) as port:
        auth = {"realm": f"http://127.0.0.1:{port}/token", "service": "registry", "issuer": "tests"}
        with registry(tmp_path / "tokens", {"token": {**auth, "rootcertbundle": str(tmp_path / "roots.pem")}}) as host:
            place.secret(USER, PASSWORD, host)
            asked = {"publish": [{"uri": f"oci://{host}/x/y", "secretRef": SECRET, "plainHTTP": True}]}
            assert check(place.context(**asked)).reason == "TargetsReady"
            publish(place.context(**asked))
            assert scopes == ["pull", "pull,push", "delete", "pull", "pull,push"], "once for each purpose"
            place.secret(USER, "wrong-password", host)
            with pytest.raises(UserError, match="answers 401: secretRef may not push"):
                publish(place.context(**asked))


def test_a_registry_that_is_away_is_waited_for(place: Place) -> None:
    place.secret(USER, PASSWORD, "127.0.0.1:1")
    away = {"uri": "oci://127.0.0.1:1/x/y", "secretRef": SECRET, "plainHTTP": True}
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1 cannot be reached"):
        publish(place.context(publish=[away]))
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1 cannot be reached"):
        fetch_base_model(place.reading("oci://127.0.0.1:1/x/y"))


@pytest.mark.parametrize("host", ["registry", "registry:5000", "registry.example"])
def test_the_host_is_the_one_that_was_named(host: str, place: Place) -> None:
    """oras-py would ask Docker's registry where a name has no dot, and take a folder with a dot for a host."""
    place.secret(USER, PASSWORD, host)
    asked = Registry(place.context(), "publish-0", parse_uri(f"oci://{host}/team.a/bot:v1"), plain=False)
    assert asked._container.manifest_url("v1") == f"{host}/v2/team.a/bot/manifests/v1"
    single = Registry(place.context(), "publish-0", parse_uri(f"oci://{host}/bot"), plain=False)
    assert single._container.upload_blob_url() == f"{host}/v2/bot/blobs/uploads/"


def test_a6_hosts_of_the_cluster_and_plain_http(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "")
    for ask in (check, publish):
        with pytest.raises(UserError, match="an administrator must allow this host") as refused:
            ask(place.context())
        assert refused.value.reason == "PlainHTTPRefused"
    with pytest.raises(UserError, match="which is not public"):
        publish(place.context(publish=[{"uri": place.uri, "secretRef": SECRET}]))


def test_a6_where_an_answer_leads_to_is_looked_at_again(place: Place) -> None:
    """Blobs, uploads and tokens may be at other hosts: not at those of the cluster."""
    asked: list[str] = []

    class Handler(QuietHandler):
        def answer(self) -> None:
            asked.append(self.path)
            if "/blobs/" in self.path or self.path.endswith("/token"):
                self.send_response(307)
                self.send_header("Location", "https://10.96.0.1/latest/meta-data")
            else:
                self.send_response(401)
                self.send_header("Www-Authenticate", 'Bearer realm="http://localhost/token",service="registry"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = answer

    with serving(Handler) as port:
        place.secret(USER, PASSWORD, f"127.0.0.1:{port}")
        uri = f"oci://127.0.0.1:{port}/x/y"
        with pytest.raises(UserError, match="http://localhost: an administrator must allow this host"):
            fetch_base_model(place.reading(uri))
        client = Registry(place.reading(uri), "model", parse_uri(uri), plain=True)
        with pytest.raises(UserError, match=r"10\.96\.0\.1 has the address 10\.96\.0\.1, which is not public"):
            list(client.blob(digest_of(b"")))
    assert len(asked) == 2
