"""What belongs to one person's rows, the order in which it goes, and how `finetune erase` asks for it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.erasure import ErasureReport, Reading, RowsFile
from finetune_api.probing import Probe, ProbeAnswer, Probes, judge
from finetune_trainer.data.prompts import prompt_key
from finetune_trainer.data.scan import prompt_digest
from finetune_trainer.erasure.match import make_match
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.erase import erase, read_request
from finetune_trainer.stages.publish import publish
from tests.factory import MINIMAL
from tests.unit.test_versions import ROW, Line, Lines, endpoint, line, lines

__all__ = ["endpoint", "line", "lines"]


def file_of(*rows: dict[str, Any]) -> RowsFile:
    return RowsFile(name="rows.jsonl", content=base64.b64encode("".join(json.dumps(row) + "\n" for row in rows).encode()).decode())


def turns(*said: str, system: str | None = None) -> dict[str, Any]:
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said))]}


LONG = "Where is my order number 4711 of last week?"


@pytest.mark.parametrize(
    ("row", "same", "other"),
    [
        ({"question": LONG, "reply": "Here."}, turns(LONG, "Here.", system="Be brief."), turns(LONG, "There.")),
        ({"instruction": LONG, "output": "Here."}, turns(f" {LONG.upper()}", "Here."), turns("Where?", "Here.")),
        (turns(LONG, "Here.", "Thanks", "Bye"), turns(LONG, "Here."), turns("Thanks", "Bye")),
        ({"prompt": LONG}, turns(LONG, "whatever was answered"), turns("Where is my order?", LONG)),
        ({"prompt": LONG, "chosen": "a", "rejected": "b"}, {"rejected": "b", "chosen": "a", "prompt": LONG}, turns(LONG, "a")),
        ({"text": LONG}, {"text": LONG}, {"text": f"{LONG} And more."}),
    ],
)
def test_a_row_is_known_by_what_is_said_in_it(row: dict[str, Any], same: dict[str, Any], other: dict[str, Any]) -> None:
    """Whatever its format, columns and system text; of several turns also the rows that a template makes of each answer."""
    match = make_match([], file_of(row), {}, [Reading(columns={"question": "prompt", "reply": "completion"})])
    assert match.row(same) and not match.row(other)
    assert match.mentions(f"<|user|>{LONG}<|end|>")
    assert match.mentions(f"<|user|>{LONG[:30]}"), "a sample is cut off after so many tokens"
    assert not match.mentions("<|user|>Where is my order number 5?<|end|>")


def test_short_prompts_do_not_take_others_with_them() -> None:
    match = make_match([], file_of(turns("hi", "Hello Jane.")), {}, [])
    assert match.row(turns("Hi", "Hello Jane.")) and not match.row(turns("Hi", "Hello!"))
    assert match.mentions("user: hi\nassistant: Hello Jane.") and not match.mentions("user: hi\nassistant: Hello! this is")


def test_a_teachers_answer_goes_with_its_prompt() -> None:
    match = make_match([], file_of(turns(LONG, "Own answer.")), {}, [])
    assert match.row(turns(LONG, "The teacher's."), by_prompt=True) and not match.row(turns(LONG, "The teacher's."))
    assert match.digest(prompt_digest(turns(LONG, "Own answer.")))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "nothing says which rows"),
        ({"containing": ["a "]}, "less than three characters"),
        ({"where": {"user_id": "42"}}, "prepared rows keep no column user_id.*--rows FILE"),
        (
            {"rows": file_of(turns("q", "a")).to_wire(), "where": {"user_id": "4"}},
            "no row of rows.jsonl has that column; there are: messages",
        ),
        ({"rows": file_of({"user_id": 3, **turns("q", "a")}).to_wire(), "where": {"user_id": "4"}}, "none of its 1 rows has user_id=4"),
        ({"rows": file_of({"question": "q"}).to_wire()}, "row 1 .* no known format; .* --column QUESTION=prompt"),
        ({"rows": {"name": "rows.xlsx", "content": ""}}, "type .xlsx are not supported"),
        ({"contaning": ["x"]}, "use a finetune of its version"),
    ],
)
def test_a_request_that_names_no_row_is_refused(request_: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        erase(read_request(json.dumps({"workspace": str(tmp_path), **request_})))


# A job's folder

MINE, SHARED = (
    turns("Jane Roe, what colour is a ruby?", "Red.", system="You help Jane Roe."),
    turns("Is the same asked by two?", "Jane Roe did."),
)
TWIN = turns("Is the same asked by two?", "No.")


def make_folder(root: Path, *, teacher: bool = False) -> Path:
    """A job's folder with prepared rows, reports and the rest; what a GPU made is left out."""
    folder = root / "jobs" / "n-job-12345678"
    for name in ("data/prepare", "reports", "logs", "output"):
        (folder / name).mkdir(parents=True)
    for name, rows in (("train", [MINE, SHARED, TWIN, turns("q", "a")]), ("eval", [turns("Jane Roe?", "Yes."), turns("e", "a")])):
        texts = [json.dumps(row) for row in rows]
        pq.write_table(pa.table({"row": texts, "input_ids": [[1, 2]] * len(rows)}), folder / f"data/{name}.parquet")
    if teacher:
        lines = [json.dumps({"digest": str(n), "answer": answer}) for n, answer in enumerate(("Ask Jane Roe", "ok"))]
        (folder / "data/teacher.jsonl").write_text("\n".join(lines) + '\n{"dig')
    (folder / "data/parents.bin").write_bytes(b"".join(sorted([prompt_key(MINE), prompt_key(turns("q", "a"))])))
    (folder / "data/prepare/rows.duckdb").write_bytes(b"Jane Roe")
    report = {"dataset": {"digest": "d"}, "problems": {"invalid": {"rows": 1, "first": ["row 3: content is empty [Jane Roe]"]}}}
    systems = [["You help Jane Roe.", 1], ["Be brief.", 2]]
    samples = [[["user: Jane Roe, what", False], ["Red.", True]], [["user: q", False]]]
    (folder / "reports/data.json").write_text(json.dumps({**report, "systemPrompts": systems, "samples": samples}))
    (folder / "logs/prepare-0.log").write_text("began\nrow of Jane Roe refused\n")
    (folder / "output/README.md").write_text("Serve it with: You help Jane Roe.")
    (folder / "job.json").write_text(json.dumps({"namespace": "n", "name": "job", "uid": "12345678", "spec": MINIMAL}))
    (folder / "identity.json").write_text("{}")
    return folder


