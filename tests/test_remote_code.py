"""Repositories that carry their own code: what is written, and how it loads where this package is not installed.

The clean processes below cannot import the package, ask no network, and have a cache of modules of their own.
"""

import ast
import base64
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny import ours
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, DiffusionGemmaForBlockDiffusion
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint, drop_in
from modeling_diffusiongemma.layers.experts import Experts
from modeling_diffusiongemma.layers.masks import prompt_mask
from modeling_diffusiongemma.version import VERSION
from modeling_diffusiongemma.weights.auto import REGISTERED
from modeling_diffusiongemma.weights.fp8_quantizer import FP8Quantizer
from modeling_diffusiongemma.weights.remote_code import ENTRY, flat_name, travelling_files

ROOT = Path(__file__).parents[1]
REQUIRED = {"accelerate", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
HUB_NAME, COMMIT = "some-org/tiny-canvas", "0123456789abcdef0123456789abcdef01234567"
NARROW = {"canvas_length": 16, "max_new_tokens": 16, "seed": 3}
CHAT = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]
MODEL_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
HEAD, EXPERTS, QUANTIZER, MASKS = (
    flat_name(ours.__module__) for ours in (DiffusionGemmaForMaskedBlockLM, Experts, FP8Quantizer, prompt_mask)
)

CLEAN = """
import json, sys
from pathlib import Path

class NotInstalled:  # also where a checkout is installed in editable mode
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_diffusiongemma", "generation"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, pipeline
torch.set_num_threads(1)
arguments, answer = json.loads(sys.argv[1]), {}
"""
WITH_FLAG = """
name, out = arguments["name"], arguments["out"]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
answer["modules"] = {auto: type(getattr(transformers, auto).from_pretrained(name, trust_remote_code=True)).__module__
                     for auto in arguments["autos"]}
answer["shared"] = isinstance(AutoModel.from_pretrained(name, trust_remote_code=True), type(model.model))
tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer.apply_chat_template(arguments["chat"], add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer["tokens"] = model.generate(**inputs, **arguments["settings"]).tolist()
write = pipeline("text-generation", model=name, trust_remote_code=True)
answer["pipeline"] = write(arguments["chat"], **arguments["settings"])[0]["generated_text"][-1]
for kind, remote_code in (("default", None), ("code", True), ("plain", False)):
    model.save_pretrained(f"{out}/{kind}", remote_code=remote_code)
base = AutoModel.from_pretrained(name, trust_remote_code=True)
base.save_pretrained(f"{out}/base")
again = AutoModelForCausalLM.from_pretrained(f"{out}/base", trust_remote_code=True)
answer["from_base"] = all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
"""
WITHOUT_FLAG = """
marker = Path(arguments["marker"])
def error(load):
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
for name in (arguments["folder"], arguments["name"]):
    model = AutoModelForImageTextToText.from_pretrained(name)
    torch.manual_seed(0)
    sequences = model.generate(torch.tensor([[2, 200, 201, 202]]), max_new_tokens=5).sequences
    answer[name] = {
        "class": type(model).__module__, "tokens": sequences.tolist(),
        "config": type(AutoConfig.from_pretrained(name)).__module__, "tokenizer": len(AutoTokenizer.from_pretrained(name)),
        "asked": error(lambda: AutoModelForCausalLM.from_pretrained(name)),
        "refused": error(lambda: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)),
    }
answer["run without the flag"] = marker.exists()
answer["broken"] = {name: error(lambda: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True))
                    for name in arguments["broken"]}
answer["run by a broken repository"] = marker.exists()
AutoModelForCausalLM.from_pretrained(arguments["folder"], trust_remote_code=True)
answer["run with the flag"] = marker.exists()
"""

