"""The console, mostly through `main(argv)`; in processes of their own where the process is the point: pipes, terminals, imports."""

import errno
import functools
import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import programs
import pytest
import torch
from commands import MODULE, process
from transformers import AutoTokenizer

from generation.call.configuration import PRESETS
from generation.watch.screens import Cell, wrapped
from modeling_diffusiongemma import default_checkpoint
from modeling_diffusiongemma.console import session
from modeling_diffusiongemma.console.main import RUNS, main
from modeling_diffusiongemma.console.placement import loading_arguments, memory
from modeling_diffusiongemma.console.usage import COMMANDS, answer_usage, build_parser, parse
from modeling_diffusiongemma.version import VERSION
from modeling_diffusiongemma.weights.four_bit import FourBitExperts
from modeling_diffusiongemma.weights.fp8 import FP8Experts

ROOT = Path(__file__).parents[1]
RELEASED = Path(__file__).parent / "data" / "released"
NARROW = ["--set", "canvas_length=16", "--max-new-tokens", "16"]  # seconds less than the checkpoint's 256
DATES = {
    "Write 3 March 1998 as an ISO date.": "1998-03-03",
    "Write October 2, 2052 as an ISO date.": "2052-10-02",
    "Write 4 May 1911 as an ISO date.": "1911-05-04",
}
DATE, *OTHERS = DATES
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


# Processes


def test_wrong_usage_exits_with_2_and_says_how():
    done = process(*MODULE, "generate", "--seed", "no")
    assert done.returncode == 2 and "usage: diffusiongemma generate" in done.stderr and "--seed" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "line, code",
    [("--help", 0), ("--version", 0), ("chat --help", 0), ("", 2), ("info --model x", 2), ("export .", 2), ("chat --max-memory 1", 2)],
)
def test_help_and_wrong_usage_import_neither_torch_nor_transformers(line, code):
    """They take seconds."""
    done = process(sys.executable, "-X", "importtime", *MODULE[1:], *line.split())
    assert done.returncode == code and "argparse" in done.stderr
    assert not re.search(r"\| +(torch|transformers|numpy|huggingface_hub)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "place, name, answers", [("scripts", "diffusiongemma", True), ("scripts", "pytest", False), ("stdlib", "diffusiongemma", False)]
)
def test_installed_script_answers_usage_before_the_package_is_imported(place, name, answers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [os.path.join(sysconfig.get_path(place), name), "--version"])
    if answers:
        with pytest.raises(SystemExit, match="0"):
            answer_usage()
    else:
        answer_usage()
    assert capsys.readouterr().out == (f"diffusiongemma {VERSION}\n" if answers else "")


@pytest.mark.parametrize("line", ["info", "generate a b c --set max_denoising_steps=1 --seed 0", "--help"])
def test_reader_that_has_gone_is_no_error(line):
    """As `head -1` goes: the exit code is that of a process which a closed pipe ended, and nothing is said."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse passes over an error in printing help, which then comes when it is printed
    done = subprocess.run([*MODULE, *line.split()], cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["info", "generate a", "--help"])
def test_full_disk_is_an_error_in_one_line(line):
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*MODULE, *line.split()], cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert done.returncode == 1 and done.stderr == b"diffusiongemma: error: standard output cannot be written: No space left on device\n"


def test_disk_that_is_full_later_is_an_error_in_one_line(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(RUNS, "info", full)
    assert main(["info"]) == 1 and "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["generate hi", "info", "bench"])
def test_closed_standard_output_is_refused(line, monkeypatch, capsys):
    """The answers were lost, and the exit code was 0."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(line.split()) == 2
    assert "standard output is closed" in capsys.readouterr().err


def test_byte_order_mark_is_no_letter_of_a_prompt(answers):
    """Of standard input as of a file: the model was asked another question, without a word."""
    (row,) = answers("generate", "--seed", "0", *NARROW, stdin=f"\ufeff{DATE}\n")
    assert row["prompt"] == DATE


