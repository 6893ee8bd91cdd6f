"""What is measured, when it is good enough, and where the result goes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ..base import APIModel, Format, Rule, Unique
from ..scalars import DNSSubdomain, PlainName
from ..uris import DatasetURI, EndpointURL, PublishURI
from .common import SecretReference
from .model import Endpoint

Metric = Literal[
    "loss",
    "perplexity",
    "token-accuracy",
    "exact-match",
    "f1",
    "rouge-l",
    "valid-json",
    "json-schema",
    "regex",
    "preference-accuracy",
    "judge-win-rate",
]
ANSWER_METRICS: tuple[Metric, ...] = ("exact-match", "f1", "rouge-l", "valid-json", "json-schema", "regex", "judge-win-rate")
"""Metrics of generated answers."""


class Gate(APIModel):
    """The condition under which the tuned model is published."""

    metric: Metric = "loss"
    """Metric compared between base and tuned model; lower is better for loss and perplexity, higher for the others."""
    min_improvement: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest improvement: relative to the base model's value for loss and perplexity, absolute for the others."""
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = 0.95
    """The improvement must be measurable: zero must lie outside this bootstrap interval of it, which resamples prompts."""
    compare_with: Literal["best-of-base", "base", "instructed", "few-shot"] = "best-of-base"
    """Which of the base's arms must be surpassed: the one that does best, or a certain one. Where the job has no such arm, the base as it is."""
    on_inconclusive: Literal["fail", "publish"] = "fail"
    """What happens when there are too few held-out prompts to tell (docs/evaluation.md says how many are needed): fail, with nothing published, or publish."""


FewShot = Annotated[
    str,
    Field(max_length=32),
    Format(
        pattern=r"^(auto|[0-9]|[1-5][0-9]|6[0-4])$",
        name="a number of examples",
        write="auto, or a number from 0 to 64, for example 4",
        or_integer=True,
    ),
]


class Baseline(APIModel):
    """How the base is asked, beside as it is: with the task's instruction, and with examples from the training rows."""

    system_prompt: Annotated[str, Field(min_length=1, max_length=32_768)] | None = None
    """The task's instruction, as a system prompt. Unset: the rows' own system text, where they agree on one."""
    few_shot: FewShot = "auto"
    """How many training rows stand before the question as examples: `auto` takes the most of 0, 4 and 8 that fit into the model's context."""

    @property
    def shots(self) -> int | None:
        """The number that was asked for, or None for `auto`."""
        return None if self.few_shot == "auto" else int(self.few_shot)


class Forgetting(APIModel):
    """Whether the model lost general ability: its loss on a general text, before and after."""

    uri: DatasetURI | None = None
    """Rows of format text, by pvc:// or configmap://. Unset: a small built-in English text."""
    max_increase: Annotated[float, Field(gt=0, le=10)] | None = None
    """Largest relative increase of the loss on that text; more and the gate does not pass. Unset: report only."""

    RULES = (
        Rule(
            cel="!has(self.uri) || self.uri.startsWith('pvc://') || self.uri.startsWith('configmap://')",
            message="evaluation.forgetting.uri takes a pvc:// or configmap:// uri",
            holds=lambda m: m.uri is None or m.uri.startswith(("pvc://", "configmap://")),
        ),
    )