TWO = """
def code(model):
    return sibling(model, arguments["head"]).CODE

def sibling(model, name):
    return sys.modules[type(model).__module__.rpartition(".")[0] + "." + name]

def result(model):
    with torch.no_grad():
        return model.prefill(torch.tensor([[2, 200, 201, 202]])).last_hidden_state.sum().item()

def quantized_by_itself(name, model):
    quantizer = sibling(model, arguments["quantizer"])
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, quantization_config=quantizer.FP8Config())
    return type(model.hf_quantizer) is sibling(model, arguments["quantizer"]).FP8Quantizer is quantizer.FP8Quantizer

def error(load):
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

names = arguments["names"]
models = {}
for auto in arguments["autos"]:
    for name in (*names, *names):
        model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True)
        models.setdefault(auto, []).append(model)
for auto, four in models.items():
    answer[auto] = [code(model) for model in four]
causal = models["AutoModelForCausalLM"]
answer["results"] = [result(model) for model in causal]
answer["from_config"] = [code(AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)) for model in causal]
answer["pipelines"] = [code(pipeline("text-generation", model=name, trust_remote_code=True).model) for name in names]
answer["fp8"] = [quantized_by_itself(name, model) for name, model in zip((*names, *names), causal)]
answer["without the flag"] = [error(lambda: AutoModelForCausalLM.from_pretrained(name)) for name in names]
answer["no code"] = error(lambda: AutoModelForCausalLM.from_pretrained(arguments["plain"]))
sys.meta_path.pop(0)
sys.path.insert(0, arguments["root"])
import modeling_diffusiongemma
answer["installed"] = [type(AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)).__module__ for name in names]
answer["results after"] = [result(model) for model in causal]
"""


def clean(script, tmp_path, **arguments):
    """What `script` answers in a process that has neither this package nor a network, nor anything cached."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("HF_")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    if "cache" in arguments:
        environment["HF_HUB_CACHE"] = str(arguments.pop("cache"))
    command = [sys.executable, "-c", f"{CLEAN}{script}print('\\n' + json.dumps(answer))", json.dumps(arguments, default=str)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def hub_cache(cache, name, repository):
    """Lays the files of `repository` out as a download of the Hub repository `name` would."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(repository, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def same_files(one, other, names):
    _, different, unreadable = filecmp.cmpfiles(one, other, names, shallow=False)
    assert different == unreadable == []


@pytest.fixture(scope="module")
def model():
    return DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint())


