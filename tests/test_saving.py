"""Saving over a folder: what is there afterwards is the old checkpoint or the new one, whatever is killed when, and nothing else."""

import contextlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_oracle, same_weights
from transformers import AutoModelForCausalLM, DiffusionGemmaForBlockDiffusion
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint
from modeling_diffusiongemma.quantize import quantize_checkpoint
from modeling_diffusiongemma.weights.saving import FINISHED, finish, put_in_place, replacing, staging

ROOT = Path(__file__).parents[1]
ONE_FILE = {"config.json", "generation_config.json", "model.safetensors"}
CASES = (
    "weights alone", "equal shards", "shards to one file", "one file to shards", "other config", "code", "adapters", "fp8", "quantized",
    "trained", "exported",
)  # fmt: skip


def need_adapters():
    """Skips where transformers takes no adapters of the installed PEFT."""
    pytest.importorskip("peft")
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))


def killed(folder, times, *cases):
    """What `save_and_be_killed.py` finds: case to one entry a kill, and one of a last save that nobody disturbed."""
    paths = (ROOT, ROOT / "tests", ROOT / "examples", ROOT / "benchmarks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "save_and_be_killed.py"), str(folder), str(times), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    print(done.stderr[-3000:])  # shown where a test fails: why a child did
    assert done.returncode == 0
    found = {case: [] for case in cases}
    for line in done.stdout.splitlines():
        entry = json.loads(line)
        found[entry.pop("case")].append(entry)
    return found


@pytest.fixture(scope="module")
def every_kill(tmp_path_factory):
    pytest.importorskip("peft")
    try:
        need_adapters()
        cases = CASES
    except pytest.skip.Exception:
        cases = [case for case in CASES if case != "adapters"]
    return killed(tmp_path_factory.mktemp("killed"), 0, *cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_before_any_change_leaves_the_old_checkpoint_or_the_new_one(case, every_kill):
    """Equal shards of old and new used to load together in silence, and config.json used to be half there."""
    if case == "adapters":
        need_adapters()
    *found, last = every_kill[case]
    assert last["child"] == 0
    old, seen = last["ours"], [entry["ours"] for entry in found]
    new = seen[-1]
    assert old != new and seen[0] == old or case == "weights alone"  # there one rename decides, the last thing that happens
    changed = seen.index(new)
    assert seen == [old] * changed + [new] * (len(seen) - changed)
    for entry in found:
        assert "mine.txt" in entry["files"]
        # Others cannot finish a move: they load the one or the other, or find no weights. No error but the last speaks of ours.
        assert entry.get("oracle", old) in (old, new) or "Error: " in entry["oracle"]
        assert entry.get("auto", old) in (old, new) or "finished just now, config.json too; load it again" in entry["auto"]
        assert entry.get("auto") == entry["ours"] or "auto" not in entry or case == "other config"
    if "oracle" in found[0] and case != "weights alone":
        assert sum("Error: " in entry["oracle"] for entry in found) > 1
    assert not [name for name in last["files"] if name.split("/")[-1][0] == "."]


@pytest.mark.slow
def test_killed_fifty_times_at_random_moments_leaves_one_of_two_checkpoints(tmp_path):
    *found, last = killed(tmp_path, 50, "equal shards")["equal shards"]
    assert last["child"] == 0 and len(found) == 50 and all(entry["child"] == -9 for entry in found)
    assert {str(entry["ours"]) for entry in found} <= {"[1.0, 10, 1]", "[2.0, 10, 2]"} and last["ours"] == [1.0, 10, 1]
    assert [name for entry in found for name in entry["files"] if name[0] == "."]  # one was killed while it wrote, the next cleared up
    assert not [name for name in last["files"] if name[0] == "."]


@pytest.fixture
def model():
    return same_weights(build_oracle())


def names(folder):
    return {path.name for path in folder.iterdir()}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_child(run):
    """What `run()` in a process of its own returned or raised, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = str(run())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_nothing_of_the_old_weights_remains_to_be_loaded(model, tmp_path):
    """`model.safetensors` is found before an index: a sharded save over it used to load as what was there before."""
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.decoder.norm.weight.add_(1)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert "model.safetensors" not in names(tmp_path)
    equal(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    oracle = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)
    assert torch.equal(oracle.model.decoder.norm.weight, model.model.decoder.norm.weight)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = {name for name in names(tmp_path) if name.endswith(".safetensors")}
    assert len({name.split("-of-")[1] for name in shards}) == 1
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == ONE_FILE


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_is_for_those_whom_the_process_lets_read(model, tmp_path, umask):
    """safetensors writes files that nobody but their owner reads."""
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "shards", max_shard_size="60KB", remote_code=True)
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "one")  # one file, which takes the other's place
        quantize_checkpoint(tmp_path / "one", tmp_path / "fp8")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask} and len(names(tmp_path / "shards")) > 20


def test_shards_of_other_names_that_the_old_index_lists_go(model, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "../other"}}))
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == ONE_FILE


def test_files_of_others_and_other_variants_stay(model, tmp_path):
    (tmp_path / "notes").mkdir()
    kept = {"README.md", "mine.safetensors", "notes/model.safetensors", "model.bf16.safetensors", "adapter_model.safetensors"}
    for name in kept:
        (tmp_path / name).write_text(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="half", max_shard_size="60KB")
    assert all((tmp_path / name).read_text() == name for name in kept)
    equal(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    model.save_pretrained(tmp_path, variant="half")
    assert names(tmp_path) == {name.split("/")[0] for name in kept} | ONE_FILE | {"model.half.safetensors"}
    DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path, variant="half")


def test_model_saves_into_the_folder_it_was_loaded_from(tmp_path):
    """Its weights may be views of the very files."""
    build_oracle().save_pretrained(tmp_path)
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for size in ("60KB", "20KB", "50GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        equal(model.state_dict(), expected)
        equal(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path).state_dict(), expected)


def test_model_offloaded_to_disk_does_not_save_over_the_files_it_reads(tmp_path):
    build_oracle().save_pretrained(tmp_path / "read")
    placement = {"model": "disk", "lm_head": "disk"}
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "read", device_map=placement, offload_folder=tmp_path / "offload")
    before = contents(tmp_path / "read")
    with pytest.raises(ValueError, match="`save_directory` is .*offloaded to disk"):
        model.save_pretrained(tmp_path / "read")
    assert contents(tmp_path / "read") == before
    model.save_pretrained(tmp_path / "other")
    equal(load_file(tmp_path / "other" / "model.safetensors"), load_file(tmp_path / "read" / "model.safetensors"))


@pytest.mark.parametrize("there", [True, False])
def test_full_disk_is_an_oserror_and_changes_nothing(there, model, tmp_path):
    folder = tmp_path / "deep" / "folder"
    if there:
        build_oracle().save_pretrained(folder)
    before = contents(tmp_path)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        model.save_pretrained(folder)

    answer = in_child(save)
    assert answer.startswith("OSError: cannot save into") and str(folder) in answer
    assert contents(tmp_path) == before and (tmp_path / "deep").exists() == there


def as_nobody(run):
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    return run()


@pytest.fixture
def read_only(model, tmp_path):
    """A checkpoint in a folder that is not to be written, also where the tests run as root."""
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    yield folder
    folder.chmod(0o755)


def reachable(folder):
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)


def test_folder_that_cannot_be_written_is_an_oserror_and_unchanged(model, read_only):
    before = contents(read_only)
    reachable(read_only)
    read_only.chmod(0o555)
    answer = in_child(lambda: as_nobody(lambda: model.save_pretrained(read_only, max_shard_size="60KB")))
    assert answer.startswith("PermissionError: ") and str(read_only) in answer
    assert contents(read_only) == before


def interrupted(model, folder):
    """Leaves `folder` as a process does that is killed when it has decided, and moved nothing."""
    model.save_pretrained(folder.with_name("whole"))
    os.rename(folder.with_name("whole"), folder / FINISHED)
    (folder / FINISHED / ".plan").write_text("[]\n")


def test_interrupted_save_that_cannot_be_finished_is_named(model, read_only):
    interrupted(model, read_only)
    reachable(read_only)
    read_only.chmod(0o555)
    answer = in_child(lambda: as_nobody(lambda: DiffusionGemmaForMaskedBlockLM.from_pretrained(read_only)))
    assert answer.startswith("OSError: a save into") and f"{read_only / FINISHED}" in answer and "can be written" in answer


def test_loading_and_saving_finish_an_interrupted_save(model, tmp_path):
    other = same_weights(build_oracle()).to(torch.bfloat16)
    for again in (lambda: AutoModelForCausalLM.from_pretrained(tmp_path), lambda: model.save_pretrained(tmp_path, variant="other")):
        model.save_pretrained(tmp_path)
        interrupted(other, tmp_path)
        with contextlib.suppress(OSError):  # the config that an Auto class has read is the old one
            again()
        assert FINISHED not in names(tmp_path)
        assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_folder_is_not_loaded_while_it_is_saved_over(tmp_path):
    """Each load is of one of the two, or is refused."""
    models = [same_weights(build_oracle()) for _ in range(2)]
    with torch.no_grad():
        for value, model in enumerate(models):
            for tensor in model.state_dict().values():
                tensor.fill_(value)
    models[0].save_pretrained(tmp_path, max_shard_size="20KB")
    stop = threading.Event()

    def save():
        while not stop.is_set():
            for model in models:
                model.save_pretrained(tmp_path, max_shard_size="20KB")

    saving = threading.Thread(target=save)
    saving.start()
    found = []
    try:
        for _ in range(12):
            try:
                state = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path).state_dict()
                found.append({float(value) for tensor in state.values() for value in (tensor.min(), tensor.max())})
            except OSError as error:
                found.append(str(error))
    finally:
        stop.set()
        saving.join()
    assert all(one in ({0.0}, {1.0}) or "load it again" in one for one in found), found


def test_file_that_changes_while_it_is_loaded_is_named(oracle_checkpoint, tmp_path):
    folder = Path(shutil.copytree(oracle_checkpoint, tmp_path / "checkpoint"))

    class Saved(DiffusionGemmaForMaskedBlockLM):
        def __init__(self, config):
            super().__init__(config)
            os.utime(folder / "model.safetensors", (0, 0))

    with pytest.raises(OSError, match=r"model\.safetensors in .* changed while it was being loaded; load it again"):
        Saved.from_pretrained(folder)


def test_processes_that_save_at_once_leave_one_of_their_checkpoints(model, tmp_path):
    """Neither takes the other's unfinished files for those of a killed process."""

    def save(value):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(value)
        model.generation_config.max_new_tokens = value
        for size in ("20KB", "60KB", "50GB") * 5:
            model.save_pretrained(tmp_path / "saved", max_shard_size=size)

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(in_child, [lambda value=value: save(value) for value in (1, 2, 3)])) == ["None"] * 3
    again = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "saved")
    values = {float(value) for tensor in again.state_dict().values() for value in (tensor.min(), tensor.max())}
    assert values == {again.generation_config.max_new_tokens}
    assert names(tmp_path / "saved") == ONE_FILE


