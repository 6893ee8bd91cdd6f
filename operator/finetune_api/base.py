"""The base of every API type: camelCase on the wire, strict types, and cross-field rules declared once.

A rule is written once, in Python and in CEL: pydantic checks the first (operator, CLI), API servers since 1.25
check the second. The tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A constraint that spans fields of one object.

    `cel` is what the API server evaluates with `self` bound to the object; `holds` is the same in Python;
    `message` names the fields and says how to mend them.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]


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

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.RULES:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message})
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
