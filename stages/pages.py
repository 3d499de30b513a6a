"""Pages from templates: names in them are text, whatever they hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from quantifind.certification import digits
from quantifind.utils import palette

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page, as HTML.

    template: its file in stages/templates.
    context: what it names.
    """
    # names are a user's text: test_names_are_escaped
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    templates.filters |= {
        "number": digits.number,
        "percent": digits.percent,
        "colour": palette.of_width,
    }
    return templates.get_template(template).render(context, palette=palette)
