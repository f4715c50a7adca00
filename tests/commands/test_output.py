"""What commands share to show things: pages, work in progress, numbers and lists."""

import math
from pathlib import Path

import jinja2
import pytest

from t5x_sparsity.commands import CommandError, as_command_errors, output, pages, text

TEMPLATES = sorted(p.relative_to(pages._FOLDER) for p in Path(pages._FOLDER).rglob("*.html"))


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_every_template_can_be_read(template):
    pages._environment().get_template(template.as_posix())


def test_a_template_escapes_text_and_misses_no_value():
    environment = pages._environment()
    found = environment.from_string("{{ a }} {{ a|breakable }} {{ 0.5|percent }}").render(a="<b/c>")
    assert found == "&lt;b/c&gt; &lt;b/<wbr>c&gt; 50.00%"
    with pytest.raises(jinja2.UndefinedError, match="'generator' is undefined"):
        pages.render("fit_scaling/page.html")
    with pytest.raises(ValueError, match="JSON compliant"):
        environment.from_string("{{ a|tojson }}").render(a=math.nan)
    assert "</" not in environment.from_string("{{ a|tojson }}").render(a="</script>")


def test_work_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(output, "_is_terminal", lambda: True)
    with output.status("reading") as say:
        say("exporting a/b")
    with output.progress("comparing", 10) as done:
        done(10)
    with output.spinner("planning"):
        pass
    captured = capsys.readouterr()
    assert captured.out == "" and "planning ..." not in captured.err


def test_elsewhere_a_line_says_what_takes_long(capsys):
    with output.status("reading") as say, output.progress("comparing", 10) as done:
        done(10)
    assert say is None and capsys.readouterr() == ("", "")
    with output.spinner("planning"):
        pass
    assert capsys.readouterr() == ("", "planning ...\n")


def test_lists_and_numbers():
    names = ["a", "b", "c", "d"]
    assert text.evenly_spaced(names, 2) == ["a", "d"] and text.evenly_spaced(names, 4) == names
    assert text.evenly_spaced(range(9), 3) == [0, 4, 8] and text.evenly_spaced([], 3) == []
    found = text.finite({"a": [1.0, math.nan], "b": (math.inf, "x"), "c": 2})
    assert found == {"a": [1.0, None], "b": [None, "x"], "c": 2}
    assert text.format_bytes(1536) == "1.50 KiB" and text.format_bytes(12) == "12 B"


def test_errors_of_a_configuration_become_the_commands():
    prefix = "the run: "
    with (
        pytest.raises(CommandError, match="^the run: no such weight$"),
        as_command_errors(prefix),
    ):
        raise ValueError("no such\n  weight")
    with pytest.raises(CommandError, match="^KeyError: 'a'$"), as_command_errors():
        raise KeyError("a")
    with pytest.raises(CommandError, match="^as it is$"), as_command_errors(prefix):
        raise CommandError("as it is")
    with pytest.raises(RuntimeError), as_command_errors():
        raise RuntimeError