def test_rank_that_is_not_the_main_one_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, False)
    model.save_pretrained(tmp_path, is_main_process=False, state_dict=model.state_dict())
    assert names(tmp_path) == set()


def test_state_dict_and_other_arguments_keep_their_meaning(model, tmp_path):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, dict(state), False, "60KB", "mine", safe_serialization=True)
    assert "model.safetensors.index.mine.json" in names(tmp_path)
    again = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path, variant="mine")
    equal(again.state_dict(), state)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"safe_serialization": False}, "`safe_serialization` is False; expected True"),
        ({"distributed_checkpoint": True}, r"`save_directory` is .*, which holds model\.safetensors; expected a folder without weights"),
        ({"push_to_hub": True}, "`push_to_hub` is True"),
    ],
)
def test_argument_that_is_not_honoured_is_refused_and_changes_nothing(arguments, match, model, tmp_path):
    model.save_pretrained(tmp_path)
    before, config = contents(tmp_path), model.config.to_dict()
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path, **arguments)
    assert contents(tmp_path) == before and model.config.to_dict() == config


def test_adapters_that_do_not_fit_into_one_file_are_refused(tmp_path):
    """PEFT reads one file, and the index would be that of the whole model."""
    need_adapters()
    peft = pytest.importorskip("peft")
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint())
    model.save_pretrained(tmp_path)
    model.add_adapter(peft.LoraConfig(target_modules=r"model\.decoder\.layers.*q_proj", r=2))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="`max_shard_size` is '1KB', less than the adapters take"):
        model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert contents(tmp_path) == before
    model.save_pretrained(tmp_path)
    assert contents(tmp_path).keys() - before.keys() == {Path("adapter_config.json"), Path("adapter_model.safetensors")}


