"""What clients send, as OpenAI's documentation has it. Strict: what is not known is refused by its name, never ignored. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..bodies import Refusal

R = TypeVar("R", bound=BaseModel)
AUTO = "auto"


def _or_auto(kind: type, least: float, most: float, *, above: bool = False) -> Any:
    """`auto`, or a number of that kind between two limits; `above`: the lower one not included."""
    what = "a whole number" if kind is int else "a number"

    def check(value: Any) -> Any:
        if value is None or value == AUTO:
            return AUTO
        numeric = isinstance(value, int) or (kind is float and isinstance(value, float))
        if not numeric or isinstance(value, bool) or not least <= value <= most or (above and value == least):
            range_ = f"more than {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
            raise PydanticCustomError("value", "{told}", {"told": f'"auto", or {what} {range_}'})
        return kind(value)

    return Annotated[Any, BeforeValidator(check)]


class Request(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Hyperparameters(Request):
    """Of supervised, and the older field beside `method`."""

    n_epochs: _or_auto(int, 1, 50) = AUTO  # type: ignore[valid-type]
    batch_size: _or_auto(int, 1, 4096) = AUTO  # type: ignore[valid-type]
    learning_rate_multiplier: _or_auto(float, 0, 100, above=True) = AUTO  # type: ignore[valid-type]


class DpoHyperparameters(Hyperparameters):
    """With the pull towards the reference model."""

    beta: _or_auto(float, 0, 2, above=True) = AUTO  # type: ignore[valid-type]


class Supervised(Request):
    """Learning answers."""

    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Dpo(Request):
    """Learning preferred answers."""

    hyperparameters: DpoHyperparameters = Field(default_factory=DpoHyperparameters)


class Reinforcement(Request):
    """Learning by a grader. What a FineTuneJob has no word for is refused when the job is made of it (`manifest.reference_of`)."""

    grader: dict[str, Any]
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    response_format: dict[str, Any] | None = None


class Method(Request):
    """One of three, with its settings."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _settings_fit(self) -> Method:
        for name in ("supervised", "dpo", "reinforcement"):
            if name != self.type and getattr(self, name) is not None:
                raise PydanticCustomError("value", "{told}", {"told": f"{name} is set, and type is {self.type}: set one of them"})
        if self.type == "reinforcement" and self.reinforcement is None:
            raise PydanticCustomError("value", "{told}", {"told": "type reinforcement needs reinforcement.grader"})
        return self


class WandB(Request):
    """A run at Weights & Biases."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    entity: Annotated[str, Field(max_length=128)] | None = None
    name: str | None = None
    tags: list[str] | None = None


class Integration(Request):
    """A tracker."""

    type: Literal["wandb"]
    wandb: WandB


Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)]
FileId = Annotated[str, Field(min_length=1, max_length=128)]


class CreateJob(Request):
    """POST /v1/fine_tuning/jobs."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: FileId
    validation_file: FileId | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9 ._-]*$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None

    @model_validator(mode="after")
    def _hyperparameters_once(self) -> CreateJob:
        if self.hyperparameters is not None and self.method is not None:
            told = "hyperparameters is set beside method: put them into method, and leave hyperparameters out"
            raise PydanticCustomError("value", "{told}", {"told": told})
        return self

    @property
    def way(self) -> Method:
        """The method, also where the older field or nothing says it."""
        return self.method or Method(type="supervised", supervised=Supervised(hyperparameters=self.hyperparameters or Hyperparameters()))


class CreateUpload(Request):
    """POST /v1/uploads."""

    filename: Annotated[str, Field(min_length=1, max_length=255)]
    purpose: str
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[str, Field(max_length=255)]


class CompleteUpload(Request):
    """POST /v1/uploads/ID/complete."""

    part_ids: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=10_000)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class Page(Request):
    """What list calls take."""

    after: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")] | None = None
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20


class FilePage(Page):
    """GET /v1/files."""

    limit: Annotated[int, Field(ge=1, le=10_000, strict=False)] = 10_000
    purpose: Annotated[str, Field(pattern=r"^[a-z_-]{1,64}$")] | None = None
    order: Literal["asc", "desc"] = "desc"


def parse(model: type[R], raw: Any) -> R:
    """Raises Refusal (400), which names the parameter that is wrong."""
    try:
        return model.model_validate(raw)
    except ValidationError as failure:
        first = failure.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")[:200] or None
    if first["type"] == "extra_forbidden":
        raise Refusal(400, f"unknown parameter: {place}", code="unknown_parameter", param=place)
    if first["type"] == "missing":
        raise Refusal(400, f"you must provide {place}", code="missing_required_parameter", param=place)
    told = first["msg"]
    raise Refusal(400, f"{place}: {told}" if place else told, code="invalid_value", param=place)


def parse_query(model: type[R], items: list[tuple[str, str]]) -> R:
    """The same for a URL's query; `metadata[k]=v` becomes a map."""
    found: dict[str, Any] = {}
    for name, value in items:
        if name in found:
            raise Refusal(400, f"{name[:80]} is there twice", code="invalid_value", param=name[:80])
        found[name] = value
    return parse(model, found)
