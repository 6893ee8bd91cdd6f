"""Bad input is refused with the path, the value and the fix (cases A1, A2, A6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.scalars import human_duration, seconds
from finetune_api.uris import URI, parse_uri
from finetune_api.validation import InvalidDocument, parse_job, parse_spec
from finetune_cli.documents import read_jobs
from tests.factory import FULL, MINIMAL, merged

EVAL = {"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}}
HUGE = 10**12

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("manager without a domain", {"managedBy": "multikueue"}, '"multikueue" is not a domain-prefixed path; write for example'),
    ("unknown field", {"tunning": {}}, "spec.tunning: unknown field; did you mean 'tuning'?"),
    ("snake case", {"tuning": {"hyperparameters": {"learning_rate": 1e-4}}}, "did you mean 'learningRate'?"),
    ("wrong type", {"distribution": {"nodes": "two"}}, "spec.distribution.nodes: 'two'"),
    ("number as a string", {"tuning": {"hyperparameters": {"learningRate": "2e-4"}}}, "spec.tuning.hyperparameters.learningRate: '2e-4'"),
    ("misspelt enum", {"tuning": {"method": "lorra"}}, "did you mean 'lora'?"),
    ("negative", {"distribution": {"nodes": -1}}, "spec.distribution.nodes: -1: input should be greater than or equal to 1"),
    ("huge", {"tuning": {"hyperparameters": {"globalBatchSize": HUGE}}}, "less than or equal to 1000000"),
    ("NaN", {"tuning": {"hyperparameters": {"learningRate": float("nan")}}}, "finite number"),
    ("infinity", {"tuning": {"hyperparameters": {"epochs": float("inf")}}}, "finite number"),
    ("bool as a number", {"distribution": {"nodes": True}}, "spec.distribution.nodes: True"),
    ("missing", {"model": {}}, "spec.model.uri: is required"),
    (
        "file scheme",
        {"model": {"uri": "file:///etc/passwd"}},
        "is not a model URI; write hf://ORG/MODEL[@REVISION], pvc://CLAIM/PATH, s3://BUCKET/PREFIX, oci://HOST/REPOSITORY[:TAG] or mlflow://HOST/MODEL[@ALIAS]",
    ),
    ("no scheme", {"model": {"uri": "org/model"}}, '"org/model" has no scheme; did you mean hf://org/model?'),
    ("no scheme of rows", {"dataset": {"train": {"uri": "org/rows"}}}, "did you mean hf://org/rows?"),
    ("path traversal", {"model": {"uri": "pvc://models/../secret"}}, "spec.model.uri"),
    ("shell characters", {"model": {"uri": "hf://org/$(id)"}}, "spec.model.uri"),
    ("credentials in a uri", {"dataset": {"train": {"uri": "hf://user:pass@host/x"}}}, "spec.dataset.train.uri"),
    ("publish to a whole volume", {"publish": [{"uri": "pvc://published"}]}, "pvc://CLAIM/PATH, hf://ORG/MODEL, s3://BUCKET/PREFIX, oci:"),
    ("publish nowhere", {"publish": [{}]}, "publish takes uri or model"),
    ("publish to two at once", {"publish": [{"uri": "pvc://c/p", "model": "m"}]}, "publish takes uri or model"),
    ("a Secret beside a model", {"publish": [{"model": "m", "secretRef": {"name": "s"}}]}, "take no secretRef"),
    ("plain HTTP to a bucket", {"publish": [{"uri": "hf://o/m", "secretRef": {"name": "s"}, "plainHTTP": True}]}, "plainHTTP is only used"),
    ("plain HTTP to the hub", {"model": {"uri": "hf://o/m", "plainHTTP": True}}, "model.plainHTTP is only used"),
    ("a Secret without an adapter", {"tuning": {"continueFromSecretRef": {"name": "s"}}}, "continueFromSecretRef is only used with"),
    (
        "a Secret for a volume's adapter",
        {"tuning": {"continueFrom": "pvc://a/b", "continueFromSecretRef": {"name": "s"}}},
        "only used with an hf",
    ),
    ("an endpoint for no bucket", {"tuning": {"continueFrom": "hf://a/b", "continueFromS3Endpoint": "https://m"}}, "only used with an s3"),
    (
        "plain HTTP to a bucket's adapter",
        {"tuning": {"continueFrom": "s3://abc/b", "continueFromPlainHTTP": True}},
        "only used with an oci",
    ),
    ("duration", {"checkpoint": {"every": "10 minutes"}}, '"10 minutes" is not a duration; write for example 90s'),
    ("full with lora settings", {"tuning": {"method": "full", "lora": {"rank": 8}}}, "remove tuning.lora or set method to lora"),
    (
        "qlora with sharding",
        {"tuning": {"method": "qlora"}, "distribution": {"strategy": "deepspeed-zero3"}},
        "this tuning.method does not shard",
    ),
    (
        "gate on a metric that is not computed",
        {"dataset": EVAL, "evaluation": {"gate": {"metric": "exact-match"}}},
        "add it there or gate on",
    ),
    ("minImprovement over 1", {"dataset": EVAL, "evaluation": {"gate": {"minImprovement": 1.5}}}, "less than or equal to 1"),
    ("evaluation without held-out rows", {"evaluation": {}}, "set dataset.eval.splitFraction"),
    (
        "two ways to hold out",
        {"dataset": {**EVAL, "eval": {"splitFraction": 0.1, "uri": "pvc://a/b"}}},
        "exactly one of splitFraction and uri",
    ),
    ("more than there are", {"distribution": {"nodes": 2, "minNodes": 3}}, "distribution.minNodes is more than"),
    ("offload without DeepSpeed", {"distribution": {"offload": "optimizer"}}, "offload needs distribution.strategy"),
    (
        "offload of parameters",
        {"distribution": {"offload": "parameters", "strategy": "deepspeed-zero2"}},
        "needs distribution.strategy deepspeed-zero3",
    ),
    ("batch over processes", {"distribution": {"nodes": 3, "gpusPerNode": 0}}, "must be a multiple of the number of processes"),
    (
        "batch over device batch",
        {"distribution": {"gpusPerNode": 0, "perDeviceBatchSize": 3}},
        "multiple of distribution.perDeviceBatchSize",
    ),
    ("secret without hub", {"model": {"uri": "pvc://m/x", "secretRef": {"name": "s"}}}, "model.secretRef is not used with a pvc:// uri"),
    ("hub target without secret", {"publish": [{"uri": "hf://org/m"}]}, "needs secretRef with a write token"),
    (
        "secret of another namespace",
        {"model": {"uri": "hf://a/b", "secretRef": {"name": "s", "namespace": "x"}}},
        "namespace: unknown field",
    ),
    ("all-linear beside names", {"tuning": {"lora": {"targetModules": ["all-linear", "q_proj"]}}}, "'all-linear' stands alone"),
    (
        "metric twice",
        {"dataset": EVAL, "evaluation": {"metrics": ["loss", "loss"]}},
        "spec.evaluation.metrics: lists 'loss' twice; remove one",
    ),
    ("both workspaces", {"workspace": {"persistentVolumeClaim": {"claimName": "w"}, "template": {}}}, "not both; remove one"),
    (
        "one-node volume for two nodes",
        {"distribution": {"nodes": 2, "gpusPerNode": 0}, "workspace": {"template": {"accessMode": "ReadWriteOnce"}}},
        "ReadWriteOnce allows one node",
    ),
    ("partial settings without it", {"tuning": {"partial": {"lastLayers": 1}}}, "remove tuning.partial or set method to partial"),
    ("partial that learns nothing", {"tuning": {"method": "partial", "partial": {"lastLayers": 0}}}, "leaves nothing to learn"),
    ("virtual tokens without them", {"tuning": {"virtualTokens": {"count": 5}}}, "tuning.virtualTokens has no effect"),
    ("prompt tuning with dpo", {"tuning": {"method": "prompt", "objective": "dpo"}}, "set method to lora for this objective"),
    ("continueFrom with full", {"tuning": {"method": "full", "continueFrom": "pvc://a/b"}}, "set model.uri to the earlier model"),
    ("continueFrom with settings", {"tuning": {"lora": {"rank": 8}, "continueFrom": "pvc://a/b"}}, "remove tuning.lora"),
    ("preference settings with sft", {"tuning": {"preference": {"beta": 0.2}}}, "tuning.preference has no effect"),
    ("grpo without rewards", {"tuning": {"objective": "grpo"}}, "set tuning.grpo.rewards"),
    ("reward without its pattern", {"tuning": {"objective": "grpo", "grpo": {"rewards": [{"type": "regex"}]}}}, "type regex takes pattern"),
    (
        "answers that do not fill groups",
        {"tuning": {"objective": "grpo", "grpo": {"rewards": [{"type": "exact-match"}], "generations": 5}}},
        "make it a multiple of tuning.grpo.generations",
    ),
    ("distill without teacher", {"tuning": {"objective": "distill"}}, "set tuning.distillation.teacher"),
    ("two teachers", {"tuning": {"objective": "distill", "distillation": {}}}, "exactly one of teacher and endpoint"),
    (
        "logits of an endpoint",
        {"tuning": {"objective": "distill", "distillation": {"endpoint": {"url": "http://v/v1", "model": "m"}}}},
        "an endpoint gives no logits",
    ),
    ("packing pairs", {"tuning": {"objective": "dpo", "hyperparameters": {"packing": True}}}, "set packing to false"),
    (
        "prefix with checkpointing",
        {"tuning": {"method": "prefix", "hyperparameters": {"gradientCheckpointing": True}}},
        "tuning.method prefix cannot be combined",
    ),
    ("early stopping without held-out rows", {"tuning": {"hyperparameters": {"earlyStopping": {}}}}, "earlyStopping needs held-out rows"),
    ("text for dpo", {"dataset": {**EVAL, "format": "text"}, "tuning": {"objective": "dpo"}}, "dataset.format does not fit"),
    ("loss of a reward model", {"dataset": EVAL, "evaluation": {}, "tuning": {"objective": "reward"}}, "use preference-accuracy alone"),
    (
        "harness on a reward model",
        {"dataset": EVAL, "evaluation": {"metrics": ["preference-accuracy"], "harnessTasks": ["x"]}, "tuning": {"objective": "reward"}},
        "need a model that writes text",
    ),
    ("preferences in sft", {"dataset": EVAL, "evaluation": {"metrics": ["preference-accuracy"]}}, "needs preferred and rejected answers"),
    (
        "answers of plain text",
        {"dataset": EVAL, "evaluation": {"metrics": ["f1"]}, "tuning": {"objective": "pretrain"}},
        "plain text has no answers",
    ),
    ("schema metric without schema", {"dataset": EVAL, "evaluation": {"metrics": ["json-schema"]}}, "field jsonSchema belong together"),
    ("regex without metric", {"dataset": EVAL, "evaluation": {"regex": "a+"}}, "field regex belong together"),
    ("judge metric without judge", {"dataset": EVAL, "evaluation": {"metrics": ["judge-win-rate"]}}, "field judge belong together"),
    (
        "general text from the net",
        {"dataset": EVAL, "evaluation": {"forgetting": {"uri": "https://a/b.jsonl"}}},
        "takes a pvc:// or configmap:// uri",
    ),
    (
        "sharded kto",
        {"tuning": {"objective": "kto"}, "distribution": {"nodes": 2, "gpusPerNode": 0, "strategy": "deepspeed-zero3"}},
        "do not run on sharded parameters",
    ),
    ("kto row by row", {"tuning": {"objective": "kto"}, "distribution": {"gpusPerNode": 0, "perDeviceBatchSize": 1}}, "must be 2 or more"),
    ("merged prompts", {"tuning": {"method": "prompt"}, "output": {"merged": True}}, "learned vectors cannot be merged"),
    ("gguf of a reward model", {"tuning": {"objective": "reward"}, "output": {"gguf": ["f16"]}}, "no place for a reward model's head"),
    ("onnx of a reward model", {"tuning": {"objective": "reward"}, "output": {"onnx": ["q4"]}}, "no pipeline for a reward model"),
    ("gguf adapter of dora", {"tuning": {"method": "dora"}, "output": {"ggufAdapter": True}}, "llama.cpp loads lora, qlora and rslora"),
    ("gguf type twice", {"output": {"gguf": ["F16", "F16"]}}, "spec.output.gguf: lists 'F16' twice; remove one"),
    ("secret for a volume", {"dataset": {"train": {"uri": "pvc://a/b", "secretRef": {"name": "s"}}}}, "secretRef is not used with pvc://"),
    ("endpoint without s3", {"dataset": {"train": {"uri": "pvc://a/b", "s3Endpoint": "https://m"}}}, "s3Endpoint is only used with"),
    ("http source", {"dataset": {"train": {"uri": "http://169.254.169.254/latest"}}}, "https://HOST/PATH"),
    ("credentials in https", {"dataset": {"train": {"uri": "https://u:p@host/x.jsonl"}}}, "spec.dataset.train.uri"),
    ("10,000 tolerations", {"scheduling": {"tolerations": [{}] * 10_000}}, "at most 32 items"),
    ("long string", {"scheduling": {"queue": "q" * 1_000_000}}, "spec.scheduling.queue"),
]


@pytest.mark.parametrize(("name", "change", "expected"), BAD, ids=[row[0] for row in BAD])
def test_a1_a2_refused_with_path_value_and_fix(name: str, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidDocument) as refused:
        parse_spec(merged(MINIMAL, **change))
    assert expected in str(refused.value)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("spec", [MINIMAL, FULL])
def test_valid_specs_round_trip(spec: dict[str, Any]) -> None:
    parsed = parse_spec(spec)
    assert parse_spec(parsed.to_wire()) == parsed


def test_every_example_is_valid() -> None:
    examples = [p for p in Path("examples").glob("*.yaml") if "kind: FineTuneJob" in p.read_text()]
    assert examples
    for path in examples:
        assert read_jobs(path)


def test_yaml_numbers_are_read_as_kubectl_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(Path("examples/tiny.yaml").read_text().replace("1.0e-2", "2e-4"))
    ((_, spec),) = read_jobs(path)
    assert spec.tuning.hyperparameters.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "is no YAML"),
        ("kind: Pod", "holds no FineTuneJob"),
        ("kind: FineTuneJob\nkind: FineTuneJob", "stands twice"),
        ("apiVersion: v1\nkind: FineTuneJob\nmetadata: {name: x}\nspec: {}", "write finetune.dev/v1alpha1"),
        ("apiVersion: finetune.dev/v1alpha1\nkind: FineTunejob\nmetadata: {name: x}\nspec: {}", "write FineTuneJob"),
        ("apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {}\nspec: {}", "metadata.name: is required"),
        ("apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: A_b}\nspec: {}", "is not a valid name"),
        (
            "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nspecs: {}\nmetadata: {name: x}",
            "specs: unknown field; did you mean 'spec'?",
        ),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InvalidDocument) as refused:
        read_jobs(path)
    assert expected in str(refused.value)


def test_a_document_that_is_no_mapping() -> None:
    with pytest.raises(InvalidDocument, match="expected a FineTuneJob document, got list"):
        parse_job([])


def test_an_old_operator_survives_a_newer_object() -> None:
    assert parse_spec(merged(MINIMAL, fromTheFuture={"x": 1}), strict=False) == parse_spec(MINIMAL)


def test_durations() -> None:
    assert [seconds(t) for t in ("90s", "10m", "1h30m", "7d")] == [90, 600, 5400, 604800]
    assert [human_duration(s) for s in (0, 42, 190, 7500, 273_600)] == ["0s", "42s", "3m10s", "2h5m", "3d4h"]
    for bad in ("", "10", "m", "-5m"):
        with pytest.raises(ValueError, match="is not a duration"):
            seconds(bad)


def test_uris() -> None:
    assert parse_uri("hf://org/m@v1").revision == "v1"
    assert (parse_uri("pvc://c/a/b").name, parse_uri("pvc://c/a/b").path) == ("c", "a/b")
    assert parse_uri("oci://registry.local:5000/team/bot:v2") == URI("oci", "registry.local:5000", "team/bot", "v2")
    digest = "sha256:" + "a" * 64
    assert parse_uri(f"oci://ghcr.io/team/bot:v2@{digest}") == URI("oci", "ghcr.io", "team/bot", digest)
    assert parse_uri("mlflow://mlflow.ml.svc:5000/bot@champion") == URI("mlflow", "mlflow.ml.svc:5000", "bot", "champion")
    assert parse_uri("mlflow://mlflow.ml.svc:5000/bot/3") == URI("mlflow", "mlflow.ml.svc:5000", "bot", "3")
    assert parse_uri("model://support-bot@3") == URI("model", "support-bot", "", "3")
    with pytest.raises(ValueError, match="is not a URI; write for example hf://"):
        parse_uri("http://169.254.169.254/")


def test_a_gguf_type_by_both_of_its_names_is_one() -> None:
    """To a server the names differ: what it takes has to be read."""
    assert parse_spec({**MINIMAL, "output": {"gguf": ["Q8_0", "q8_0", "f16"]}}).output.gguf == ["Q8_0", "F16"]
