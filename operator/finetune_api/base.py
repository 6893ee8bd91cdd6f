"""The base of every API type: camelCase on the wire, strict types, and rules declared once.

A rule is written once, in Python and in CEL: pydantic checks the first (operator, webhook, CLI), API servers the second.
The tests hold the two against each other, and against real servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function, no_info_before_validator_function

SHOWN = 80
"""Characters of a value that a message quotes."""
_UNPRINTABLE = r"[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]"
"""Control characters, and those that change the direction of writing: no message repeats them."""


def shortened(text: str, most: int) -> str:
    """The text, or where it has more characters its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 3] + "..."


def refused(message: str) -> PydanticCustomError:
    """The error of a rule, told to users as it is."""
    return PydanticCustomError("rule", "{message}", {"message": message})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A constraint that spans fields of one object.

    `cel` is what the API server evaluates with `self` bound to the object; `holds` is the same in Python;
    `message` names the fields and says how to mend them.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a string must look like. Who writes another is told the value and the fix, never the pattern.

    An API server's own word on a `pattern` would be the pattern: so it is a rule there, too.
    """

    pattern: str
    """Regular expression of the whole string, in the syntax that RE2 and Python share."""
    name: str
    """What it is, with its article."""
    write: str
    """What to write instead."""
    scheme: str = ""
    """What a value without any scheme most likely lacks."""
    or_integer: bool = False
    """Whether a whole number may stand for its text, as in Kubernetes' IntOrString."""

    def refusal(self, value: str) -> str | None:
        """Why the value is none, or None."""
        if re.fullmatch(self.pattern, value):
            return None
        if re.search(_UNPRINTABLE, value):
            return self._unquoted
        shown = shortened(value, SHOWN)
        if self.scheme and "://" not in value and re.fullmatch(self.pattern, self.scheme + value):
            return f'"{shown}"{self._no_scheme}{shown}{self._or_write}'
        return f'"{shown}"{self._not_one}'

    def check(self, value: str) -> str:
        """The value. Raises PydanticCustomError, a ValueError, when it is none."""
        if refusal := self.refusal(value):
            raise refused(refusal)
        return value

    def to_cel(self) -> dict[str, str]:
        """The same for API servers."""
        text = "string(self)" if self.or_integer else "self"
        pattern = f"{text}.matches(r'{self.pattern}')"
        shown = f"(size({text}) > {SHOWN} ? {text}.substring(0, {SHOWN - 3}) + '...' : {text})"
        told = json.dumps(self._not_one)
        if self.scheme:
            guess = f"('{self.scheme}' + {text}).matches(r'{self.pattern}')"
            suggestion = f"{json.dumps(self._no_scheme)} + {shown} + {json.dumps(self._or_write)}"
            told = f"(!{text}.contains('://') && {guess} ? {suggestion} : {told})"
        quoted = f"{text}.matches('{_UNPRINTABLE}') ? '' : '\"' + {shown} + '\"' + {told}"  # '': the message as it is
        return {"rule": pattern, "message": self._unquoted, "messageExpression": quoted}

    @property
    def _not_one(self) -> str:
        return f" is not {self.name}; write {self.write}"

    @property
    def _unquoted(self) -> str:
        return f"this{self._not_one}"

    @property
    def _no_scheme(self) -> str:
        return f" has no scheme; did you mean {self.scheme}"

    @property
    def _or_write(self) -> str:
        return f"? {self.name[0].upper()}{self.name[1:]} is {self.write}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = no_info_after_validator_function(self.check, handler(source))
        return no_info_before_validator_function(_integer_as_text, schema) if self.or_integer else schema

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        if self.or_integer:
            del schema["type"]
            schema["x-kubernetes-int-or-string"] = True
        return {**schema, "x-kubernetes-validations": [self.to_cel()]}


@dataclass(frozen=True)
class Unique:
    """A list as a set: an API server refuses what stands in it twice, and merges what several appliers put into it."""

    def check(self, items: list[Any]) -> list[Any]:
        """The list. Raises PydanticCustomError when something is in it twice."""
        twice = next((item for index, item in enumerate(items) if item in items[:index]), None)
        if twice is not None:
            raise refused(f"lists {twice!r} twice; remove one")
        return items

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(core_schema), "x-kubernetes-list-type": "set"}


def _integer_as_text(value: Any) -> Any:
    if isinstance(value, float):
        raise refused(f'{value:g} is a fraction: quote it ("{value:g}")')
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def without_nulls(values: Any) -> Any:
    """A map without the keys whose value is null: to an API server they are not there."""
    return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


class APIModel(BaseModel):
    """An object of the API. Unknown fields are ignored here and refused by `finetune_api.validation.parse`."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        """A field that is null is one that is not there, as to an API server; an unknown one stays, to be refused."""
        if not isinstance(values, dict) or None not in values.values():
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: value for key, value in values.items() if value is not None or key not in known}

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.RULES:
            if not rule.holds(self):
                raise refused(rule.message)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        if cls.RULES:
            target = handler.resolve_ref_schema(schema)
            target["x-kubernetes-validations"] = [{"rule": rule.cel, "message": rule.message} for rule in cls.RULES]
        return schema

    def to_wire(self, *, exclude_unset: bool = False) -> dict[str, Any]:
        """The object as plain JSON types with wire names; absent optional fields are left out."""
        return self.model_dump(by_alias=True, exclude_none=True, exclude_unset=exclude_unset, mode="json")
