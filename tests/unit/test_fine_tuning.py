"""OpenAI's fine-tuning API without any I/O: rows, requests, jobs made of them, and what a job's state is called there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.validation import parse_spec
from finetune_gateway.bodies import Refusal
from finetune_gateway.tuning import answers, events
from finetune_gateway.tuning.form import UploadForm
from finetune_gateway.tuning.jobs import ANNOTATION_REQUEST, ANNOTATION_TWIN, Job, Jobs, Twin, model_name, read_job
from finetune_gateway.tuning.manifest import Reading, TrainingFile, manifest_of, name_of, spec_of
from finetune_gateway.tuning.models import read_map
from finetune_gateway.tuning.requests import CreateJob, FilePage, Page, parse, parse_query
from finetune_gateway.tuning.rows import MESSAGES, PREFERENCE, PROMPTS, RowCheck
from finetune_trainer.data.formats import RowReader

UID = "0b5c1c8e-1f0b-4b6c-9d9e-2f6f3f1f7a10"
MAP = """
gpt-4o-mini:
  spec:
    model: {uri: hf://org/base}
    scheduling: {queue: research}
    tuning: {lora: {rank: 8}, hyperparameters: {learningRate: 1.0e-4}, tracking: {wandb: {project: all, secretRef: {name: wandb}}}}
    publish: [{model: support}]
  methods: [supervised, dpo, reinforcement]
  maxEpochs: 10
  maxRows: 1000
gpt-plain: {spec: {model: {uri: hf://org/plain}}}
"""
MODELS = read_map(MAP)
FILE = TrainingFile("file-1", "s3://files/x/team-a/sha256-1.jsonl", 20, MESSAGES)
READING = Reading("finetune-files", "http://minio:9000")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": [{"role": "assistant", "content": "c"}]}


def checked(*rows: Any, piece: int = 7) -> RowCheck:
    """A file of these rows, which comes in small pieces."""
    data = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    found = RowCheck()
    for start in range(0, len(data), piece):
        found.feed(data[start : start + piece])
    found.end()
    return found


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": TURNS}, MESSAGES),
        ({"messages": TURNS, "tools": [], "parallel_tool_calls": True}, MESSAGES),
        (PAIR, PREFERENCE),
        ({"messages": TURNS[:1], "answer": "4"}, PROMPTS),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
    ],
)
def test_good_rows(row: Any, form: str) -> None:
    found = checked(*[row] * 10)
    assert (found.problem, found.form, found.rows) == ("", form, 10)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"{", "line 3: is no JSON"),
        (b"[" * 100_000, "line 3: is nested too deeply"),
        (b"[]", "line 3: is no JSON object"),
        (b"\xff", "line 3: is no JSON"),
        ({}, "line 3: has the keys none"),
        ({"text": "a"}, "line 3: has the keys text"),
        ({"messages": TURNS, "colour": 1}, "line 3: has the unknown key 'colour'"),
        ({"messages": []}, "messages is no list of messages"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages[0].role is 'boss'"),
        ({"messages": [*TURNS, {"role": "assistant"}]}, "messages[2].content is missing"),
        ({"messages": TURNS[:1]}, "no assistant turn"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 2}]}, "weight is neither 0 nor 1"),
        ({"messages": [*TURNS, TURNS[0]]}, "ends with another turn"),
        (PAIR, "is a row of preference, and those before are of messages"),
    ],
)
def test_the_first_bad_row_is_named(row: Any, why: str) -> None:
    assert why in checked({"messages": TURNS}, b"", row, *[{"messages": TURNS}] * 12).problem


def test_bad_preferences_and_too_few_rows() -> None:
    same = {**PAIR, "non_preferred_output": PAIR["preferred_output"]}
    tools = {**PAIR, "input": {"messages": TURNS[:1], "tools": [{"type": "function"}]}}
    assert "are the same" in checked(*[same] * 10).problem and "input.tools" in checked(*[tools] * 10).problem
    assert checked(PAIR).problem == "the file has 1 row; at least 10 are needed"


def test_a_form_in_the_smallest_pieces() -> None:
    body = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
        b"a\r\n--C\r\nb\r\n--B--\r\n"
    )
    form = UploadForm("multipart/form-data; boundary=B")
    data = b"".join(piece for index in range(len(body)) for piece in form.feed(body[index : index + 1]))
    assert (data, form.fields, form.filename, form.ended) == (b"a\r\n--C\r\nb", {"purpose": "fine-tune"}, "rows.jsonl", True)
    for content_type in ("application/json", "multipart/form-data", ""):
        with pytest.raises(Refusal):
            UploadForm(content_type)
    with pytest.raises(Refusal, match="cannot be read"):
        list(UploadForm("multipart/form-data; boundary=B").feed(b"no form"))


def create(**fields: Any) -> CreateJob:
    return parse(CreateJob, {"model": "gpt-4o-mini", "training_file": "file-1", **fields})


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"colour": 1}, "colour", "unknown_parameter"),
        ({"model": None}, "model", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier", "invalid_value"),
        ({"hyperparameters": {"classification": 1}}, "hyperparameters.classification", "unknown_parameter"),
        ({"method": {"type": "ppo"}}, "method.type", "invalid_value"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta", "invalid_value"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "invalid_value"),
        ({"method": {"type": "reinforcement"}}, "method", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"suffix": "a:b"}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_value"),
        ({"integrations": [{"type": "comet", "wandb": {"project": "p"}}]}, "integrations[0].type", "invalid_value"),
    ],
)
def test_bad_requests_name_the_parameter(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(Refusal) as refused:
        create(**fields)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, code)


def test_queries() -> None:
    assert parse_query(Page, [("limit", "3"), ("after", "x")]) == Page(limit=3, after="x")
    for items in ([("limit", "0")], [("limit", "many")], [("colour", "1")], [("limit", "1"), ("limit", "2")]):
        with pytest.raises(Refusal):
            parse_query(FilePage, items)


def made(asked: CreateJob, file: TrainingFile = FILE, held_out: TrainingFile | None = None) -> dict[str, Any]:
    spec = spec_of(asked, MODELS, file, held_out, READING)
    parse_spec(spec)
    return spec


def test_a_supervised_job() -> None:
    wandb = [{"type": "wandb", "wandb": {"project": "mine"}}]
    spec = made(create(hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 2}, seed=7, integrations=wandb), held_out=FILE)
    source = {"uri": FILE.uri, "secretRef": {"name": "finetune-files"}, "s3Endpoint": "http://minio:9000"}
    assert spec["dataset"] == {"train": source, "eval": {"uri": FILE.uri}, "checks": {"minExamples": 10}}
    assert spec["tuning"]["hyperparameters"] == {"learningRate": 2e-4, "epochs": 2, "seed": 7}
    assert (spec["tuning"]["objective"], spec["tuning"]["lora"]) == ("sft", {"rank": 8})
    assert spec["tuning"]["tracking"]["wandb"] == {"project": "mine", "secretRef": {"name": "wandb"}}
    assert (spec["scheduling"], spec["publish"]) == ({"queue": "research"}, [{"model": "support"}])
    assert "wandb" not in str(made(create(model="gpt-plain")))
    assert MODELS.names["gpt-4o-mini"].spec["tuning"]["hyperparameters"] == {"learningRate": 1e-4}, "the map is not changed"


def test_a_dpo_job_has_a_rate_of_its_own() -> None:
    preferences = TrainingFile("file-2", FILE.uri, 20, PREFERENCE)
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "learning_rate_multiplier": 2}}}
    spec = made(create(model="gpt-plain", method=method), preferences)
    assert spec["tuning"] == {"objective": "dpo", "preference": {"beta": 0.2}, "hyperparameters": {"learningRate": 2e-5}}
    columns = {"input": "prompt", "preferred_output": "chosen", "non_preferred_output": "rejected"}
    assert (spec["dataset"]["format"], spec["dataset"]["columns"]) == ("preference", columns)


GRADER = {"type": "string_check", "name": "g", "input": "{{ sample.output_text }}", "reference": "{{item.solution}}", "operation": "eq"}


def reinforcement(**grader: Any) -> CreateJob:
    return create(method={"type": "reinforcement", "reinforcement": {"grader": {**GRADER, **grader}}})


def test_a_reinforcement_job() -> None:
    prompts = TrainingFile("file-3", FILE.uri, 20, PROMPTS)
    spec = made(reinforcement(), prompts)
    assert spec["tuning"]["grpo"] == {"rewards": [{"type": "exact-match"}]} and spec["tuning"]["objective"] == "grpo"
    assert spec["dataset"]["columns"] == {"messages": "prompt", "solution": "answer"}
    place = "method.reinforcement.grader"
    for grader, param in (
        ({"type": "python", "source": "x"}, f"{place}.type"),
        ({"type": "text_similarity"}, f"{place}.type"),
        ({"operation": "like"}, f"{place}.operation"),
        ({"input": "{{item.x}}"}, f"{place}.input"),
        ({"reference": "yes"}, f"{place}.reference"),
        ({"more": 1}, f"{place}.more"),
    ):
        with pytest.raises(Refusal) as refused:
            made(reinforcement(**grader), prompts)
        assert refused.value.param == param


def test_rows_as_openai_has_them_are_read_by_the_trainer() -> None:
    """By the format and the columns that the jobs get."""
    preferences, prompts = (TrainingFile("f", FILE.uri, 20, form) for form in (PREFERENCE, PROMPTS))
    for asked, file, row, read in (
        (
            create(method={"type": "dpo"}),
            preferences,
            {**PAIR, "input": {**PAIR["input"], "parallel_tool_calls": True}},
            {"prompt": TURNS[:1], "chosen": PAIR["preferred_output"], "rejected": PAIR["non_preferred_output"]},
        ),
        (reinforcement(), prompts, {"messages": TURNS[:1], "solution": "b"}, {"messages": TURNS}),
    ):
        dataset = made(asked, file)["dataset"]
        assert RowReader(dataset["format"], dataset["columns"]).read(row) == (read, set())


@pytest.mark.parametrize(
    ("asked", "file", "param", "status"),
    [
        (create(model="gpt-5"), FILE, "model", 404),
        (create(model="gpt-plain", method={"type": "reinforcement", "reinforcement": {"grader": GRADER}}), FILE, "method.type", 400),
        (create(method={"type": "dpo"}), FILE, "training_file", 400),
        (create(), TrainingFile("f", FILE.uri, 1001, MESSAGES), "training_file", 400),
        (create(hyperparameters={"n_epochs": 11}), FILE, "hyperparameters.n_epochs", 400),
        (create(model="gpt-plain", integrations=[{"type": "wandb", "wandb": {"project": "p"}}]), FILE, "integrations[0]", 400),
        (create(integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}]), FILE, "integrations[0].wandb.tags", 400),
    ],
)
def test_what_no_job_is_made_of(asked: CreateJob, file: TrainingFile, param: str, status: int) -> None:
    with pytest.raises(Refusal) as refused:
        made(asked, file)
    assert (refused.value.param, refused.value.status) == (param, status)
    assert param != "model" or "gpt-4o-mini" in refused.value.message


def test_a_batch_that_the_gang_cannot_share_is_named() -> None:
    models = read_map("m: {spec: {model: {uri: hf://o/b}, distribution: {nodes: 2}}}")
    with pytest.raises(Refusal) as refused:
        spec_of(create(model="m", hyperparameters={"batch_size": 3}), models, FILE, None, READING)
    assert refused.value.param == "hyperparameters.batch_size"


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "dpo", "gpt-plain"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_NUMBERS = st.dictionaries(st.sampled_from(["n_epochs", "batch_size", "learning_rate_multiplier", "beta"]), _VALUES | st.integers(1, 9))
_METHODS = st.fixed_dictionaries(
    {"type": st.sampled_from(["supervised", "dpo", "reinforcement"])},
    optional={
        "supervised": st.fixed_dictionaries({"hyperparameters": _NUMBERS}),
        "dpo": st.fixed_dictionaries({"hyperparameters": _NUMBERS}),
        "reinforcement": st.fixed_dictionaries({"grader": st.just(GRADER) | st.dictionaries(st.sampled_from([*GRADER]), _VALUES)}),
    },
)


@given(
    st.fixed_dictionaries(
        {"model": st.sampled_from(["gpt-plain", "gpt-4o-mini"]) | _VALUES, "training_file": st.just("file-1")},
        optional={
            "hyperparameters": _NUMBERS | _VALUES,
            "method": _METHODS | _VALUES,
            "suffix": _VALUES,
            "seed": _VALUES,
            "metadata": _VALUES,
            "integrations": _VALUES | st.just([{"type": "wandb", "wandb": {"project": "p"}}]),
            "validation_file": _VALUES,
        },
    ),
    st.sampled_from([MESSAGES, PREFERENCE, PROMPTS]),
)
@settings(max_examples=300, deadline=None)
def test_any_request_becomes_a_job_or_is_refused(raw: Any, form: str) -> None:
    """No other way out: what is not refused with a 4xx makes a valid job, which can be told again."""
    try:
        asked = parse(CreateJob, raw)
        spec = spec_of(asked, MODELS, TrainingFile("file-1", FILE.uri, 20, form), None, READING)
    except Refusal as refusal:
        assert 400 <= refusal.status < 500 and json.loads(refusal.body())["error"]["message"]
        return
    manifest = manifest_of("team-a", Twin("d", 0, "b", "a", False), asked, spec)
    manifest["metadata"] |= {"uid": UID, "creationTimestamp": "2026-11-29T10:00:00Z"}
    found = answers.job_object(read_job(json.dumps(manifest).encode()))
    assert found["status"] == "validating_files" and found["model"] == raw["model"]


@given(st.lists(st.binary(max_size=40) | _VALUES.map(lambda value: json.dumps({"messages": value, "x": value}).encode()), max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_file_is_read_to_its_end(lines: list[bytes]) -> None:
    assert checked(*lines).problem


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no names"),
        ("[", "is no YAML"),
        ("a: {spec: {}}", "a: spec.model: is required"),
        ("a: {spec: {model: {uri: x}}}", "did you mean hf://"),
        ("a: {spec: {model: {uri: hf://o/b}}, limit: 1}", "limit"),
        ("'ft:a': {spec: {model: {uri: hf://o/b}}}", "without a colon"),
        ("a: {spec: {model: {uri: hf://o/b}, evaluation: {}}}", "evaluation needs held-out rows"),
    ],
)
def test_a_model_map_that_is_none(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_map(text)


def test_names_of_jobs() -> None:
    """The same wish has the same name; the next one has another, and both are names that Kubernetes takes."""
    twin = Twin("d" * 64, 0, "b", "attempt", False)
    assert name_of(twin, "My model!") == name_of(Twin("d" * 64, 0, "c", "other", True), "My model!")
    assert name_of(twin, "My model!").startswith("my-model-") and name_of(twin, "7").startswith("ft-7-")
    assert name_of(twin, None) != name_of(Twin("d" * 64, 1, "b", "attempt", False), None)
    assert len(name_of(twin, "x" * 64)) <= 43


def job(status: dict[str, Any] | None = None, *, by_api: bool = True, **spec: Any) -> Job:
    asked = create(suffix="my bot", metadata={"team": "a"}, hyperparameters={"learning_rate_multiplier": 2})
    manifest = manifest_of("team-a", Twin("d", 0, "b", "a", False), asked, made(asked))
    if not by_api:
        manifest["metadata"]["annotations"] = {}
    manifest["metadata"] |= {"uid": UID, "creationTimestamp": "2026-11-29T10:00:00Z"}
    manifest["spec"] |= spec
    return read_job(json.dumps({**manifest, "status": status or {}}).encode())


@pytest.mark.parametrize("note", ["", "[", "{}", '{"model": 1}', '{"model": "m", "training_file": "f", "metadata": []}', "[" * 100_000])
def test_an_annotation_that_somebody_wrote_is_no_request(note: str) -> None:
    raw = {"metadata": {"name": "a", "namespace": "b", "uid": UID, "annotations": {ANNOTATION_REQUEST: note, ANNOTATION_TWIN: note}}}
    found = read_job(json.dumps(raw).encode())
    assert (found.request, found.twin) == ({}, None) and answers.job_object(found)["metadata"] == {}


def condition(type_: str, status: str = "True", reason: str = "Done", message: str = "") -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-11-29T10:05:00Z"}


@pytest.mark.parametrize(
    ("status", "policy", "told"),
    [
        ({}, {}, "validating_files"),
        ({"phase": "Preparing"}, {}, "validating_files"),
        ({"phase": "Queued"}, {}, "queued"),
        ({"phase": "Starting"}, {}, "queued"),
        ({"phase": "Training"}, {}, "running"),
        ({"phase": "Publishing"}, {}, "running"),
        ({"phase": "Training"}, {"suspend": True}, "queued"),
        ({"phase": "Suspended"}, {}, "queued"),
        ({"phase": "Training"}, {"cancel": True}, "cancelled"),
        ({"phase": "Failed", "conditions": [condition("Failed", reason="Cancelled")]}, {}, "cancelled"),
        ({"phase": "Failed", "conditions": [condition("Failed", reason="InvalidRows")]}, {}, "failed"),
        ({"phase": "Succeeded", "conditions": [condition("Succeeded")]}, {"cancel": True}, "succeeded"),
    ],
)
def test_statuses(status: dict[str, Any], policy: dict[str, Any], told: str) -> None:
    assert answers.status_of(job(status, runPolicy=policy)) == told


PROGRESS = {"step": 10, "totalSteps": 40, "epoch": 2.5, "loss": 1.25, "evalLoss": 1.5, "eta": "3m10s", "reportedAt": "2026-11-29T10:10:00Z"}


def test_a_running_job_says_when_it_ends() -> None:
    found = answers.job_object(job({"phase": "Training", "progress": PROGRESS}))
    assert found["estimated_finish"] == answers.unix("2026-11-29T10:13:10Z") and found["finished_at"] is None
    assert (found["model"], found["training_file"], found["metadata"]) == ("gpt-4o-mini", "file-1", {"team": "a"})
    assert found["hyperparameters"] == {"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 2}
    assert (found["id"], found["organization_id"], found["fine_tuned_model"]) == ("ftjob-" + UID.replace("-", ""), "team-a", None)


ENDED = {
    "phase": "Succeeded",
    "conditions": [condition("DataReady"), condition("Running"), condition("Succeeded")],
    "startedAt": "2026-11-29T10:01:00Z",
    "finishedAt": "2026-11-29T11:00:00Z",
    "progress": PROGRESS,
    "dataset": {"train": 20, "tokens": 1000},
    "checkpoint": {"step": 10, "savedAt": "2026-11-29T10:10:01Z"},
    "artifacts": [{"uri": "model://support", "digest": "sha256:1", "bytes": 1, "model": "support", "version": 4}],
}


def test_an_ended_job_has_a_name_tokens_and_results() -> None:
    ended = job(ENDED)
    found = answers.job_object(ended)
    assert found["fine_tuned_model"] == "ft:gpt-4o-mini:team-a:my-bot:0b5c1c8e1f0b"
    assert (found["trained_tokens"], found["finished_at"]) == (2500, answers.unix("2026-11-29T11:00:00Z"))
    assert found["result_files"] == [answers.results_id(ended)] and found["error"] is None
    assert str(answers.resolve(ended)) == "team-a/support@4"
    jobs = Jobs()
    jobs.put(ended)
    assert jobs.named(found["fine_tuned_model"]) is ended and jobs.find("team-a", ended.id) is ended
    for other in ("ft:gpt-4o-mini:team-b:my-bot:0b5c1c8e1f0b", "0b5c1c8e1f0b", "ft:"):
        assert jobs.named(other) is None
    for namespace, identifier in (("team-b", ended.id), ("team-a", UID), ("team-a", "ftjob-" + "0" * 32), ("team-a", "ftjob-../x")):
        assert jobs.find(namespace, identifier) is None
    jobs.drop(ended)
    assert jobs.named(found["fine_tuned_model"]) is None and jobs.of("team-a") == []


def test_a_job_of_kubectl_appears_too() -> None:
    found = answers.job_object(job({"conditions": [condition("Failed", reason="InvalidRows", message="line 3")]}, by_api=False))
    assert (found["model"], found["training_file"], found["metadata"]) == ("base", FILE.uri, {})
    assert found["error"] == {"code": "InvalidRows", "message": "line 3", "param": "training_file"}
    later = job({"conditions": [condition("DataReady"), condition("Failed", reason="OutOfMemory")]})
    assert answers.job_object(later)["error"]["param"] is None
    broken = read_job(json.dumps({"metadata": {"name": "a", "namespace": "b", "uid": UID}, "spec": 1, "status": 2}).encode())
    assert answers.job_object(broken)["status"] == "validating_files"


def test_the_history_of_a_job() -> None:
    ended = job(ENDED)
    found = events.events_of(ended)
    told = [event.message for event in found]
    assert told == [
        f"Created fine-tuning job: {ended.id}",
        "Validating training file: file-1",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "New fine-tuned model created: " + model_name(ended),
        "The job has successfully completed",
        "Step 10/40: training loss=1.25, validation loss=1.5",
        "Checkpoint created at step 10",
    ]
    assert [event.id for event in found] == [event.id for event in events.events_of(ended)], "who looks twice sees the same"
    metrics = found[-2].to_wire()
    assert (metrics["type"], metrics["data"]["train_loss"], metrics["data"]["total_steps"]) == ("metrics", 1.25, 40)
    assert events.table_of(found).splitlines()[1].startswith("10,1.25,1.5,")
    assert events.checkpoint_of(ended, found[-1], {"train_loss": 1.0})["metrics"] == {"step": 10, "train_loss": 1.0}


def test_what_happens_on_the_way_is_told() -> None:
    restart = {"attempt": 0, "reason": "NonFiniteLoss", "message": "at step 3", "time": "2026-11-29T10:06:00Z"}
    status = {
        "conditions": [condition("Suspended", reason="Suspended", message="by runPolicy"), condition("Failed", reason="Cancelled")],
        "restarts": [restart],
        "queue": {"name": "research", "message": "1 GPU is free, 2 are needed", "since": "2026-11-29T10:04:00Z"},
    }
    found = {event.message: event.level for event in events.events_of(job(status))}
    assert found["The job is paused: by runPolicy"] == "info" and found["The job has been cancelled"] == "info"
    assert found["Attempt 0 ended: NonFiniteLoss: at step 3"] == "warn" and "Waiting: 1 GPU is free, 2 are needed" in found
