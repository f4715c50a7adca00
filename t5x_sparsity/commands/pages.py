"""HTML pages from Jinja2 templates: all text is escaped, and a name without a value is an error."""

import functools
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

_FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The HTML that a template of this folder, such as 'report/page.html', makes of the values."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # JSON has no NaN
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"breakable": _breakable, "percent": "{:.2%}".format}
    environment.globals |= {"source": _source, "plotlyjs": lambda: Markup(get_plotlyjs())}
    return environment


def _breakable(text: Any) -> Markup:
    """A path or a name in code, which may be broken into lines after its parts."""
    return Markup(re.sub(r"([_./])", r"\1<wbr>", str(escape(text))))


def _source(name: str) -> Markup:
    """A style sheet or script of this folder, as it stands in a page."""
    return Markup((_FOLDER / name).read_text("utf-8"))
