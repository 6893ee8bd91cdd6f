"""From a request to a FineTuneJob, and what its retries are known by. Pure."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from finetune_api import API_VERSION, KIND
from finetune_api.validation import InvalidDocument, parse_spec

from ..bodies import Refusal
from .jobs import ANNOTATION_REQUEST, ANNOTATION_TWIN, Job, Twin
from .models import Mapped, ModelMap
from .requests import AUTO, CreateJob, Hyperparameters, Integration
from .rows import COMPLETION, MESSAGES, PREFERENCE, PROMPTS

_OBJECTIVES = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
_FORMS = {"supervised": (MESSAGES, COMPLETION), "dpo": (PREFERENCE,), "reinforcement": (PROMPTS,)}
_OPENAI_COLUMNS = {"input": "prompt", "preferred_output": "chosen", "non_preferred_output": "rejected"}
_LEAST_ROWS = 10
_DPO_RATE = 1e-5
"""`auto` of dpo, where the model map says no learning rate: that of sft would be far too high."""
_REFERENCES = {f"{{{{item.{name}}}}}": name for name in ("answer", "solution")}
"""Of a string_check, without blanks: the key of the rows that the reward exact-match compares with."""


@dataclass(frozen=True)
class TrainingFile:
    """What the job needs of an uploaded file."""

    id: str
    uri: str
    rows: int
    form: str


@dataclass(frozen=True)
class Reading:
    """How the jobs' pods read files from the bucket."""

    secret: str
    """Secret of the job's namespace with the keys; empty: none."""
    endpoint: str = ""
    """Address of an S3-compatible server."""

    def source(self, file: TrainingFile) -> dict[str, Any]:
        """As a DatasetSource."""
        more: dict[str, Any] = {"secretRef": {"name": self.secret}} if self.secret else {}
        return {"uri": file.uri, **more, **({"s3Endpoint": self.endpoint} if self.endpoint else {})}


def spec_of(asked: CreateJob, known: ModelMap, training: TrainingFile, held_out: TrainingFile | None, reading: Reading) -> dict[str, Any]:
    """The spec of the FineTuneJob. Raises Refusal, which names the parameter that is wrong."""
    mapped = known.find(asked.model)
    way = asked.way
    if way.type not in mapped.methods:
        told = f"method.type {way.type} is not offered for {asked.model}; there is {', '.join(mapped.methods)}"
        raise Refusal(400, told, code="unsupported_value", param="method.type")
    _check_files(asked, mapped, training, held_out)
    spec = copy.deepcopy(mapped.spec)
    dataset, tuning = dict(spec.get("dataset") or {}), dict(spec.get("tuning") or {})
    dataset["train"] = reading.source(training)
    if held_out is not None:
        kept = {name: value for name, value in (dataset.get("eval") or {}).items() if name == "groupBy"}
        dataset["eval"] = {**kept, "uri": held_out.uri}
    dataset["checks"] = {"minExamples": _LEAST_ROWS, **(dataset.get("checks") or {})}
    tuning["objective"] = _OBJECTIVES[way.type]
    if way.type == "dpo":
        dataset |= {"format": "preference", "columns": {**(dataset.get("columns") or {}), **_OPENAI_COLUMNS}}
    numbers = dict(tuning.get("hyperparameters") or {})
    usual = known.defaults[asked.model].tuning.hyperparameters.learning_rate
    if way.type == "dpo" and "learningRate" not in numbers:
        usual = numbers["learningRate"] = _DPO_RATE
    if way.type == "dpo":
        beta = way.dpo.hyperparameters.beta if way.dpo is not None else AUTO
        if beta != AUTO:
            tuning["preference"] = {**(tuning.get("preference") or {}), "beta": beta}
    elif way.reinforcement is not None:
        _refuse_numbers(way.reinforcement.hyperparameters)
        if way.reinforcement.response_format is not None:
            param = "method.reinforcement.response_format"
            raise Refusal(400, f"{param} is not supported here", code="unsupported_parameter", param=param)
        answer = reference_of(way.reinforcement.grader)
        dataset |= {"format": "prompt-only", "columns": {**(dataset.get("columns") or {}), "messages": "prompt", answer: "answer"}}
        tuning["grpo"] = {**(tuning.get("grpo") or {}), "rewards": [{"type": "exact-match"}]}
    part = way.dpo if way.type == "dpo" else way.supervised
    given = part.hyperparameters if part is not None else Hyperparameters()
    _set_numbers(numbers, given, usual, asked, mapped)
    if asked.seed is not None:
        numbers["seed"] = asked.seed
    tuning["hyperparameters"] = numbers
    if asked.integrations:
        tuning["tracking"] = _tracking(dict(tuning.get("tracking") or {}), asked.integrations)
    spec |= {"dataset": dataset, "tuning": tuning}
    try:
        parse_spec(spec)
    except InvalidDocument as failure:
        culprit = "hyperparameters.batch_size" if "globalBatchSize" in str(failure) and given.batch_size != AUTO else None
        raise Refusal(400, f"no job can be made of this: {failure}", code="invalid_value", param=culprit) from None
    return spec