def test_error_inside_of_the_context_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "a.json").write_text("old")
    before = contents(tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        with pytest.raises(KeyError), replacing(folder) as fresh:
            (fresh / "a.json").write_text("new")
            raise KeyError
    assert contents(tmp_path) == before and names(tmp_path) == {"a.json"}


def test_folder_in_the_way_of_a_file_is_named_before_anything_is_moved(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match=rf"{tmp_path / 'b'} is a folder"), replacing(tmp_path) as fresh:
        for name in ("a", "b"):
            (fresh / name).write_text("new")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == {"a", "b"}


def test_files_in_folders_are_replaced_too(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "old").write_text("old")
    with replacing(tmp_path) as fresh:
        (fresh / "deep" / "er").mkdir(parents=True)
        for name in ("a", "deep/b", "deep/er/c"):
            (fresh / name).write_text("new")
    assert {str(path) for path in contents(tmp_path)} == {"a", "deep/old", "deep/b", "deep/er/c"}
    assert names(tmp_path) == {"a", "deep"}


def test_unfinished_folder_of_a_living_process_is_neither_taken_over_nor_removed(tmp_path):
    with staging(tmp_path / ".saving-x") as plan:
        assert in_child(lambda: staging(tmp_path / ".saving-x").__enter__()).startswith("OSError: ")
        with replacing(tmp_path) as fresh:
            (fresh / "a").write_text("other")
        (tmp_path / ".saving-x" / "a").write_text("mine")
        put_in_place(tmp_path / ".saving-x", plan, tmp_path)
    assert (tmp_path / "a").read_text() == "mine" and finish(tmp_path) == set()