def test_json_goes_through_an_output_that_takes_ascii_alone():
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = process(*MODULE, "generate", "Grüße, 世界", "--json", "--seed", "0", *NARROW, environment=ascii_only)
    assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == "Grüße, 世界" and done.stdout.isascii(), done.stderr
    done = process(*MODULE, "generate", "--json", *NARROW, environment=ascii_only, input="Grüße")
    assert done.returncode == 2 and "standard input cannot be read" in done.stderr and "PYTHONIOENCODING" in done.stderr


def test_text_that_the_output_cannot_take_is_named(monkeypatch, capsys):
    monkeypatch.setitem(RUNS, "info", lambda args: print("Grüße") or 0)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(["info"]) == 1
    assert "is in ascii, which has no 'üß'; expected UTF-8" in capsys.readouterr().err


def test_argument_that_is_no_text_is_refused():
    done = subprocess.run([*MODULE, "generate", b"caf\xe9"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 2 and b"expected text in UTF-8" in done.stderr


def test_every_command_has_its_run():
    assert [*RUNS] == [command.name for command in COMMANDS]


def test_pipe_in_and_json_out():
    done = programs.run(*MODULE[1:], "generate", "--json", "--watch", *NARROW, input=f"{DATE}\n\n{OTHERS[0]}\n")
    assert done.returncode == 0, done.stderr
    assert [(row["prompt"], row["text"]) for row in map(json.loads, done.stdout.splitlines())] == list(DATES.items())[:2]
    assert "step  1" in done.stderr and "^" in done.stderr


def test_installed_script_registers_the_auto_classes(tmp_path):
    """The package leaves its imports to the console in a process that is one; the console must then make up for it."""
    target = re.search(r'"diffusiongemma = ([\w.]+):(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    script = tmp_path / "diffusiongemma"
    script.write_text(
        f"import sys\nfrom {target[1]} import {target[2]}\ncode = {target[2]}()\nimport modeling_diffusiongemma\n"
        "modeling_diffusiongemma.default_checkpoint()\nsys.exit(code)\n"
    )
    done = programs.run(script, "info", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["parameters"] > 1e6, done.stderr


def test_another_program_that_imports_the_package_gets_all_of_it(tmp_path):
    """Only the console's own script and `-m` may leave the imports out."""
    script = tmp_path / "diffusiongemma.py"
    script.write_text("import modeling_diffusiongemma\nprint(modeling_diffusiongemma.DiffusionGemmaForMaskedBlockLM.__name__)\n")
    done = programs.run(script, "-m", "modeling_diffusiongemma")
    assert done.stdout.strip() == "DiffusionGemmaForMaskedBlockLM", done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_in_a_terminal_redraws_the_canvas_and_leaves_the_answer():
    import pty

    keyboard, terminal = pty.openpty()
    name = os.ttyname(terminal)
    variables = {"TERM": "xterm", "NO_COLOR": None}
    chat = programs.start(*MODULE[1:], "chat", *NARROW, environment=variables, stdin=name, stdout=name, stderr=name)
    os.write(keyboard, f"{DATE}\n/exit\n".encode())
    shown, more = b"", True
    while chat.is_alive() or more:  # this process holds the terminal open, too: it gives no end
        more = bool(select.select([keyboard], [], [], 0.1)[0])
        shown += os.read(keyboard, 4096) if more else b""
    os.close(keyboard)
    os.close(terminal)
    assert chat.exitcode == 0, shown
    text = shown.decode()
    assert "\033[1;32m" in text, "no accepted token was drawn in green"
    wiped = text.rindex("A\033[J")
    assert text.index("step 1") < wiped < text.rindex(DATES[DATE])


# Usage


def test_every_example_of_the_help_is_a_command_line_that_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "my-checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "diffusion_gemma"}')
    for command in COMMANDS:
        lines = [line for line in command.examples.splitlines() if "diffusiongemma " in line]
        assert lines, command.name
        for line in lines:
            words = shlex.split(line, comments=True)
            words = words[words.index("diffusiongemma") + 1 :]
            cut = next((place for place, word in enumerate(words) if word in ("|", ">")), len(words))
            read = parse if command.hands_on else build_parser().parse_args
            assert read(words[:cut]).command == command.name, line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that are no checkpoint."""
    folder = tmp_path_factory.mktemp("folders")
    for name, config in {"no_config": None, "other_model": '{"model_type": "llama"}', "broken_config": "{"}.items():
        (folder / name).mkdir()
        if config is not None:
            (folder / name / "config.json").write_text(config)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "no_weights").mkdir()
    config = Path(default_checkpoint(), "config.json").read_text(encoding="utf-8")
    for name, text in {"config.json": config, "prompts": "\n \n"}.items():
        (folder / "no_weights" / name).write_text(text)
    return folder


WRONG = {  # command line, with {} for the folders above: what standard error must say
    "": "COMMAND",
    "paint": "'paint'",
    "generate hello --model nothing": "'nothing' is no checkpoint; expected one of ['decisions', 'sudoku', 'text', 'tools'], a folder",
    "generate hello --model {}/no_config": "has no config.json",
    "generate hello --model {}/adapter": "holds an adapter; expected a checkpoint's: the adapter's base, beside `--adapter`",
    "generate hello --model {}/other_model": "`model_type` 'llama'; expected 'diffusion_gemma'",
    "info --model {}/broken_config": "is not a JSON object",
    "generate hello --dtype int8": "'int8'",
    "generate hello --device gpu": "`--device` is 'gpu'; expected cpu, cuda",
    "generate hello --device cuda:99": "`--device` is 'cuda:99'",
    "generate hello --seed -1": "'-1'; expected an integer >= 0",
    "generate hello --max-new-tokens 0": "'0'; expected an integer >= 1",
    "generate hello --preset slow": "'slow'",
    "generate hello --set entropy_bound": "expected NAME=VALUE",
    "generate hello --model {}/no_weights --set entropy_bund=1": "entropy_bund",
    "generate hello --model {}/no_weights --set num_beams=4": "a canvas has no beams",
    "generate hello --model {}/no_weights --set entropy_bound=-1": "`entropy_bound` is -1",
    "generate hello --max-new-tokens 3 --set max_new_tokens=4": "both given",
    "generate hello --set max_denoising_steps=3 --set max_denoising_steps=4": "`--set max_denoising_steps=...` is given twice",
    "generate hello --set entropy_bund=null": "`--set entropy_bund=...` is no setting of generation",
    "generate hello --set seed=3": "expected `--seed`",
    "generate hello --set streamer=1": "`--set streamer=...` is no setting",
    "generate hello --set return_dict_in_generate=false": "return_dict_in_generate",
    "generate": "holds no prompt",
    "generate --file {}/nowhere": "nowhere",
    "generate --file {}/no_weights/prompts": "holds no prompt",
    "generate hello --file {}/no_weights/prompts": "expected one or the other",
    "generate hello --watch --batch-size 2": "`--batch-size` is 2; expected 1",
    "generate hello --watch --set num_return_sequences=2": "`num_return_sequences` is above 1",
    "generate hello --raw --system text": "`--raw` and `--system`",
    "chat --set num_return_sequences=2": "`num_return_sequences` is above 1",
    "bench --set decoding=autoregressive": "decoding",
    "bench --steps 1": "expected an integer >= 2",
    "generate hello --quantize int8": "argument --quantize: got 'int8'; expected fp8 or 4bit",
    "chat --max-memory 12": "argument --max-memory: got '12'; expected a size, such as 12GB or 12GiB, or DEVICE=SIZE",
    "bench --max-memory 0=20GB,40GB": "got '0=20GB,40GB'; expected a size",
    "bench --max-memory disk=20GB": "got 'disk=20GB'",
    "generate hello --max-memory cpu=1GB,cpu=2GB": "expected each device once",
    "generate hello --max-memory 99=1GB": "`--max-memory` names 99; expected some of [",
    "generate hello --max-memory 0=1GB --device cpu": "`--max-memory` names 0; expected some of ['cpu']",
    "generate hello --offload-folder {}/no_weights/config.json": "argument --offload-folder: got",
    "generate hello --offload-folder {}/no_weights/config.json/new": "expected a folder that can be written (Not a directory)",
    "export {}/no_weights": "is not empty; expected a new or empty one, or `--overwrite`",
    "export {}/no_weights/config.json": "which is a file",
    "export {}/new --max-shard-size lots": "'lots'; expected a number and KB, MB, GB or TB",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage_is_named_and_exits_with_2(line, console, folders):
    code, out, err = console(*line.format(folders).split())
    assert code == 2 and out == "" and WRONG[line] in err, err


def test_failed_job_exits_with_1(console, folders, tmp_path):
    for line in (
        f"generate hello --model {folders}/no_weights",
        "generate hello --model nobody/nothing",
        f"info --model {folders}/no_weights",
    ):
        code, out, err = console(*line.split())
        assert (code, out) == (1, "") and "error: " in err and "Traceback" not in err, line


# generate


def test_each_prompt_gets_its_answer_in_order(console):
    code, out, _ = console("generate", *DATES, "--batch-size", "2", *NARROW)
    assert code == 0 and out.splitlines() == list(DATES.values())


def test_file_standard_input_and_arguments_say_the_same(console, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{DATE}\n\n{OTHERS[0]}")
    expected = console("generate", DATE, OTHERS[0], "--seed", "0", *NARROW)
    assert console("generate", "--file", str(tmp_path / "prompts.txt"), "--seed", "0", *NARROW) == expected
    assert console("generate", "--file", "-", "--seed", "0", *NARROW, stdin=f"{DATE}\r\n{OTHERS[0]}\n") == expected


def test_whole_input_is_one_prompt(answers):
    letter = "Write 3 March 1998\nas an ISO date."
    assert [row["prompt"] for row in answers("generate", "--whole", *NARROW, stdin=f"{letter}\n")] == [letter]


def test_raw_prompt_goes_without_the_chat_template(answers):
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": DATE}], tokenize=False, add_generation_prompt=True)
    templated, raw = answers("generate", DATE, "--seed", "0", *NARROW)[0], answers("generate", rendered, "--raw", "--seed", "0", *NARROW)[0]
    assert raw | {"prompt": DATE} == templated


def test_answer_says_what_it_cost_and_why_it_ended(answers):
    (row,) = answers("generate", DATE, "--seed", "3", *NARROW)
    assert row["text"] == DATES[DATE] and row["finish_reason"] == "stop" and row["seed"] == 3
    assert row["tokens"] == pytest.approx(row["tokens_per_forward"] * row["denoising_steps"]) == 11  # ten characters and the end
    (cut,) = answers("generate", DATE, "--seed", "3", "--set", "canvas_length=16", "--max-new-tokens", "4")
    assert cut["text"] == DATES[DATE][:4] and cut["finish_reason"] == "length" and cut["tokens"] == 4
    (full,) = answers("generate", DATE, "--seed", "3", "--set", "canvas_length=16", "--max-new-tokens", "11")
    assert full["text"] == DATES[DATE] and full["finish_reason"] == "stop" and full["tokens"] == 11
    hurried = ["--max-new-tokens", "99", "--set", "canvas_length=4", "--set", "max_time=1e-9"]
    (late,) = answers("generate", DATE, "--seed", "3", *hurried)
    assert late["finish_reason"] == "time" and late["tokens"] == 4
    (stopped,) = answers("generate", DATE, "--seed", "3", "--set", "stop_strings=1998-", *NARROW)
    assert stopped["text"] == "1998-" and stopped["finish_reason"] == "stop"


def test_reported_seed_gives_the_answer_again_and_rows_do_not_depend_on_the_batch(answers):
    free = ["--model", "sudoku", "--set", "max_denoising_steps=6"]
    puzzles = ["." * 81, PUZZLE]  # the first has more solutions than anyone could count
    first = answers("generate", *puzzles, *free)
    assert answers("generate", *puzzles, "--batch-size", "2", "--seed", str(first[0]["seed"]), *free) == first
    assert answers("generate", *puzzles, *free)[0]["text"] != first[0]["text"]


def test_preset_and_settings_reach_generate(answers):
    fast = answers("generate", "zebra", "--seed", "0", "--preset", "fast", *NARROW)[0]
    assert fast["denoising_steps"] <= PRESETS["fast"]["max_denoising_steps"]
    one = answers("generate", "zebra", "--seed", "0", "--preset", "fast", "--set", "max_denoising_steps=1", *NARROW)[0]
    assert one["denoising_steps"] == 1


def test_one_object_for_every_returned_sequence(answers):
    rows = answers("generate", DATE, OTHERS[0], "--batch-size", "2", "--set", "num_return_sequences=2", *NARROW)
    assert [row["prompt"] for row in rows] == [DATE, DATE, OTHERS[0], OTHERS[0]]


def test_reference_backend_takes_the_seed(answers):
    rows = [answers("generate", DATE, "--seed", "5", "--set", "backend=reference", *NARROW) for _ in range(2)]
    assert rows[0] == rows[1] and rows[0][0]["text"] == DATES[DATE]


def test_placement_and_dtype(answers):
    (row,) = answers("generate", DATE, "--device", "auto", "--dtype", "bfloat16", *NARROW)
    assert row["text"] == DATES[DATE]


@pytest.fixture
def loaded(monkeypatch):
    """The models that the console loads."""
    models, load = [], session.load_model
    monkeypatch.setattr(session, "load_model", lambda *args, **kwargs: models.append(load(*args, **kwargs)) or models[-1])
    return models


@pytest.mark.parametrize("name, kind", [("fp8", FP8Experts), ("4bit", FourBitExperts)])
def test_quantize_loads_the_quantised_model(answers, loaded, name, kind):
    if name == "4bit":
        pytest.importorskip("bitsandbytes")
    (row,) = answers("generate", DATE, "--quantize", name, *NARROW)
    assert row["text"] == DATES[DATE] and type(loaded[0].model.decoder.layers[0].experts) is kind


@pytest.mark.parametrize("line, places", [
    ("--max-memory 5MB", {"cpu", "disk"}), ("--max-memory cpu=100KB --device cpu", {"disk"}), ("--max-memory 1GB --device auto", {"cpu"}),
    ("--offload-folder {}", {"cpu"}), ("--max-memory cpu=5MB --offload-folder {} --dtype bfloat16", {"cpu", "disk"}),
    ("--quantize fp8 --max-memory 1GiB", {"cpu"}),
])  # fmt: skip
def test_memory_that_weights_may_take_is_kept_to(answers, loaded, tmp_path, line, places):
    """Where everything is on the disk inputs used to be put on the meta device, too."""
    (row,) = answers("generate", DATE, *line.format(tmp_path / "new").split(), *NARROW)
    assert row["text"] == DATES[DATE] and set(getattr(loaded[0], "hf_device_map", {"": "cpu"}).values()) == places


def test_every_command_that_loads_takes_the_placement(answers, loaded):
    given = ["--quantize", "fp8", "--max-memory", "1GB", *NARROW]
    assert [row["text"] for row in answers("chat", *given, stdin=f"{DATE}\n")] == [DATES[DATE]]
    assert answers("bench", *given, "--rounds", "1", "--steps", "2")[0]["ms_per_step"] > 0
    assert [type(model.model.decoder.layers[0].experts) for model in loaded] == [FP8Experts] * 2


def test_weights_that_would_be_quantised_onto_the_disk_are_refused(console):
    """They used to be read from there as they are in the checkpoint, without their scales: nonsense, and no word of it."""
    code, _, err = console("generate", DATE, "--quantize", "fp8", "--max-memory", "2MB", *NARROW)
    assert code == 1 and "quantised while they are loaded would go to the disk; expected memory for them (`max_memory=`)" in err


def test_sizes_are_those_of_devices_in_bytes():
    assert memory("0=20GB, cpu=1.5 GiB+mps=3kb") == {0: 20_000_000_000, "cpu": 3 * 2**29, "mps": 3000}
    assert memory("12gb") == {"gpu": 12_000_000_000}
    assert loading_arguments("cpu", max_memory=memory("12GB")) == {"dtype": "auto", "device_map": "auto", "max_memory": {"cpu": 12 * 10**9}}


def test_progress_is_shown_in_a_terminal_alone(console, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert console("generate", *DATES, *NARROW)[:2] == (0, "".join(f"{answer}\n" for answer in DATES.values()))
    assert "3/3" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    console("generate", *DATES, *NARROW)
    assert pipe.getvalue() == ""


def test_sudoku_by_its_short_name(answers):
    (row,) = answers("generate", PUZZLE, "--model", "sudoku", "--seed", "0")
    assert re.fullmatch(r"[1-9.]{81}", row["text"]) and row["tokens"] == 81


# chat


def test_chat_remembers_until_it_is_reset(answers, console):
    turns = answers("chat", *NARROW, "--no-watch", stdin=f"{DATE}\n{DATE}\n/reset\n{DATE}\n")
    assert [row["text"] for row in (turns[0], turns[2])] == [DATES[DATE]] * 2
    first, second, third = (row["prompt_tokens"] for row in turns)
    assert first == third < second, "the second turn holds the first"
    assert answers("chat", *NARROW, stdin="/exit\nnever reached\n") == []


def test_chat_shows_the_canvas_on_standard_error_alone(console):
    code, out, err = console("chat", *NARROW, stdin=f"{DATE}\n/dance\n/help\n")
    assert (code, out) == (0, f"{DATES[DATE]}\n")
    assert "step  1" in err and "'/dance' is no command" in err and err.count("/reset forgets") == 2
    assert "step" not in console("chat", "--no-watch", *NARROW, stdin=f"{DATE}\n")[2]


def test_chat_forgets_a_turn_that_fails_and_goes_on(console):
    long = "Write " + "very " * 40
    limit = ["--set", "canvas_length=16", "--set", "max_length=50"]
    code, out, err = console("chat", "--no-watch", *limit, stdin=f"{long}\n{DATE}\n")
    assert (code, out) == (1, f"{DATES[DATE]}\n") and "`max_length` is 50" in err and "the turn is forgotten" in err


def test_no_drawn_line_is_longer_than_the_terminal():
    cells = [Cell(text, "accepted") for text in ("ab", "cde", "f", "\u4e2d", "g", "hij")]  # the fourth is two columns wide
    assert wrapped(5, 9)(cells, lambda cell: cell.text).splitlines() == ["abcde", "f\u4e2dg", "hij"]
    assert wrapped(5, 2)(cells, lambda cell: cell.text).splitlines() == ["f\u4e2dg", "hij"]


# bench


def test_bench_measures_and_names_the_setting(answers, console):
    arguments = ["bench", "--rounds", "2", "--steps", "3", "--batch-size", "2", *NARROW]
    (row,) = answers(*arguments)
    assert min(row[name] for name in ("ms_per_step", "tokens_per_second", "tokens_per_forward", "steps_per_canvas", "peak_memory_mib")) > 0
    assert row["batch_size"] == 2 and row["dtype"] == "float32" and row["canvas_length"] == 16 and row["torch"] == torch.__version__
    assert row["tokens_per_forward"] * row["steps_per_canvas"] == pytest.approx(11)
    code, out, _ = console(*arguments)
    assert code == 0 and re.search(r"\| ms per denoising step \| [\d.,]+ \|", out) and "batch size 2" in out


# export


def test_export_writes_a_repository_that_brings_its_code(answers, tmp_path):
    folder = tmp_path / "repository"
    (about,) = answers("export", str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert "AutoModelForCausalLM" in config["auto_map"] and {"tokenizer.json", "model.safetensors"} <= set(about["files"])
    script = (
        "from transformers import pipeline; import sys; sys.modules['modeling_diffusiongemma'] = None\n"
        f"generator = pipeline('text-generation', model={str(folder)!r}, trust_remote_code=True)\n"
        f"print(generator([{{'role': 'user', 'content': {DATE!r}}}], canvas_length=16, max_new_tokens=16)[0]['generated_text'][-1])"
    )
    done = programs.run("-c", script, cwd=tmp_path)
    assert done.returncode == 0 and DATES[DATE] in done.stdout, done.stderr


def test_interruption_while_the_package_is_imported_is_one_line():
    """It was a traceback through whatever was imported just then. The times of imports tell when torch is on its way."""
    command = [sys.executable, "-X", "importtime", "-m", "modeling_diffusiongemma", "generate", "hello"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where these tests run in the background, it is ignored
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert any("torch" in line for line in running.stderr)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode in (-signal.SIGINT, 130) and out == ""
    assert "Traceback" not in err and err.splitlines().count("interrupted") == 1
