"""Reports for people: the pages in `templates/`."""

from __future__ import annotations

from typing import Any


def render_page(template: str, **values: Any) -> str:
    """A page for people; everything that comes from data is escaped (case A16)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined)
    return str(pages.get_template(template).render(**values))