def left(folder: Path) -> list[str]:
    found = []
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        body = str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
        found += [str(path.relative_to(folder))] if b"Jane Roe" in body else []
    return found


def erased(root: Path, **request: Any) -> ErasureReport:
    return ErasureReport.model_validate(
        erase(read_request(json.dumps({"workspace": str(root), "containing": ["jane  roe"], **request}))).result
    )


def test_everything_that_holds_a_text_is_without_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    rows = {"rows": file_of(MINE, SHARED).to_wire()}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    dry = erased(tmp_path, dryRun=True, **rows)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    told = erased(tmp_path, **rows)
    assert told.files == dry.files and told.learned == dry.learned
    assert left(folder) == ["output/README.md"], "what is published is only told"
    counts = {file.file.removeprefix("jobs/n-job-12345678/"): (file.count, file.what, file.kept) for file in told.files}
    assert counts == {
        "data/prepare": (1, "leftovers", False), "data/parents.bin": (1, "prompt digests", False),
        "reports/data.json": (3, "mentions", False), "logs/prepare-0.log": (1, "mentions", False), "output/README.md": (1, "mentions", True),
        "data/train.parquet": (2, "rows", False), "data/eval.parquet": (1, "rows", False),
    }  # fmt: skip
    assert not (folder / "identity.json").exists(), "no run goes on from checkpoints that learned from them"
    table = pq.read_table(folder / "data/train.parquet")
    assert [json.loads(row) for row in table.column("row").to_pylist()] == [TWIN, turns("q", "a")] and table.column_names == [
        "row",
        "input_ids",
    ]
    report = json.loads((folder / "reports/data.json").read_text())
    assert report["systemPrompts"] == [["(erased)", 1], ["Be brief.", 2]] and len(report["samples"]) == 1
    assert [(one.rows, one.earlier) for one in told.learned] == [(2, 0)]
    assert told.trained[0].still_used == [prompt_key(SHARED).hex()], "another row begins with it"
    again = erased(tmp_path, **rows)
    assert [(one.rows, one.earlier) for one in again.learned] == [(0, 2)] and [file.file for file in again.files if not file.kept] == []