class Evaluation(APIModel):
    """Comparison of the tuned model with its base, as it is and as it would be used, on the held-out rows with greedy decoding."""

    metrics: Annotated[list[Metric], Field(min_length=1, max_length=16), Unique()] = ["loss"]
    """Metrics to compute; docs/evaluation.md defines each."""
    gate: Gate | None = None
    """Publish only if this holds. Unset: publish always."""
    baseline: Baseline = Field(default_factory=Baseline)
    """How the base is asked, beside as it is."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """Most held-out rows to use."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 128
    """Longest generated answer in tokens."""
    json_schema: Annotated[str, Field(min_length=2, max_length=32_768)] | None = None
    """JSON Schema, as JSON text, that answers must satisfy for metric json-schema."""
    regex: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    """Regular expression that a whole answer must match for metric regex."""
    judge: Endpoint | None = None
    """Model that compares the two answers, in both orders, for metric judge-win-rate."""
    forgetting: Forgetting | None = None
    """Check the loss on a general text before and after."""
    harness_tasks: Annotated[list[PlainName], Field(max_length=16), Unique()] = []
    """Tasks of lm-evaluation-harness to run on both models, by name, for example `arc_easy`; their data comes from the Hugging Face hub."""
    harness_limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Most examples per harness task. Unset: all."""

    RULES = (
        Rule(
            cel="!has(self.gate) || self.gate.metric in self.metrics",
            message="evaluation.gate.metric is not among evaluation.metrics; add it there or gate on another metric",
            holds=lambda m: m.gate is None or m.gate.metric in m.metrics,
        ),
        Rule(
            cel="('json-schema' in self.metrics) == has(self.jsonSchema)",
            message="evaluation: metric json-schema and field jsonSchema belong together; set both or neither",
            holds=lambda m: ("json-schema" in m.metrics) == (m.json_schema is not None),
        ),
        Rule(
            cel="('regex' in self.metrics) == has(self.regex)",
            message="evaluation: metric regex and field regex belong together; set both or neither",
            holds=lambda m: ("regex" in m.metrics) == (m.regex is not None),
        ),
        Rule(
            cel="('judge-win-rate' in self.metrics) == has(self.judge)",
            message="evaluation: metric judge-win-rate and field judge belong together; set both or neither",
            holds=lambda m: ("judge-win-rate" in m.metrics) == (m.judge is not None),
        ),
    )


GGUFType = Literal["Q4_K_M", "Q8_0", "F16", "q8_0", "f16"]
"""As llama.cpp spells them; small letters mean the same, and are capitals once they are read."""
ONNXType = Literal["int8", "q4"]


class Output(APIModel):
    """What is made of the result beside the adapter (or, for full and partial, the model)."""

    merged: bool = False
    """Also publish the base with the adapter merged into it, in folder `merged`, in 16 bit."""
    gguf: Annotated[
        list[GGUFType], Field(max_length=3), Unique(), AfterValidator(lambda named: list(dict.fromkeys(map(str.upper, named))))
    ] = []
    """Also publish the merged model as GGUF for llama.cpp and Ollama, with a Modelfile for the first of them. f16 and q8_0 mean F16 and Q8_0."""
    onnx: Annotated[list[ONNXType], Field(max_length=2), Unique()] = []
    """Also publish the merged model as ONNX, in folder `onnx`, laid out for Transformers.js."""
    gguf_adapter: bool = False
    """Also publish the LoRA adapter as GGUF, for llama.cpp's --lora and Ollama's ADAPTER."""


class PublishTarget(APIModel):
    """A place that receives the adapter (or the model, for method full) with its model card."""

    uri: PublishURI | None = None
    """`pvc://CLAIM/PATH`, `hf://ORG/MODEL`, `s3://BUCKET/PREFIX`, `oci://HOST/REPOSITORY[:TAG]` or `mlflow://HOST/MODEL`."""
    model: DNSSubdomain | None = None
    """FineTunedModel of the job's namespace that gets a new version, kept at its own storage."""
    secret_ref: SecretReference | None = None
    """Secret with a token that may write to an hf:// or mlflow:// target, with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of an s3:// target, or with .dockerconfigjson of an oci:// target."""
    s3_endpoint: EndpointURL | None = None
    """Address of an S3-compatible server; unset means the administrator's, or AWS. Only for s3://."""
    plain_http: bool = Field(default=False, alias="plainHTTP")
    """Speak HTTP without TLS with an oci:// registry or an mlflow:// server, which an administrator must allow."""

    RULES = (
        Rule(
            cel="has(self.uri) != has(self.model)",
            message="publish takes uri or model: the address of a target, or the name of a FineTunedModel; set one of them",
            holds=lambda m: (m.uri is None) != (m.model is None),
        ),
        Rule(
            cel="!has(self.uri) || !(self.uri.startsWith('hf://') || self.uri.startsWith('s3://')) || has(self.secretRef)",
            message="publish: an hf:// target needs secretRef with a write token, and an s3:// target one with its keys",
            holds=lambda m: not (m.uri or "").startswith(("hf://", "s3://")) or m.secret_ref is not None,
        ),
        Rule(
            cel="!has(self.secretRef) || (has(self.uri) && !self.uri.startsWith('pvc://'))",
            message="publish: a pvc:// target and a model take no secretRef; remove it",
            holds=lambda m: m.secret_ref is None or (m.uri is not None and not m.uri.startswith("pvc://")),
        ),
        Rule(
            cel="!has(self.s3Endpoint) || (has(self.uri) && self.uri.startsWith('s3://'))",
            message="publish: s3Endpoint is only used with an s3:// uri; remove it or change the uri",
            holds=lambda m: m.s3_endpoint is None or (m.uri or "").startswith("s3://"),
        ),
        Rule(
            cel="!self.plainHTTP || (has(self.uri) && (self.uri.startsWith('oci://') || self.uri.startsWith('mlflow://')))",
            message="publish: plainHTTP is only used with an oci:// or mlflow:// uri; remove it or change the uri",
            holds=lambda m: not m.plain_http or (m.uri or "").startswith(("oci://", "mlflow://")),
        ),
    )

    @property
    def address(self) -> str:
        """What messages and statuses call it: the uri, or the model as one."""
        return self.uri if self.uri is not None else f"model://{self.model}"
