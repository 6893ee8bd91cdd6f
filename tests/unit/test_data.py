"""Formats, mixtures, near duplicates, leakage, reports, hostile files and templates (cases A4, A5, A7, A8, A22, F34)."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.data import reading
from finetune_trainer.data.formats import FORMATS, RowReader
from finetune_trainer.data.scan import Scan, scan_rows
from finetune_trainer.data.sensitive import findings
from finetune_trainer.data.shape import BadRow
from finetune_trainer.data.store import read_rows
from finetune_trainer.data.tokens import IGNORED, RowTokenizer
from finetune_trainer.process.errors import StageError, UserError
from finetune_trainer.stages.prepare import prepare
from tests.unit.test_prepare import Desk, chat, desk, lines, rows

__all__ = ["desk"]

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("format_", "row", "shape"),
    [
        ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3"}, {"messages": [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Ho"}, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}),
        (
            "sharegpt",
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
        (
            "messages",
            {"tools": TOOLS, "messages": [{"role": "user", "content": "1+?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "name": "add", "content": "2"}, {"role": "assistant", "content": "two"}]},
            {"tools": TOOLS, "messages": [{"role": "user", "content": "1+?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2", "name": "add"}, {"role": "assistant", "content": "two"}]},
        ),
        ("messages", {"messages": json.dumps(chat("a", "b")["messages"])}, chat("a", "b")),
        ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "r"}),
        (
            "preference",
            {"chosen": chat("q", "good")["messages"], "rejected": chat("q", "bad")["messages"]},
            {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "good"}], "rejected": [{"role": "assistant", "content": "bad"}]},
        ),
        ("unpaired-preference", {"prompt": "p", "completion": "c", "label": "False"}, {"prompt": "p", "completion": "c", "label": False}),
        ("prompt-only", {"prompt": "p"}, {"prompt": "p"}),
    ],
)  # fmt: skip
def test_common_shapes(format_: str, row: dict[str, Any], shape: dict[str, Any]) -> None:
    assert FORMATS[format_].normalize(row) == shape


@pytest.mark.parametrize(
    ("format_", "row", "problem"),
    [
        ("alpaca", {"instruction": "", "output": "x"}, "instruction is empty"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien' is not one of human"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}]}, "turn 1 is of assistant, expected user"),
        ("preference", {"prompt": "p", "chosen": "x", "rejected": "x"}, "there is nothing to prefer"),
        ("preference", {"chosen": chat("a")["messages"], "rejected": chat("b")["messages"]}, "share no prompt"),
        ("unpaired-preference", {"prompt": "p", "completion": "c", "label": 2}, "label is 2; write true"),
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "user", "content": "b"}]}, "expected tool"),
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "arguments is text, and no JSON"),
        ("messages", {"messages": [{"role": "user", "content": "a\x00"}]}, "NUL character"),
        ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ("prompt-only", {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with the assistant"),
    ],
)  # fmt: skip
def test_a4_rows_that_are_wrong(format_: str, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        FORMATS[format_].normalize(row)


def test_the_example_of_every_format_is_of_that_format() -> None:
    from finetune_trainer.data.formats import looks_like

    for name, kind in FORMATS.items():
        row = json.loads(kind.example.replace("...", "x", 2).replace("...", "y"))
        assert looks_like(row) == name
        kind.normalize(row)


def parquet(items: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(items), sink)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train.parquet", parquet(rows(12))),
        ("train.jsonl.gz", gzip.compress(lines(rows(12)))),
        ("train.json.gz", gzip.compress(json.dumps(rows(12)).encode())),
        ("train.csv.gz", gzip.compress(("instruction,output\n" + "".join(f"what {i},yes\n" for i in range(12))).encode())),
    ],
)
def test_more_file_types(desk: Desk, name: str, data: bytes) -> None:
    assert desk.run(data, name=name).result["dataset"]["train"] == 12


def test_a_folder_of_shards(desk: Desk) -> None:
    folder = desk.folder / "rows" / "shards"
    folder.mkdir()
    for index in range(3):
        (folder / f"part-{index}.jsonl").write_bytes(lines([chat(f"{index} {i}") for i in range(4)]))
    assert desk.run(None, dataset={"train": {"uri": "pvc://rows/shards"}}).result["dataset"]["train"] == 12
    (folder / "more.csv").write_text("prompt,completion\n")
    with pytest.raises(UserError, match="files of several types"):
        desk.run(None, dataset={"train": {"uri": "pvc://rows/shards"}})
    (folder / "more.csv").unlink()
    secret = desk.folder / "secret.jsonl"
    secret.write_bytes(lines(rows(3)))
    (folder / "link.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match="leads out of it"):
        desk.run(None, dataset={"train": {"uri": "pvc://rows/shards"}})


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("train.zip", b"PK", "DatasetType"),
        ("train.tar.gz", b"", "DatasetType"),
        ("train.jsonl.gz", b"no gzip", "DatasetNotGzip"),
        ("train.jsonl.gz", gzip.compress(lines(rows(99)))[:-20], "DatasetNotGzip"),
        ("train.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * (120 << 20) + b'"}\n'), "DecompressionBomb"),
    ],
    ids=["zip", "tar", "no gzip", "cut gzip", "bomb"],
)  # fmt: skip
def test_a5_archives_and_bombs(desk: Desk, name: str, data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "EXPANSION_LIMIT", 100)
    with pytest.raises(UserError) as refused:
        desk.run(data, name=name)
    assert refused.value.reason == reason


def test_a_mixture_with_weights(desk: Desk) -> None:
    (desk.folder / "rows" / "more.jsonl").write_bytes(lines([{"instruction": f"more {i}", "output": "no"} for i in range(40)]))
    (desk.folder / "rows" / "half.jsonl").write_bytes(lines([chat(f"half {i}", "no") for i in range(200)]))
    mix = [{"uri": "pvc://rows/more.jsonl", "weight": 3}, {"uri": "pvc://rows/half.jsonl", "weight": 0.5}]
    result = desk.run(lines(rows(10)), dataset={"mix": mix, "eval": {"splitFraction": 0.1}})
    written = [
        json.loads(r)["messages"][0]["content"] for r in (e["row"] for e in read_rows(desk.context(None).layout.train_rows, ["row"], 10**6))
    ]
    counts = {kind: sum(text.startswith(kind) for text in written) for kind in ("what", "more", "half")}
    assert result.result["dataset"]["train"] == len(written)
    assert counts["more"] % 3 == 0 and len({t for t in written if t.startswith("more")}) == counts["more"] / 3
    assert 60 <= counts["half"] <= 120
    held_out = {e["row"] for e in read_rows(desk.context(None).layout.eval_rows, ["row"], 10**6)}
    assert not held_out & {e["row"] for e in read_rows(desk.context(None).layout.train_rows, ["row"], 10**6)}
    again = desk.run(None, dataset={"mix": mix, "eval": {"splitFraction": 0.1}})
    assert again.result == result.result


STORY = " ".join(f"word{i}" for i in range(150))


def near(count: int) -> list[dict[str, Any]]:
    """Rows that differ in one word of many."""
    return [chat(f"{STORY} number{i}", "a long answer that is the same for every one of these rows indeed") for i in range(count)]


def test_near_duplicates(desk: Desk) -> None:
    data = lines([*rows(20), *near(5)])
    reported = desk.run(data)
    assert reported.result["dataset"]["warnings"]["nearDuplicate"] == 4
    dropped = desk.run(data, dataset={"checks": {"minExamples": 1, "nearDuplicates": "drop"}})
    assert dropped.result["dataset"]["dropped"]["nearDuplicate"] == 4 and dropped.result["dataset"]["train"] == 21
    with pytest.raises(UserError, match=r"4 row\(s\): train row 22 \(train.jsonl:22\): nearly the same as train row 21"):
        desk.run(data, dataset={"checks": {"minExamples": 1, "nearDuplicates": "fail"}})
    ignored = desk.run(data, dataset={"checks": {"minExamples": 1, "nearDuplicates": "ignore", "nearLeakage": "ignore"}})
    assert "nearDuplicate" not in ignored.result["dataset"].get("warnings", {})


def test_near_leakage(desk: Desk) -> None:
    (desk.folder / "rows" / "eval.jsonl").write_bytes(lines([near(1)[0], *[chat(f"other {i}") for i in range(5)]]))
    data, dataset = lines([*rows(20), *near(3)[1:]]), {"eval": {"uri": "pvc://rows/eval.jsonl"}}
    assert desk.run(data, dataset=dataset).result["dataset"]["warnings"]["nearLeaked"] == 2
    with pytest.raises(UserError, match=r"train row 21 \(train.jsonl:21\): is nearly eval row 1"):
        desk.run(data, dataset={**dataset, "checks": {"minExamples": 1, "nearLeakage": "fail"}})
    left = desk.run(data, dataset={**dataset, "checks": {"minExamples": 1, "nearLeakage": "drop", "nearDuplicates": "ignore"}})
    assert left.result["dataset"]["train"] == 20


def test_sensitive_data_is_reported_and_kept(desk: Desk) -> None:
    private = [chat("my key is AKIAIOSFODNN7EXAMPLE"), chat("write to jane.doe@example.org please")]
    result = desk.run(lines([*rows(10), *private]))
    assert result.result["dataset"]["train"] == 12 and result.result["dataset"]["warnings"]["sensitive"] == 2
    report = Path(desk.context(None).layout.data_report).read_text()
    assert "awsKey" in report and "train row 11" in report
    assert "AKIAIOSFODNN7EXAMPLE" not in json.dumps(json.loads(report)["problems"]), "the finding itself is not repeated"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("-----BEGIN RSA PRIVATE KEY-----", ("privateKey",)),
        ("ghp_" + "a" * 36, ("githubToken",)),
        ("card 4111 1111 1111 1111", ("paymentCard",)),
        ("number 4111 1111 1111 1112", ()),
        ("IBAN DE89 3704 0044 0532 0130 00", ("iban",)),
        ("DE00 3704 0044 0532 0130 00", ()),
        ("call +49 30 1234 5678", ("phone",)),
        ("password: hunter2hunter2", ("password",)),
        ("nothing here, 12 apples", ()),
    ],
)  # fmt: skip
def test_what_looks_sensitive(text: str, found: tuple[str, ...]) -> None:
    assert findings([text]) == found


def test_the_report_for_people(desk: Desk) -> None:
    items = [
        *rows(30),
        chat("<script>alert(1)</script>"),
        {"messages": [{"role": "system", "content": "be kind"}, *chat("what is one 99")["messages"]]},
    ]
    desk.run(lines([*items, rows(1)[0]]), dataset={"eval": {"splitFraction": 0.1}})
    layout = desk.context(None).layout
    report, page = json.loads(Path(layout.data_report).read_text()), Path(layout.data_page).read_text()
    assert report["problems"]["duplicate"]["rows"] == 1 and report["dataset"]["dropped"] == {"duplicate": 1}
    assert report["dataset"]["warnings"]["otherSystemPrompt"] == 1
    assert sum(count for _, count in report["lengths"]["bins"]) == report["dataset"]["train"]
    assert "<mark>" in page and "<svg" in page and "System prompts differ" in page
    assert "<script>" not in page
    assert report["plan"]["worldSize"] == 1 and report["sources"][0]["reason"] == "rows have 'messages'"


def test_other_languages_are_noticed(desk: Desk) -> None:
    german = "Der schnelle braune Fuchs springt über den faulen Hund und läuft durch den grünen Wald bis die Nacht kommt Nummer"
    english = "The quick brown fox jumps over the lazy dog and runs through the green forest until the night comes number"
    items = [chat(f"{english} {i}", "This is a perfectly normal English answer.") for i in range(18)]
    items += [chat(f"{german} {i}", "Das ist eine ganz normale deutsche Antwort.") for i in range(6)]
    assert desk.run(lines(items)).result["dataset"]["warnings"]["otherLanguageInSample"] == 6


def test_a_missing_chat_template_is_an_error_with_a_proposal(desk: Desk) -> None:
    bare = desk.folder / "bare" / "tiny"
    shutil.copytree(desk.model, bare)
    (bare / "chat_template.jinja").unlink()
    context = desk.context(lines(rows(9)))
    context.job.sources["pvc://models"] = str(bare.parent)
    with pytest.raises(UserError, match=r"has no chat template.*tuning.chatTemplate.*eos_token"):
        prepare(context)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "ChatTemplateTooSlow"),
        ("{% for a in range(90000) %}" + "x" * 50 + "{% endfor %}", "ChatTemplateTooLarge"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "ChatTemplateFailed"),
        ("{{ ''.__class__.__mro__ }}", "InvalidRows"),
        ("{{ messages[0].missing.deeper }}", "InvalidRows"),
        ("{% if messages", "InvalidRows"),
        ("{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}", "NoTurnEnd"),
    ],
)
def test_a22_hostile_templates(desk: Desk, template: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.data import chat_template

    monkeypatch.setattr(chat_template, "_RENDER_SECONDS", 0.5)
    with pytest.raises(UserError) as refused:
        desk.run(lines(rows(9)), tuning={"chatTemplate": template})
    assert refused.value.reason == reason, refused.value


def test_a7_a_model_that_brings_code_is_refused(desk: Desk) -> None:
    coded = desk.folder / "coded" / "tiny"
    shutil.copytree(desk.model, coded)
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    (coded / "evil.py").write_text("raise SystemExit('ran')")
    context = desk.context(lines(rows(9)))
    context.job.sources["pvc://models"] = str(coded.parent)
    with pytest.raises(UserError, match=r"config.json: auto_map.*trustRemoteCode: true; an administrator"):
        prepare(context)


def test_a8_pickled_weights_are_refused(desk: Desk) -> None:
    pickled = desk.folder / "pickled" / "tiny"
    shutil.copytree(desk.model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    context = desk.context(lines(rows(9)))
    context.job.sources["pvc://models"] = str(pickled.parent)
    with pytest.raises(UserError, match=r"must be .safetensors files; it has pytorch_model.bin, which can run code"):
        prepare(context)


def test_f34_the_prepared_rows_are_what_trains(desk: Desk) -> None:
    """The source changes after prepare: the rows in the workspace and their digest do not."""
    result = desk.run(lines(rows(20)))
    context = desk.context(lines([chat("changed")] * 20))
    kept = [e["row"] for e in read_rows(context.layout.train_rows, ["row"], 100)]
    assert len(kept) == 20 and not any("changed" in row for row in kept)
    assert desk.run(lines(rows(20))).result["dataset"]["digest"] == result.result["dataset"]["digest"]
    assert desk.run(lines(rows(19))).result["dataset"]["digest"] != result.result["dataset"]["digest"]


def test_many_processes_give_the_same_rows_in_the_same_order(desk: Desk) -> None:
    from transformers import AutoTokenizer

    row_tokenizer = RowTokenizer(AutoTokenizer.from_pretrained(desk.model), max_length=64, assistant_only=True)
    scan = Scan(row_tokenizer, RowReader("messages", {}), True)
    items = [reading.Row(i, raw=json.dumps(chat(f"what {i}")).encode()) for i in range(5000)]
    alone = [row for chunk in scan_rows(scan, items, processes=1) for row in chunk]
    together = [row for chunk in scan_rows(scan, items, processes=3) for row in chunk]
    assert alone == together and [row.number for row in together] == list(range(5000))

    def broken() -> Any:
        yield from items
        raise UserError("DatasetNotUTF8", "halfway")

    with pytest.raises(UserError, match="halfway"):
        list(scan_rows(scan, broken(), processes=2))


def test_tool_calls_are_learned_and_tool_results_are_not(desk: Desk) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + (m['tool_calls'][0]['function'] | tojson if m['tool_calls'] else '') + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    row = FORMATS["messages"].normalize(
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "red"}, {"role": "assistant", "content": "two"}]}
    )  # fmt: skip
    columns, _ = RowTokenizer(tokenizer, max_length=64, assistant_only=True)(row)
    learned = tokenizer.decode([t for t, label in zip(columns["input_ids"], columns["labels"], strict=True) if label != IGNORED])
    assert learned == '{"name": "add", "arguments": {"a": 1}}<|end|>two<|end|>'


_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
_ANY = st.recursive(
    _LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)), max_leaves=8
)
_TURN = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool", "x", 1]), "content": _ANY, "tool_calls": _ANY, "from": st.sampled_from(["human", "gpt", "?"]), "value": _ANY}
)  # fmt: skip
_COLUMN = st.sampled_from(
    [
        "messages",
        "prompt",
        "completion",
        "text",
        "instruction",
        "input",
        "output",
        "conversations",
        "chosen",
        "rejected",
        "label",
        "tools",
        "system",
    ]
)
_ROW = st.dictionaries(_COLUMN, st.one_of(_ANY, st.lists(_TURN, max_size=3)), max_size=4)
_LINE = st.one_of(
    st.binary(max_size=60),
    _ROW.map(lambda row: json.dumps(row).encode()),
    st.integers(0, 30).map(lambda i: json.dumps(chat(f"what is {i}")).encode()),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_LINE, max_size=12), st.sampled_from(["train.jsonl", "train.json", "train.csv", "train.parquet", "train.jsonl.gz"]), st.sampled_from(["fail", "drop"]), st.sampled_from(["sft", "dpo", "kto", "pretrain"]))  # fmt: skip
def test_fuzzed_files_never_show_a_stack_trace(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, content: list[bytes], name: str, policy: str, objective: str
) -> None:
    """Whatever stands in a file: prepare ends with a result, or with a reason and a message for people."""
    bench = Desk(tmp_path_factory.mktemp("fuzz"), tiny_model)
    data = b"\n".join(content)
    data = gzip.compress(data) if name.endswith(".gz") else data
    try:
        result = bench.run(data, name=name, dataset={"checks": {"minExamples": 1, "invalidRows": policy}}, tuning={"objective": objective})
        assert result.result["dataset"]["train"] >= 1
    except StageError as failure:
        assert failure.code == 10 and failure.reason[0].isupper() and 10 < len(failure.message) < 4000, failure


def test_a_workspace_with_a_quote_in_its_path(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "it's").mkdir()
    assert Desk(tmp_path / "it's", tiny_model).run(lines(rows(12))).result["dataset"]["train"] == 12


def test_a_row_with_several_findings_counts_once(desk: Desk) -> None:
    result = desk.run(lines([*rows(10), chat("AKIAIOSFODNN7EXAMPLE of jane.doe@example.org")]))
    assert result.result["dataset"]["warnings"]["sensitive"] == 1