@pytest.fixture(scope="module")
def repository(model, tmp_path_factory):
    """The shipped checkpoint with its code, tokenizer beside it; read only."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-canvas.v1"  # transformers makes a module name of it
    model.save_pretrained(folder, remote_code=True)
    AutoTokenizer.from_pretrained(default_checkpoint()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def code(repository):
    return sorted(repository.glob("*.py"))


def test_what_the_entry_imports_travels_and_nothing_else(repository, code):
    entry = repository / f"{flat_name(ENTRY)}.py"
    assert {str(path) for path in code} == {str(entry), *get_relative_import_files(entry)}
    kept_home = re.compile(r"\w+(__init__|checkpoints|streaming|terminal)\.py")
    assert len(code) > 30 and [path.name for path in code if kept_home.fullmatch(path.name)] == []


def test_travelling_files_import_each_other_flat_and_only_what_is_required(code):
    """transformers takes every import outside of `try:`, inside functions too, for a requirement."""
    for path in code:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not {"generation", "modeling_diffusiongemma"} & {name.split(".")[0] for name in names}, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and path.with_name(f"{node.module}.py").is_file(), f"{path.name}:{node.lineno}"
        assert set(get_imports(path)) <= REQUIRED | sys.stdlib_module_names, path.name


def test_travelling_files_name_package_version_and_licence(code):
    assert f'version="{VERSION}"' in (ROOT / "setup.py").read_text()
    for path in code:
        first, second = path.read_text().splitlines()[:2]
        origin = re.search(rf"modeling-diffusiongemma {re.escape(VERSION)}, ([\w/]+)\.py;", second)[1]
        assert first == "# SPDX-License-Identifier: Apache-2.0" and (ROOT / f"{origin}.py").is_file()
        assert path.stem == flat_name(origin.replace("/", "."))


def saved_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_repository_holds_weights_settings_code_and_card(repository, code):
    names = {path.name for path in repository.iterdir()}
    assert names == MODEL_FILES | {path.name for path in code} | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert saved_config(repository)["auto_map"] == {auto: f"{flat_name(ENTRY)}.{name}" for auto, name in REGISTERED.items()}
    assert saved_config(repository)["architectures"] == ["DiffusionGemmaForBlockDiffusion"]
    assert "trust_remote_code=True" in (repository / "README.md").read_text()


def test_plain_save_names_no_code(repository, tmp_path):
    """Neither after a save with code, nor from a config that was loaded with an `auto_map`."""
    model = AutoModelForCausalLM.from_pretrained(repository)
    assert type(model) is DiffusionGemmaForMaskedBlockLM and model.config.auto_map
    model.config.auto_map["AutoOther"] = "other.Other"
    model.save_pretrained(tmp_path / "code", remote_code=True)
    model.save_pretrained(tmp_path / "plain")
    assert saved_config(tmp_path / "plain")["auto_map"] == {"AutoOther": "other.Other"}
    assert saved_config(tmp_path / "code")["auto_map"].keys() == {*REGISTERED, "AutoOther"}
    assert {path.name for path in (tmp_path / "plain").iterdir()} == MODEL_FILES - {"README.md"}
    del model.config.auto_map
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in saved_config(tmp_path / "plain")


def test_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    ours().save_pretrained(tmp_path, remote_code=True)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_class_registered_for_an_auto_class_saves_its_code(monkeypatch, tmp_path):
    """transformers' own way of asking for it; its own copying would leave out what the head imports from `generation`."""
    monkeypatch.setattr(DiffusionGemmaForMaskedBlockLM, "_auto_class", None)
    DiffusionGemmaForMaskedBlockLM.register_for_auto_class("AutoModelForCausalLM")
    ours().save_pretrained(tmp_path / "code")
    ours().save_pretrained(tmp_path / "plain", remote_code=False)
    assert {path.name for path in (tmp_path / "code").glob("*.py")} == set(travelling_files())
    assert saved_config(tmp_path / "code")["auto_map"].keys() == REGISTERED.keys()
    assert list((tmp_path / "plain").glob("*.py")) == [] and "auto_map" not in saved_config(tmp_path / "plain")


def test_remote_code_that_is_no_boolean_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`remote_code` is 'yes'"):
        ours().save_pretrained(tmp_path / "none", remote_code="yes")
    assert not (tmp_path / "none").exists()


