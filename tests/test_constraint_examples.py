"""The page on constraints runs as it stands, and so do the examples on the shipped checkpoint."""

import json
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pages import Page

from generation import JsonSchema, Regex, Template
from generation.constraints.schema_reading import KNOWN, NOTES, ROOT_NOTES
from generation.constraints.strings import FORMATS
from modeling_diffusiongemma.console.main import main

pytest.importorskip("pydantic")

ROOT = Path(__file__).parents[1]
PAGE = Page("docs/constraints.md")


def test_snippets_of_the_page_run_and_print_what_it_says(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(PAGE.blocks) >= 12 and len(PAGE.expected) >= 15
    PAGE.run()
    assert capsys.readouterr().out.splitlines() == PAGE.expected


def test_commands_of_the_page_run(capsys):
    commands = [shlex.split(line) for line in PAGE.commands()]
    assert len(commands) == 2 and {command[0] for command in commands} == {"diffusiongemma"}
    assert [main([*command[1:], "--seed", "0"]) for command in commands] == [0, 0]
    printed = capsys.readouterr().out
    assert "1998/03/03" in printed and "1998-03-03" in printed


def rows_of_the_table():
    """Of each row the names in its second column, what is obeyed, and in its third, what is refused."""
    table = PAGE.text.split("| of | obeyed | refused |")[1].split("\n\n")[0]
    for row in re.findall(r"^\| \w.*$", table, re.MULTILINE):
        _, of, obeyed, refused, _ = row.split("|")
        yield of.strip(), *(re.findall(r"`(\$?[a-zA-Z]+)(?:: true)?`", column) for column in (obeyed, refused))


def test_keywords_of_the_table_are_obeyed_or_refused_as_it_says():
    rows = list(rows_of_the_table())
    obeyed = {name for _, names, _ in rows for name in names} - {"true", "false"}
    assert obeyed == KNOWN - NOTES - {"uniqueItems"}
    passed = PAGE.text.split("Passed over")[1].split("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", passed)) == NOTES | ROOT_NOTES
    for of, _, names in rows:
        kind = {"strings": "string", "lists": "array", "objects": "object"}.get(of, "number")
        for name in set(names) - {"enum", "const", "oneOf"}:
            with pytest.raises(ValueError, match=re.escape(f"$.{name}")):
                JsonSchema({"type": kind, name: True})
    with pytest.raises(ValueError, match="beside `enum`"):
        JsonSchema({"enum": ["a"], "minLength": 1})
    with pytest.raises(ValueError, match="that a value may match both"):
        JsonSchema({"oneOf": [{"type": "number"}, {"type": "number", "minimum": 1}]})
    with pytest.raises(ValueError, match="names no properties"):
        JsonSchema({"type": "object"})


def test_formats_of_the_table_are_those_there_are():
    (named,) = re.findall(r"`format`: ([^|]+) \|", PAGE.text)
    assert named.split(", ") == list(FORMATS)


def test_every_answer_under_the_schema_is_an_object(here):
    """In one step, after which the model alone writes hardly anything that parses."""
    printed, left = here("extract.py", "--free", "--steps", "1", "--notes", "10", "--seed", "1")
    assert left is None and printed.count("Note(") >= 10 and "schema  10 of 10 are notes" in printed
    free = int(re.search(r"^free +(\d+) of 10 are notes", printed, re.MULTILINE)[1])
    assert free < 10 and printed.count("no note: ") == 10 - free


def test_unseen_notes_are_read_and_judged(here):
    printed, left = here("extract.py", "--notes", "8")
    notes, right = re.search(r"^schema +(\d+) of 8 are notes, (\d+) are right", printed, re.MULTILINE).groups()
    assert left is None and notes == "8" and int(right) >= 5 and printed.count("  right  Note(") == int(right)
    printed, left = here("extract.py", "--note", "On 12 May 2024 Anna paid $4.50 for 3 blue mugs.")
    wanted = "Note(name='Anna', quantity=3, item='blue mugs', price=4.5, date=datetime.date(2024, 5, 12))"
    assert left is None and f"right  {wanted}" in printed
    printed, left = here("extract.py", "--note", "Nothing that any job says")
    assert left is None and "not checked" in printed and "1 of 1 are notes" in printed
    printed, left = here("extract.py", "--notes", "3", "--whitespace", "compact")  # which the model did not learn
    assert left is None and "3 of 3 are notes" in printed


def test_extraction_names_what_is_wrong(here, monkeypatch):
    assert "`--notes` is 0" in here("extract.py", "--notes", "0")[1]
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert "pip install pydantic" in here("extract.py")[1]


def test_blanks_are_filled_in_and_judged(here):
    printed, left = here("fill.py")
    assert left is None and printed.count("  right: ") + printed.count("  WRONG: ") == 8 and printed.count("  right: ") >= 7
    assert "  _ _ _ _-_\n" in printed and "{'year': '1998', 'month': '03'}" in printed


def test_a_template_of_ones_own_is_filled_in_step_by_step(here):
    printed, left = here("fill.py", "{year}-{month:1-2}-03", "--prompt", "Write 3 March 1998 as an ISO date.", "--watch")
    assert left is None and "step  1" in printed and "\n  1998-03-03\n" in printed
    printed, left = here("fill.py", "a {word:1-2} b")
    assert left is None and re.search(r"^  a (?s:.+) b$", printed, re.MULTILINE)
    for arguments, message in ((["a {b"], "`text` holds a single '{' at 2"), (["--prompt", "x"], "expected both")):
        assert message in here("fill.py", *arguments)[1]


def test_picture_shows_a_text_of_the_template_at_every_step(here, tmp_path):
    text = '{{"name": "{name}", "quantity": {quantity}, "item": "bulbs"}}'
    arguments = ["--out", str(tmp_path / "canvas.svg"), "--prompt", "To JSON: 54 bulbs for Quinn.", "--template", text]
    printed, left = here("picture.py", *arguments, "--regex", "quantity=[0-9]{2}", "--steps", "5")
    assert left is None and json.loads(printed.partition(": ")[2])["item"] == "bulbs"
    picture = ElementTree.parse(tmp_path / "canvas.svg").getroot()
    lines: dict[str, str] = {}
    for element in picture.iter("{http://www.w3.org/2000/svg}text"):
        lines[element.get("y")] = lines.get(element.get("y"), "") + element.text
    steps = [line for line in lines.values() if line.startswith("step ")]
    template = Template(text, quantity=Regex("[0-9]{2}"))
    assert 1 <= len(steps) <= 5 and [template.values(step[6:]).keys() for step in steps] == [{"name", "quantity"}] * len(steps)
    assert "pinned by the templateconstrainedfreenoise; the best text so far" in lines.values()
    assert "without a template" in here("picture.py", *arguments[:2], "--regex", "quantity=1")[1]


def test_picture_of_the_page_is_of_the_shipped_checkpoint():
    picture = (ROOT / "docs" / "constraints.svg").read_text(encoding="utf-8")
    assert "](constraints.svg)" in PAGE.text and picture.count(">step ") >= 4 and "right, says the checker" in picture
