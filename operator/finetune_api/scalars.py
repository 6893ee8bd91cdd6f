"""Scalar types of the API and their parsers: durations and quantities."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, ROUND_UP, Context, Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_before_validator_function, plain_serializer_function_ser_schema

from .base import SHOWN, Format, shortened, without_nulls

DURATION = Format(pattern=r"^([0-9]{1,6}(s|m|h|d)){1,4}$", name="a duration", write="for example 90s, 10m, 1h30m or 7d")
#: resource.Quantity of the Kubernetes API, without minus signs: nobody may ask for less than nothing
QUANTITY = Format(
    pattern=r"^[+]?([0-9]{1,18}([.][0-9]{0,18})?|[.][0-9]{1,18})([numkMGTPE]|[KMGTPE]i|[eE][-+]?[0-9]{1,2})?$",
    name="a quantity",
    write="for example 500m, 4 or 16Gi",
    or_integer=True,
)
_ENDS = "beginning and ending with a letter or digit"
DNS_LABEL = Format(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", name="a DNS label", write=f"lower-case letters, digits and '-', {_ENDS}")
DNS_SUBDOMAIN = Format(
    pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    name="a DNS name",
    write=f"lower-case letters, digits, '-' and '.', {_ENDS}",
)
QUALIFIED_NAME = Format(
    pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
    name="a qualified name",
    write="for example nvidia.com/gpu",
)
#: as a batch/v1 Job's managedBy; without "'", which could not stand in a rule
DOMAIN_PREFIXED_PATH = Format(
    pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9/._~%!$&()*+,;=:-]+$",
    name="a domain-prefixed path",
    write="for example example.com/controller",
)
LABEL_VALUE = Format(
    pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", name="a label's value", write=f"letters, digits, '-', '_' and '.', {_ENDS}"
)
ABSOLUTE_PATH = Format(
    pattern=r"^(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+$",
    name="an absolute path",
    write="for example /adapters: letters, digits, '-', '_' and '.' between slashes",
)
#: what names parts of other people's systems: modules, splits, tasks, keys of Secrets
PLAIN_NAME = Format(pattern=r"^[A-Za-z0-9_.-]+$", name="a plain name", write="letters, digits, '-', '_' and '.'")
#: reason of a metav1.Condition
REASON_PATTERN = r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"

Duration = Annotated[str, Field(max_length=32), DURATION]
Quantity = Annotated[str, Field(max_length=24), QUANTITY]
DNSLabel = Annotated[str, Field(max_length=63), DNS_LABEL]
DNSSubdomain = Annotated[str, Field(max_length=253), DNS_SUBDOMAIN]
QualifiedName = Annotated[str, Field(max_length=253), QUALIFIED_NAME]
DomainPrefixedPath = Annotated[str, Field(max_length=63), DOMAIN_PREFIXED_PATH]
PlainName = Annotated[str, Field(min_length=1, max_length=128), PLAIN_NAME]
LabelMap = Annotated[dict[str, Annotated[str, Field(max_length=63), LABEL_VALUE]], Field(max_length=32), BeforeValidator(without_nulls)]

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_QUANTITY = re.compile(r"([-+]?(?:[0-9]+[.]?[0-9]*|[.][0-9]+))([numkMGTPE]?|[KMGTPE]i|[eE][-+]?[0-9]{1,9})")
_FACTORS = {
    **{suffix: Decimal(f"1e{power}") for suffix, power in zip("num", (-9, -6, -3), strict=True)},
    **{suffix: Decimal(f"1e{3 * power}") for power, suffix in enumerate(("", *"kMGTPE"))},
    **{f"{suffix}i": Decimal(1024**power) for power, suffix in enumerate("KMGTPE", start=1)},
}
_ROUNDED_UP = Context(prec=100, rounding=ROUND_UP, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
_NANO, _MOST = Decimal("1e-9"), Decimal(2**63 - 1)


@functools.lru_cache(maxsize=256)
def seconds(duration: str) -> int:
    """Seconds in a duration such as `90s`, `10m`, `1h30m` or `7d`. Raises ValueError when it is none."""
    found = re.findall(r"([0-9]+)([smhd])", DURATION.check(duration))
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in found)


@functools.lru_cache(maxsize=4096)
def quantity(text: str) -> Decimal:
    """The value of a Kubernetes quantity such as `500m`, `16`, `1e3` or `200Gi`. Raises ValueError when it is none.

    As the API server reads it (resource.Quantity of k8s.io/apimachinery): what is finer than a billionth is rounded away
    from zero, what is more than 2^63-1 is capped. What has no digits at all, which a server takes for 0, is refused.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{shortened(text, SHOWN)!r} is not a quantity; write for example 500m, 16 or 200Gi")
    number, suffix = Decimal(match[1]), match[2]
    factor = _FACTORS.get(suffix)
    value = _ROUNDED_UP.multiply(number, Decimal(f"1e{suffix[1:]}") if factor is None else factor)
    return _ROUNDED_UP.quantize(max(-_MOST, min(_MOST, value)), _NANO)


@dataclass(frozen=True)
class _AsText:
    """A float in Python, text on the wire, as Kubernetes' API conventions ask for: "0.5123", "2e-05".

    A number is read, too: status of earlier versions, and what a stage's last words hold.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        to_text = plain_serializer_function_ser_schema(lambda value: f"{value:.12g}", when_used="json")
        return no_info_before_validator_function(_number, handler(source), serialization=to_text)

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "maxLength": 32}


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9.]{1,24}(e[-+]?[0-9]{1,3})?", value) else value


DecimalText = Annotated[float, _AsText()]
"""A fraction in a status: text, since there are no floats there"""
Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number that JSON carries exactly."""
Timestamp = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]


@dataclass(frozen=True)
class Told:
    """Text of a status: what is longer is cut, with an ellipsis. A job is not held up by what somebody had to say of it."""

    most: int
    """Characters"""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(
            lambda text: shortened(text, self.most) if isinstance(text, str) else text, handler(source)
        )

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(core_schema), "maxLength": self.most}


Name = Annotated[str, Told(253)]
"""Of an object, in a status: no name that Kubernetes takes is longer"""
LabelKey = Annotated[str, Told(317)]
"""Key of a label, in a status"""
Word = Annotated[str, Told(128)]
"""A duration, a digest, a choice or what something is counted by, in a status"""


def printable(text: str) -> str:
    """Text without control characters, escape sequences and characters that change the direction of writing; lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not unicodedata.category(c).startswith("C") else "\ufffd" for c in text)


def human_duration(total: float) -> str:
    """A duration for people with its two largest units: `42s`, `3m10s`, `2h5m`, `3d4h`."""
    left = max(0, round(total))
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= size:
            parts.append(f"{left // size}{unit}")
            left %= size
    return "".join(parts[:2]) or "0s"