def _check_files(asked: CreateJob, mapped: Mapped, training: TrainingFile, held_out: TrainingFile | None) -> None:
    fit = _FORMS[asked.way.type]
    for param, file in (("training_file", training), ("validation_file", held_out)):
        if file is not None and file.form not in fit:
            told = f"{param} {file.id} has rows of {file.form}; method {asked.way.type} takes {' or '.join(fit)}"
            raise Refusal(400, told, code="invalid_file_format", param=param)
    if mapped.max_rows is not None and training.rows > mapped.max_rows:
        told = f"training_file {training.id} has {training.rows} rows; {asked.model} takes {mapped.max_rows} here"
        raise Refusal(400, told, code="invalid_training_file", param="training_file")


def _set_numbers(numbers: dict[str, Any], given: Hyperparameters, usual: float, asked: CreateJob, mapped: Mapped) -> None:
    if given.n_epochs != AUTO:
        if given.n_epochs > mapped.max_epochs:
            told = f"n_epochs is {given.n_epochs}; {asked.model} takes at most {mapped.max_epochs} here"
            raise Refusal(400, told, code="invalid_value", param="hyperparameters.n_epochs")
        numbers["epochs"] = given.n_epochs
        numbers.pop("maxSteps", None)
    if given.batch_size != AUTO:
        numbers["globalBatchSize"] = given.batch_size
    if given.learning_rate_multiplier != AUTO:
        numbers["learningRate"] = min(1.0, usual * given.learning_rate_multiplier)


def _refuse_numbers(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value not in (None, AUTO):
            param = f"method.reinforcement.hyperparameters.{name[:80]}"
            raise Refusal(400, f"{param} is not supported here; leave it out, or write auto", code="unsupported_parameter", param=param)


def _tracking(tracking: dict[str, Any], integrations: list[Integration]) -> dict[str, Any]:
    for index, integration in enumerate(integrations):
        place = f"integrations[{index}]"
        if "wandb" not in tracking:
            told = f"{place}: wandb is not set up for this model; an administrator sets spec.tuning.tracking.wandb in the model map"
            raise Refusal(400, told, code="unsupported_value", param=place)
        for name in ("name", "tags"):
            if getattr(integration.wandb, name) is not None:
                param = f"{place}.wandb.{name}"
                raise Refusal(400, f"{param} is not supported here; leave it out", code="unsupported_parameter", param=param)
        entity = {"entity": integration.wandb.entity} if integration.wandb.entity else {}
        tracking["wandb"] = {**tracking["wandb"], "project": integration.wandb.project, **entity}
    return tracking


def reference_of(grader: dict[str, Any]) -> str:
    """The key that a grader compares answers with, as the reward exact-match does. Raises Refusal for graders that a job has no reward for."""
    place, kind = "method.reinforcement.grader", grader.get("type")
    if kind != "string_check":
        told = f"{place}.type {str(kind)[:40]!r} is not supported here: rewards are string_check with operation eq (docs/openai.md)"
        raise Refusal(400, told, code="unsupported_value", param=f"{place}.type")
    if unknown := sorted(grader.keys() - {"type", "name", "input", "reference", "operation"}):
        param = f"{place}.{unknown[0][:80]}"
        raise Refusal(400, f"unknown parameter: {param}", code="unknown_parameter", param=param)
    plain = {name: re.sub(r"\s", "", str(grader.get(name))) for name in ("input", "reference")}
    if grader.get("operation") != "eq":
        raise Refusal(400, f"{place}.operation is not supported here but for eq", code="unsupported_value", param=f"{place}.operation")
    if plain["input"] != "{{sample.output_text}}":
        raise Refusal(400, f"{place}.input has to be {{{{sample.output_text}}}}", code="unsupported_value", param=f"{place}.input")
    if plain["reference"] not in _REFERENCES:
        told = f"{place}.reference has to be one of {', '.join(sorted(_REFERENCES))}"
        raise Refusal(400, told, code="unsupported_value", param=f"{place}.reference")
    return _REFERENCES[plain["reference"]]


def digest_of(*parts: str) -> str:
    """SHA-256 over texts, each kept apart from the next."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def name_of(twin: Twin, suffix: str | None) -> str:
    """Of the FineTuneJob: the same wish has the same one, so that two tries of it cannot make two jobs."""
    slug = re.sub(r"[^a-z0-9]+", "-", (suffix or "").lower()).strip("-")[:24].strip("-")
    head = slug if slug[:1].isalpha() else f"ft-{slug}" if slug else "ft"
    return f"{head}-{digest_of(twin.digest, str(twin.slot))[:12]}"


def manifest_of(namespace: str, twin: Twin, asked: CreateJob, spec: dict[str, Any]) -> dict[str, Any]:
    """The FineTuneJob."""
    request = asked.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    notes = {ANNOTATION_REQUEST: json.dumps(request, sort_keys=True), ANNOTATION_TWIN: msgspec.json.encode(twin).decode()}
    meta = {"name": name_of(twin, asked.suffix), "namespace": namespace, "annotations": notes}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec}


def twins_of(jobs: Iterable[Job], digest: str) -> list[Job]:
    """Those that the same caller asked for in the same words, newest wish first."""
    found = [job for job in jobs if job.twin is not None and job.twin.digest == digest]
    return sorted(found, key=lambda job: job.twin.slot if job.twin is not None else 0, reverse=True)