def test_folder_of_adapters_loads_over_the_base_model(tmp_path, adapters_of_transformers):
    """A config.json among them made transformers look for the whole weights there."""
    peft = pytest.importorskip("peft")
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint())
    model.add_adapter(peft.LoraConfig(target_modules=r"model\.decoder\.layers.*q_proj", r=2, init_lora_weights=False))
    with pytest.raises(ValueError, match="`remote_code` is True.*adapters"):
        model.save_pretrained(tmp_path, remote_code=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[2, 200, 201]])
    with torch.no_grad():
        assert torch.equal(again.prefill(ids).last_hidden_state, model.prefill(ids).last_hidden_state)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload needs. What was committed lands in `server.files`."""

    def answer(self, status, content=None, **headers):
        body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer(200, {"url": f"{self.server.url}/{HUB_NAME}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.server.url}/{HUB_NAME}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer(404)

    def do_GET(self):
        name = self.path.split("/")[-1]
        if "/resolve/" in self.path and name in self.server.files:
            content = self.server.files[name]
            self.answer(200, content, ETag=f'"{hash(content)}"', X_Repo_Commit=COMMIT)
        elif "/resolve/" in self.path:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, {"id": HUB_NAME, "modelId": HUB_NAME, "sha": COMMIT, "siblings": [], "private": False, "tags": []})

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.created = f"http://127.0.0.1:{server.server_port}", {}, []
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_pushing_uploads_what_saving_writes(hub, tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "saved", remote_code=True)
    commit = model.push_to_hub(HUB_NAME, remote_code=True, tags=["mine"], private=True)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert commit.oid == COMMIT and hub.files.keys() == saved.keys() and "private" in str(hub.created)
    card = hub.files["README.md"].decode()
    assert f'from_pretrained("{HUB_NAME}", trust_remote_code=True)' in card and "- mine" in card
    assert {name: hub.files[name] for name in saved if name != "README.md"} == {
        name: content for name, content in saved.items() if name != "README.md"
    }


def test_pushing_with_a_wrong_argument_creates_nothing(hub):
    with pytest.raises(ValueError, match="`remote_code` is 'yes'"):
        ours().push_to_hub(HUB_NAME, remote_code="yes")
    assert hub.created == []


def test_pushing_without_code_keeps_the_card_of_the_repository(hub):
    hub.files["README.md"] = b"---\ntags:\n- old\n---\nmine\n"
    ours().push_to_hub(HUB_NAME, tags=["new"])
    assert hub.files.keys() == MODEL_FILES and "auto_map" not in json.loads(hub.files["config.json"])
    assert hub.files["README.md"].decode() == "---\ntags:\n- old\n- new\n---\nmine\n"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_clean_process_runs_the_code_of_the_repository(place, repository, model, tmp_path):
    name = HUB_NAME if place == "hub" else repository
    if place == "hub":
        hub_cache(tmp_path / "cache", HUB_NAME, repository)
    arguments = {"name": name, "out": tmp_path, "autos": list(REGISTERED), "chat": CHAT, "settings": NARROW, "cache": tmp_path / "cache"}
    answer = clean(WITH_FLAG, tmp_path, **arguments)
    assert len(answer["modules"]) == 4 and answer["shared"]
    assert all(module.startswith("transformers_modules.") for module in answer["modules"].values())

    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert answer["tokens"] == model.generate(**inputs, **NARROW).tolist()
    assert answer["pipeline"] == {"role": "assistant", "content": "2052-10-02"}

    files = MODEL_FILES | {path.name for path in repository.glob("*.py")}
    for kind in ("default", "code"):
        assert {path.name for path in (tmp_path / kind).iterdir()} == files
        same_files(repository, tmp_path / kind, files)
    assert {path.name for path in (tmp_path / "plain").iterdir()} == MODEL_FILES - {"README.md"}
    assert "auto_map" not in saved_config(tmp_path / "plain")
    same_files(default_checkpoint(), tmp_path / "plain", ["model.safetensors"])
    same_files(repository, tmp_path / "base", files - MODEL_FILES)
    assert saved_config(tmp_path / "base")["architectures"] == ["DiffusionGemmaModel"] and answer["from_base"]


def planted(repository, target, marker):
    """A copy whose code says that it was run."""
    shutil.copytree(repository, target)
    path = target / f"{flat_name(ENTRY)}.py"
    path.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n{path.read_text()}")
    return target


def broken(repository, target, fault):
    shutil.copytree(repository, target)
    if fault == "file missing":
        (target / f"{MASKS}.py").unlink()
    elif fault == "syntax error":
        (target / f"{MASKS}.py").write_text("def prompt_mask(:\n")
    elif fault == "unknown package":
        path = target / f"{flat_name(ENTRY)}.py"
        path.write_text(f"import no_such_package\n{path.read_text()}")
    else:
        path = target / "config.json"
        path.write_text(path.read_text().replace(f"{flat_name(ENTRY)}.DiffusionGemmaForMasked", f"{flat_name(ENTRY)}.Absent"))
    return target


FAULTS = {  # the error from a folder, and from the Hub: offline, a file that a repository lacks is one that was never downloaded
    "file missing": (rf"^FileNotFoundError: .*{MASKS}\.py", "^OSError: .*cached files"),
    "syntax error": (rf"^SyntaxError: .*{MASKS}\.py", "^SyntaxError: "),
    "unknown package": ("^ImportError: .*no_such_package",) * 2,
    "class missing": ("^AttributeError: .*Absent",) * 2,
}


@pytest.mark.slow
def test_code_runs_with_the_flag_alone_and_broken_code_is_named(repository, tmp_path):
    marker, cache = tmp_path / "marker", tmp_path / "cache"
    folder = planted(repository, tmp_path / "planted", marker)
    hub_cache(cache, HUB_NAME, folder)
    damaged = {}
    for fault, messages in FAULTS.items():
        path = broken(repository, tmp_path / fault.replace(" ", "_"), fault)
        hub_cache(cache, f"some-org/{path.name}", path)
        damaged |= zip((str(path), f"some-org/{path.name}"), messages, strict=True)
    answer = clean(WITHOUT_FLAG, tmp_path, folder=folder, name=HUB_NAME, marker=marker, broken=list(damaged), cache=cache)

    oracle = DiffusionGemmaForBlockDiffusion.from_pretrained(repository)
    torch.manual_seed(0)
    tokens = oracle.generate(torch.tensor([[2, 200, 201, 202]]), max_new_tokens=5).sequences.tolist()
    for name in (str(folder), HUB_NAME):
        found = answer[name]
        assert found["class"].startswith("transformers.models.") and found["config"].startswith("transformers.models.")
        assert found["tokens"] == tokens and found["tokenizer"] > 0
        for way in ("asked", "refused"):
            assert found[way].startswith("ValueError: ") and "trust_remote_code=True" in found[way], (name, way)
    assert not answer["run without the flag"] and not answer["run by a broken repository"] and answer["run with the flag"]
    for name, message in damaged.items():
        assert answer["broken"][name] and re.search(message, answer["broken"][name]), (name, answer["broken"][name])


def recoded(repository, target, number):
    """A copy with other code: it says its number, and adds it to what the experts compute."""
    shutil.copytree(repository, target)
    head, experts = target / f"{HEAD}.py", target / f"{EXPERTS}.py"
    head.write_text(f"{head.read_text()}\nCODE = {number}\n")
    line = "return EXPERTS_FUNCTIONS.get(way, eager_experts)(self, *args)"
    assert experts.read_text().count(line) == 1
    experts.write_text(experts.read_text().replace(line, f"{line} + {number}"))
    return target


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_two_repositories_in_one_process_each_run_their_own_code(place, repository, model, tmp_path):
    """The first one's class, once registered, counted as local code, and its experts went by the names of everybody's."""
    folders = [recoded(repository, tmp_path / name / "canvas", number) for name, number in (("one", 2), ("two", 3))]
    cache = tmp_path / "cache"
    for folder in folders:
        hub_cache(cache, f"org-{folder.parent.name}/canvas", folder)
    names = folders if place == "folder" else ["org-one/canvas", "org-two/canvas"]
    model.save_pretrained(tmp_path / "plain")
    arguments = {"names": names, "autos": list(REGISTERED), "plain": tmp_path / "plain", "root": ROOT, "cache": cache}
    arguments |= {"head": HEAD, "quantizer": QUANTIZER}
    answer = clean(TWO, tmp_path, **arguments)
    assert [answer[auto] for auto in REGISTERED] == [[2, 3, 2, 3]] * len(REGISTERED)
    assert answer["from_config"] == [2, 3, 2, 3] and answer["pipelines"] == [2, 3] and answer["fp8"] == [True] * 4
    first, second, *again = answer["results"]
    assert again == [first, second] and abs(first - second) > 1e-3
    # Neither is asked for by the other's flag.
    assert all(error.startswith("ValueError: ") and "trust_remote_code=True" in error for error in answer["without the flag"])
    assert answer["no code"].startswith("ValueError: Unrecognized configuration class")
    # Who imports the package asks for its code from then on; what was loaded before stays what it is.
    assert answer["installed"] == [DiffusionGemmaForMaskedBlockLM.__module__] * 2 and answer["results after"] == answer["results"]


def test_installed_package_wins_over_the_code_of_a_repository(repository, tmp_path):
    folder = planted(repository, tmp_path / "planted", tmp_path / "marker")
    for auto, expected in (
        (AutoModelForCausalLM, DiffusionGemmaForMaskedBlockLM),
        (AutoModelForImageTextToText, drop_in.DiffusionGemmaForBlockDiffusion),
    ):
        assert type(auto.from_pretrained(folder, trust_remote_code=True)) is expected
    assert not (tmp_path / "marker").exists()