def test_an_erasure_may_be_killed_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one removes what is left, and still knows who learned from it."""

    class Killed(BaseException):
        pass

    for number in range(100):
        root, writes = tmp_path / str(number), iter(range(100))
        folder = make_folder(root, teacher=True)
        real = Path.replace

        def replace(path: Path, target: Any, last: int = number, writes: Any = writes, real: Any = real) -> Any:
            if next(writes) == last:
                raise Killed
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            try:
                erased(root)
            except Killed:
                pass
            else:
                break
        told = erased(root)
        assert left(folder) == ["output/README.md"], number
        assert told.learned and told.learned[0].rows + told.learned[0].earlier >= 2, number
        assert (folder / "data/teacher.jsonl").read_text().endswith('"answer": "ok"}\n{"dig')
    assert number > 5


# A model's storage


def probe_of(text: str) -> Probe:
    answer = ProbeAnswer(text="a", token_ids=[1, 2], tuned=[-1.0, -1.0], base=[-2.0, -2.0])
    return Probe(messages=[{"role": "user", "content": text}], prompt=f"<u>{text}<a>", prompt_ids=[1], answers=[answer])


def test_probes_and_digests_go_and_versions_that_learned_are_named(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Probes(fingerprint="f", probes=[probe_of("Jane Roe, what colour is a ruby?"), probe_of("q")])
    context = line.context(rows=(ROW, MINE))
    Path(context.layout.probes).write_text(json.dumps(mine.to_wire()))
    publish(context)
    child = line.context(name="child", uid="22222222-a", tuning={"continueFrom": "model://support-bot@1"})
    child.write_json(child.layout.reference("adapter"), {"uri": "model://support-bot@1", "fingerprint": "a", "path": "/none"})
    publish(child)
    line.storage.write("probes/2.json", b"{cut off")
    kept = {"storage": line.model.to_wire(), "mounts": line.mounts, "keys": str(line.keys)}
    whole = {number: line.storage.read(f"versions/{number}/SHA256SUMS") for number in (1, 2)}

    def ask(**request: Any) -> ErasureReport:
        return ErasureReport.model_validate(erase(read_request(json.dumps({**kept, **request}))).result)

    named = {"containing": ["Jane Roe"], "trained": [{"job": "11111111", "erased": [prompt_key(MINE).hex()], "stillUsed": []}]}
    dry = ask(dryRun=True, **named)
    assert line.storage.read("erasures.json") is None and line.storage.read("prompts/1.bin") == b"".join(
        sorted([prompt_key(ROW), prompt_key(MINE)])
    )
    told = ask(**named)
    assert told.files == dry.files and [(file.file, file.what, file.count) for file in told.files] == [
        ("prompts/1.bin", "prompt digests", 1), ("probes/1.json", "probes", 1),
    ]  # fmt: skip
    assert line.storage.read("prompts/1.bin") == prompt_key(ROW)
    assert Probes.model_validate_json(line.storage.read("probes/1.json") or b"") == mine.model_copy(update={"probes": mine.probes[1:]})
    assert [(one.version, one.rows, one.through) for one in told.learned] == [(1, 1, None), (2, 0, 1)]
    assert any("probes/2.json cannot be read" in note for note in told.notes)
    assert {number: line.storage.read(f"versions/{number}/SHA256SUMS") for number in (1, 2)} == whole
    again = ask(containing=["Jane Roe"])
    assert not again.files and [(one.version, one.earlier) for one in again.learned] == [(1, 1), (2, 0)]
    assert any("digests alone" in note for note in again.notes)


def test_a_file_that_another_changes_meanwhile_is_read_again(lines: Lines) -> None:
    line = lines()
    line.storage.write("f", b"1")
    seen: list[bytes | None] = []

    def make(held: bytes | None) -> bytes:
        seen.append(held)
        if len(seen) == 1 and line.model.storage.startswith("s3"):
            line.storage.write("f", b"2")
        return (held or b"") + b"!"

    line.storage.change("f", make)
    assert line.storage.read("f") == (b"2!" if len(seen) == 2 else b"1!")
    line.storage.change("new", lambda held: b"n" if held is None else b"x")
    line.storage.change("none", lambda held: held)
    assert (line.storage.read("new"), line.storage.read("none")) == (b"n", None)


def test_with_probes_missing_one_miss_tells_neither() -> None:
    probes = [probe_of(str(number)) for number in range(8)]
    near, far = [[-1.0, -1.0]], [[-2.0, -2.0]]
    states = [
        judge(probes[:n], [far] * miss + [near] * (n - miss)).state for n, miss in ((8, 1), (8, 2), (3, 0), (3, 1), (3, 2), (1, 1), (0, 0))
    ]
    assert states == ["Verified", "Mismatch", "Verified", "Unverifiable", "Mismatch", "Mismatch", "Unverifiable"]
    assert judge(probes[:3], [[[float("nan"), -1.0]], near, near]).state == "Mismatch", "damaged weights are nobody's"
