"""In a notebook: the tour runs in a real kernel, canvases are drawn in place, pages and pictures are shown, training tells how it goes."""

import io
import re
import sys
from pathlib import Path

import pytest

from generation.watch.screens import Cell, Notebook, in_notebook

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"
MORE = (  # two more cells
    "import sys\nmodel.generate(**inputs, canvas_length=16, streamer=CanvasStreamer(tokenizer))\nNone",
    "model.generate(**inputs, streamer=CanvasStreamer(tokenizer, stop_ids=ends, file=sys.stdout))\nNone",
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The tour's cells of code, and `MORE`, run."""
    nbformat = pytest.importorskip("nbformat")
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name)
    from notebooks import run_cells

    notebook = nbformat.read(TOUR, 4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"] + [nbformat.v4.new_code_cell(source) for source in MORE]
    return run_cells(notebook, tmp_path_factory.mktemp("tour")).cells


def shows(cells, part):
    """What the cell with `part` in its source shows, by type of data, in its order, but for standard error; what it printed is "stdout"."""
    (cell,) = (cell for cell in cells if part in cell.source)
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return [{output.name: output.text} if output.output_type == "stream" else dict(output.data) for output in outputs]


def test_a_canvas_is_drawn_in_place(cells):
    (drawn,) = shows(cells, "output = model.generate(**inputs, streamer")
    assert drawn["text/plain"] == '{"name": "Quinn", "quantity": 54, "item": "paper mirrors", "date": "2026-12-04"}'
    assert re.search(r"<small>step \d+</small>", drawn["text/html"]) and "renoised" in drawn["text/html"]
    assert "".join(re.findall("<span[^>]*>([^<]*)</span>", drawn["text/html"].partition("</pre>")[0])) == (
        drawn["text/plain"].replace('"', "&quot;")
    )


def test_a_form_is_told_apart(cells):
    (drawn,) = shows(cells, "constraint=schema")
    assert "without colour: pinned" in drawn["text/html"] and ";color:inherit" in drawn["text/html"]


def test_each_canvas_stays(cells):
    drawn = shows(cells, "**inputs, canvas_length=16")
    assert len(drawn) > 2 and "".join(data["text/plain"] for data in drawn).startswith('{"name": "Quinn", "quantity": 54')


def test_where_a_file_is_given_it_is_written(cells):
    printed = "".join(data["stdout"] for data in shows(cells, "file=sys.stdout"))
    assert printed.startswith("  step  1  ") and "^" in printed


def test_pages_pictures_and_tables_are_shown(cells):
    (page,), (picture,) = shows(cells, "trace_page(trace"), shows(cells, "draw_animation(trace, tokenizer")
    assert page["text/html"].startswith('<iframe srcdoc="&lt;!doctype html') and len(page["text/plain"]) < 100
    assert picture["text/html"].startswith('<img src="data:image/svg+xml;base64,') and len(picture["text/plain"]) < 100
    (table,) = shows(cells, "decider.decide")
    assert re.search(r"\| half \| Y \| 0\.[6-9]", table["text/markdown"])


def test_training_shows_what_it_measures(cells):
    table, _ = shows(cells, "trainer.train()")
    assert "<th>Exact Match</th>" in table["text/html"] and "[25/25" in table["text/html"]
    (answers,) = shows(cells, "for answer in trainer.answers")
    assert answers["text/plain"].count("True)") >= 5, answers["text/plain"]  # of 8; 0.875 and more of six other seeds


def test_what_is_kept_of_the_tour_names_no_machine():
    text = TOUR.read_text(encoding="utf-8")
    assert "site-packages" not in text and '"stderr"' not in text and "iopub" not in text
    assert text.count('"output_type"') >= 8, "its pictures are part of it"


def test_text_cannot_break_out_of_the_page():
    def layout(cells, paint):
        return "<i>" + "|".join(paint(cell) for cell in cells)

    cells = [Cell("<b>", "accepted"), Cell("&", "given"), Cell("1", "plain")]
    page = Notebook(layout).page(3, cells)
    assert "&lt;i&gt;<span" in page and ">&lt;b&gt;</span>|<span" in page and ">&amp;</span>|<span" in page and ">1</span></pre>" in page


def test_elsewhere_nothing_of_it_is_taken(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not in_notebook()
