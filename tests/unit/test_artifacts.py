"""Models out of an OCI registry, as this operator and other tools push them: Debian's docker-registry."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune_api.spec import DatasetSource
from finetune_trainer.data.reading import rows
from finetune_trainer.models.fetch import fetch_base_model, fetch_model
from finetune_trainer.process.errors import UserError
from finetune_trainer.remote import artifacts
from finetune_trainer.remote.registry import Registry, digest_of, dumps
from finetune_trainer.stages.publish import publish
from tests.unit import test_registry
from tests.unit.test_registry import SECRET, Place

server, place = test_registry.server, test_registry.place


def tar(*files: tuple[str, bytes], mode: str = "w", link: str = "") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, body in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
        if link:
            entry = tarfile.TarInfo("config.json")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            archive.addfile(entry)
    return sink.getvalue()


def test_a_base_out_of_a_registry(place: Place, tiny_model: Path) -> None:
    """As ModelPack tools push it, raw and in archives; pinned by its manifest's digest; a tag that moves later moves nothing."""
    files = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    weights = files.pop("model.safetensors")
    packed = tar(*((f"./{name}", body) for name, body in files.items()), ("onnx/config.json", b"x"), mode="w:gz")
    layers = [
        ("application/vnd.cncf.model.weight.v1.raw", weights, "model.safetensors"),
        ("application/vnd.cncf.model.weight.config.v1.tar+gzip", packed, "config"),
        ("application/vnd.cncf.model.weight.v1.raw", b"pickle", "pickle.bin"),
    ]
    digest = place.push(layers)
    context = place.reading()
    folder = Path(fetch_base_model(context))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {**files, "model.safetensors": weights}
    assert context.read_json(context.layout.reference("model"))["revision"] == digest
    place.push(layers[:1])
    assert fetch_base_model(context) == str(folder)
    with pytest.raises(UserError, match=r"holds no config\.json; name the folder"):
        fetch_base_model(place.reading(uid="22222222-b"))
    pinned = place.reading(f"oci://{place.host}/{place.repository}@{digest}", uid="22222222-b")
    assert fetch_base_model(pinned) == str(folder)


def test_rows_out_of_a_registry(place: Place) -> None:
    """As ORAS pushes files; what was fetched once is what trains, wherever its tag points later."""
    first, second = b'{"text": "one"}\n', b'{"text": "two"}\n'
    kind = "application/vnd.oci.image.layer.v1.tar"
    place.push([("application/jsonl", first, "a.jsonl"), (kind, tar(("b.jsonl", second)), None), ("text/markdown", b"# Rows", "README.md")])
    context = place.context()
    context.job.secrets["train"] = context.job.secrets["model"]
    source = DatasetSource.model_validate({"uri": place.uri, "secretRef": SECRET, "plainHTTP": True})

    def read() -> list[Any]:
        return [row.parsed().value for row in rows(context, source, "train")]

    assert read() == [{"text": "one"}, {"text": "two"}]
    place.push([("application/jsonl", second, "c.jsonl")])
    assert read() == [{"text": "one"}, {"text": "two"}]
    place.push([("text/markdown", b"# Rows", "README.md")], tag="empty")
    with pytest.raises(UserError, match=r"holds none of \*\.jsonl, "):
        list(rows(context, source.model_copy(update={"uri": place.uri.replace(":v1", ":empty")}), "train"))


def test_going_on_from_an_adapter_that_was_published(place: Place) -> None:
    context = place.context()
    save_file({"base_model.model.q.lora_A.weight": np.ones((2, 2), np.float32)}, Path(context.layout.output, "adapter_model.safetensors"))
    publish(context)
    tuning = {"continueFrom": place.uri, "continueFromSecretRef": SECRET, "continueFromPlainHTTP": True}
    later = place.context("44444444-d", name="k", tuning=tuning)
    folder = Path(fetch_model(later, "adapter", place.uri, config="adapter_config.json"))
    assert (folder / "finetune.json").is_file(), "its lineage comes with it"
    with pytest.raises(UserError, match="is an image, or no artifact; name a ModelPack artifact"):
        fetch_base_model(place.reading(f"{place.uri}-image"))


def test_a_download_that_broke_off_is_gone_on_with(place: Place, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [("application/vnd.cncf.model.weight.v1.raw", file.read_bytes(), file.name) for file in sorted(tiny_model.iterdir())]
    place.push(files)
    ask, ranges = Registry.do_request, list[str]()

    class Broken:
        def __init__(self, first: bytes) -> None:
            self.left = [first]

        def __iter__(self) -> Broken:
            return self

        def __next__(self) -> bytes:
            if not self.left:
                raise ConnectionResetError("reset by peer")
            return self.left.pop()

    def cut(client: Registry, url: str, *words: Any, **more: Any) -> Any:
        if "Range" in (more.get("headers") or {}):
            ranges.append(more["headers"]["Range"])
        answer = ask(client, url, *words, **more)
        if "/blobs/" in url and not ranges and int(answer.headers["Content-Length"]) > 100_000:
            answer.iter_content = lambda _: Broken(answer.raw.read(50_000))
        return answer

    monkeypatch.setattr(Registry, "do_request", cut)
    folder = Path(fetch_base_model(place.reading()))
    assert ranges == ["bytes=50000-"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {name: body for _, body, name in files}


RAW, TAR = "application/vnd.cncf.model.weight.config.v1.raw", "application/vnd.cncf.model.weight.config.v1.tar"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ((RAW, b"{}", "../../config.json"), "PathLeavesVolume"),
        ((RAW, b"{}", "/etc/config.json"), "PathLeavesVolume"),
        ((TAR, tar(("a/../../config.json", b"{}")), None), "PathLeavesVolume"),
        ((TAR, tar(link="/etc/passwd"), None), "ModelNotReadable"),
        ((TAR, b"no archive" * 100, None), "ModelNotReadable"),
        ((TAR + "+zstd", b"x", None), "ModelNotReadable"),
        ((RAW, b"x", "pickle.bin"), "SourceNotFound"),
    ],
)
def test_a5_what_an_artifact_may_not_hold(layer: tuple[str, bytes, str | None], reason: str, place: Place) -> None:
    place.push([layer])
    with pytest.raises(UserError) as refused:
        fetch_base_model(place.reading())
    assert refused.value.reason == reason and not list(place.folder.rglob("fetched--*/*"))


def test_a5_bombs_and_what_is_too_large(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_BOMB", -(10**8))  # nothing of over a GiB is unpacked here
    place.push([(TAR + "+gzip", tar(("config.json", b" " * 2000), mode="w:gz"), None)])
    with pytest.raises(UserError, match="times as large when it is unpacked") as bomb:
        fetch_base_model(place.reading())
    assert bomb.value.reason == "DecompressionBomb"
    monkeypatch.setattr(artifacts, "SIZE_LIMIT", 100)
    place.push([(RAW, b"x" * 101, "config.json")])
    with pytest.raises(UserError, match="has over") as large:
        fetch_base_model(place.reading())
    assert large.value.reason == "ModelTooLarge"


def test_what_is_not_what_its_digest_says_is_no_base(place: Place) -> None:
    body = dumps({"model_type": "llama"})
    place.push([(RAW, body, "config.json")])
    place.blob(digest_of(body)).write_bytes(body.replace(b"llama", b"lLama"))
    with pytest.raises(UserError, match="a blob is not what its digest says") as damaged:
        fetch_base_model(place.reading())
    assert damaged.value.reason == "ModelNotWhole"
    with pytest.raises(UserError, match="has no v2; check the uri"):
        fetch_base_model(place.reading(place.uri.replace(":v1", ":v2")))
