"""Loading and saving in the released layout, with errors that name the file and the tensor.

The state dict already has the released names, so transformers' own `from_pretrained` and `save_pretrained` do the work.
Added here: what they raise on a damaged checkpoint becomes an OSError or ValueError that says what is wrong; a save replaces a folder's
checkpoint as one (`saving`); `architectures` in a saved config.json stays transformers' class, by which every other runtime finds its own
model; and the code travels along where that is asked for.
"""

import contextlib
import copy
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from generation.call.configuration import DOWNLOAD

from .asked import check_asked
from .auto import REGISTERED, forget
from .fits import check_fits
from .four_bit import PUBLISHED, FourBitConfig, in_four_bits
from .fp8_quantizer import FP8Config
from .nvfp4 import StoredNVFP4Config
from .remote_code import auto_map, write_card, write_code
from .safetensors_files import INDEX, indexed_files, inspect_header, weights_names
from .saving import FINISHED, finish, replacing
from .stored import check_files, check_pickled, check_state_dict
from .whole import check_whole

# Arguments of `from_pretrained` that are not for reading a config, though that would take them.
KEPT = ("config", "dtype", "quantization_config", "attn_implementation", "experts_implementation", "trust_remote_code", "gguf_file")

SKIPPING = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # where a quantiser's config names what it leaves alone
# Device maps that are computed: of FP8, which stays in its files, all is the CPU's where there is no GPU.
COMPUTED = ("auto", "balanced", "balanced_low_0", "sequential")
# Routers, as in the released FP8 recipe (hqq knows them by the second name, torchao compares names of weights); and what is left alone in
# any case where nothing is named.
UNCONVERTED = ("router.proj", "decoder.router.proj", "router.proj.weight", "lm_head", "model.decoder.embed_tokens")


def damaged_files(folder: str | os.PathLike) -> list[str]:
    """Describes every safetensors file of a local checkpoint that is missing or shorter than its header says, and a broken index."""
    folder = Path(folder)
    problems = [f"a save was interrupted, and {FINISHED} holds the rest"] if (folder / FINISHED).is_dir() else []
    names = {path.name for path in folder.glob("*.safetensors")}
    try:
        names |= set(indexed_files(folder) or ())
    except OSError as error:
        problems.append(str(error))
    for name in sorted(names):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing, though {INDEX} names it")
        elif wrong := inspect_header(folder / name)[1]:
            problems.append(f"{name} {wrong}")
    return problems


def files_read(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Which files loading reads in a folder, and what tells each from another of the same name."""
    found = {}
    for path in folder.iterdir():
        if path.name.endswith((".safetensors", ".index.json", "config.json")):
            with contextlib.suppress(FileNotFoundError):  # replaced at this moment
                state = path.lstat()
                found[path.name] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return found


@contextlib.contextmanager
def unchanging(path: str | os.PathLike | None, config: object, subfolder: str | None) -> Iterator[None]:
    """A context in which a checkpoint is loaded, if it is a folder, and loaded whole: see `from_pretrained`."""
    if path is None or not os.path.isdir(folder := Path(path) / (subfolder or "")):
        yield
        return
    late = {name for name in finish(folder) if name == "config.json" or name.endswith(".py")}
    if isinstance(config, PreTrainedConfig) and late:  # read, and code of the folder run, before this was called
        raise OSError(f"a save into {folder} was interrupted and has been finished just now, {', '.join(sorted(late))} too; load it again")
    before = files_read(folder)
    try:
        yield
    finally:
        if changed := sorted(name for name, _ in before.items() ^ files_read(folder).items()):
            raise OSError(f"{changed[0]} in {folder} changed while it was being loaded; load it again")


def without_routers(asked: dict | QuantizationConfigMixin) -> dict | QuantizationConfigMixin:
    """A quantiser's config, of which one that walks over linear layers leaves `UNCONVERTED` alone, unless it says itself what to leave."""
    given = asked
    if isinstance(asked, dict):
        try:
            given = AutoQuantizationConfig.from_dict(asked)
        except (ValueError, TypeError):  # of which transformers tells more
            return asked
    for name in SKIPPING:
        if hasattr(given, name):
            default = inspect.signature(type(given)).parameters[name].default
            if getattr(given, name) is None or getattr(given, name) == default:
                given = copy.copy(given)
                setattr(given, name, list(UNCONVERTED))
                return given
    return asked


def for_our_quantizers(config_class: type[PreTrainedConfig], path: str | os.PathLike | None, arguments: dict) -> dict:
    """Arguments of `from_pretrained` in which the config of a checkpoint that this package reads as quantised says so, and a
    `quantization_config` as a mapping in the published words is `FP8Config`."""
    asked = arguments.get("quantization_config")
    if isinstance(asked, dict) and asked.get("format") == "float-quantized":
        arguments = arguments | {"quantization_config": FP8Config.from_argument(asked)}
    elif isinstance(asked, dict) and asked.get("quant_method") == PUBLISHED:
        asked = FourBitConfig.from_dict(asked)
        arguments = arguments | {"quantization_config": asked}
    elif isinstance(asked, dict | QuantizationConfigMixin):
        arguments = arguments | {"quantization_config": without_routers(asked)}
    config, rest = arguments.get("config"), arguments
    if isinstance(config, PreTrainedConfig):
        config = copy.copy(config)
    elif (source := path if config is None else config) is None:
        return arguments
    else:  # read as transformers would, which sets the fields of a config that are among the arguments
        fields = {name: value for name, value in arguments.items() if name not in KEPT}
        try:
            config, rest = config_class.from_pretrained(source, return_unused_kwargs=True, **fields)
        except OSError:  # no config there: an adapter's folder, or nothing, of which transformers tells more
            return arguments
        rest = rest | {name: value for name, value in arguments.items() if name in (*KEPT, *DOWNLOAD)}
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and (in_four := in_four_bits(quantization, asked)):
        config.quantization_config = in_four
        return {name: value for name, value in rest.items() if name != "quantization_config"} | {"config": config}
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in ("compressed-tensors", "modelopt"):
        return arguments
    four_bits = quantization["quant_method"] == "modelopt" or str(quantization.get("format")).startswith("nvfp4")
    config.quantization_config = quantization | {"quant_method": (StoredNVFP4Config if four_bits else FP8Config).quant_method}
    if not four_bits and rest.get("device_map") in COMPUTED and rest.get("max_memory") is None and not torch.accelerator.is_available():
        rest = rest | {"device_map": {"": "cpu"}}
    return rest | {"config": config}


class LoadingMixin:
    """`from_pretrained` and `save_pretrained` of both model classes."""

    saved_architecture: str

    def held_twice(self) -> dict[str, str]:
        """Names in the state dict that are not saved, since what they name has another one."""
        return {}

    @property
    def device(self) -> torch.device:
        """As in transformers: where inputs go. Weights that Accelerate keeps elsewhere have their shapes on the meta device; then it is the
        device they are fetched to."""
        device = super().device
        fetched_to = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return device if device.type != "meta" or fetched_to is None else torch.device(fetched_to)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As in torch; of what two stacks hold together one of both names will do. If not `strict`, the other one is told as missing, by
        which safetensors' `load_model`, and so accelerate's `load_state`, knows what was left out."""
        keys = super().load_state_dict(state_dict, strict, assign)
        if not strict:
            left_out = self.state_dict().keys() & self.held_twice().keys() - state_dict.keys() - set(keys.missing_keys)
            keys.missing_keys.extend(sorted(left_out))
        return keys

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `PreTrainedModel.from_pretrained`. A folder that a save was killed in is loaded as the checkpoint before or after that save.

        Raises:
            OSError: a weight file is missing, truncated or not a safetensors file, an index lists no files; or the folder was saved over at
                the same time.
            ValueError: a tensor's shape is not the config's, or the config holds impossible values; or, where the checkpoint is
                quantised, a scheme that is not read here, or a scale that is missing or no positive number. Before anything is read:
                arguments that nothing would follow (`asked`), tensors that would be taken for others (`stored`), weights that take more
                memory than is free, or have no room in `offload_folder` (`fits`). Behind it: tensors that nothing read (`stored`).
        """
        check_asked(cls.config_class, kwargs)
        path = pretrained_model_name_or_path
        folder = None if path is None else Path(path, kwargs.get("subfolder") or "")
        with unchanging(path, kwargs.get("config"), kwargs.get("subfolder")):
            try:
                single = weights_names(variant := kwargs.get("variant"))[0]
                if folder is not None and kwargs.get("use_safetensors") is not False and not (folder / single).is_file():
                    indexed_files(folder, variant)
                return super().from_pretrained(path, *model_args, **for_our_quantizers(cls.config_class, path, kwargs))
            except (SafetensorError, FileNotFoundError) as error:
                problems = damaged_files(folder) if folder is not None and folder.is_dir() else []
                raise OSError(f"cannot load {path}: {'; '.join(problems) or error}") from error

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """As in transformers, which finds out that weights do not fit when it has read most of them, and takes others for those it knows.
        Adapters come this way, too; theirs may differ between the passes."""
        mapping, quantised = load_config.weight_mapping or [], load_config.hf_quantizer is not None
        if state_dict is not None and not getattr(model, "_hf_peft_config_loaded", False):
            check_state_dict(model, state_dict, mapping, quantised, "`state_dict`")
        if state_dict is None and checkpoint_files and all(file.endswith(".bin") for file in checkpoint_files):
            check_pickled(model, checkpoint_files, mapping, quantised, load_config.weights_only)
        if state_dict is None and checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files):
            check_files(model, checkpoint_files, mapping, quantised)
            check_fits(model, checkpoint_files, load_config)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """As in transformers, which raises without the names of tensors whose shapes do not fit."""
        if loading_info.mismatched_keys and not (load_config.ignore_mismatched_sizes or loading_info.conversion_errors):
            mismatched = sorted(loading_info.mismatched_keys)
            found = "; ".join(f"{name} has shape {tuple(got)}, expected {tuple(want)}" for name, got, want in mismatched)
            raise ValueError(f"cannot load {load_config.pretrained_model_name_or_path}: {found}")
        return super()._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, state_dict: dict | None = None, push_to_hub: bool = False,
        max_shard_size: int | str = "50GB", variant: str | None = None, token: str | bool | None = None, save_peft_format: bool = True,
        save_original_format: bool = True, distributed_checkpoint: bool = False, *, remote_code: bool | None = None, **kwargs,
    ) -> None:  # fmt: skip
        """As `PreTrainedModel.save_pretrained`; config.json names transformers' architecture, and the folder's old checkpoint is replaced
        as one, whatever is killed or fails (`saving`): for a while both take space. Other files in it stay.

        Args:
            remote_code: True adds this implementation's code, the `auto_map` that names it and a model card where there is none: the
                folder, or a Hub repository of its files, then loads with `trust_remote_code=True` where this package is not installed, and
                with transformers' own class without. False: weights and settings alone. Default: True if the model's own class was loaded
                with `trust_remote_code` (or registered by `register_for_auto_class`), else False.

        Raises:
            OSError: the folder cannot be written, or the disk is full; it is as before.
            ValueError: what would be saved is no whole checkpoint (`whole`), `push_to_hub=True`, `safe_serialization=False`,
                `remote_code=True` with adapters, which are saved alone,
                `distributed_checkpoint=True` into a folder that holds weights, or the folder that the model, offloaded to disk, reads from.
        """
        if push_to_hub:
            raise ValueError("`push_to_hub` is True; expected False here: call `model.push_to_hub(repo_id)` instead")
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("`safe_serialization` is False; expected True or unset: weights are saved as safetensors alone")
        remote_code = self._with_code(remote_code)
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` is the file {target}; expected a folder")
        if distributed_checkpoint and (
            held := sorted(path.name for path in target.glob("*") if path.suffix in (".safetensors", ".distcp"))
        ):
            why = "the files of a distributed checkpoint cannot take their place as one"
            raise ValueError(f"`save_directory` is {target}, which holds {held[0]}; expected a folder without weights, since {why}")
        writes, with_adapters = self.should_save_on_this_rank(is_main_process), getattr(self, "_hf_peft_config_loaded", False)
        if writes and not with_adapters:
            self._check_whole(state_dict)
        on_disk = "disk" in getattr(self, "hf_device_map", {}).values()
        if on_disk and target.is_dir() and os.path.isdir(self.name_or_path) and target.samefile(self.name_or_path):
            raise ValueError(f"`save_directory` is {target}, from which the model, offloaded to disk, still reads; expected another")
        before = self.config.architectures
        in_place = distributed_checkpoint or not writes  # of a distributed checkpoint every rank writes files
        self._keys_to_ignore_on_save = self._left_out()
        try:
            with contextlib.nullcontext(save_directory) if in_place else replacing(save_directory, variant) as folder:
                super().save_pretrained(
                    folder, is_main_process, state_dict, False, max_shard_size, variant, token, save_peft_format, save_original_format,
                    distributed_checkpoint, **kwargs,
                )  # fmt: skip
                self.config.architectures = [self.saved_architecture]
                # Adapters are saved alone; a config.json would make a whole checkpoint of their folder.
                if writes and not with_adapters:
                    self._save_config_and_code(folder, remote_code, not (target / "README.md").exists())
                elif writes and (Path(folder) / INDEX).exists():
                    raise ValueError(f"`max_shard_size` is {max_shard_size!r}, less than the adapters take; expected one file of them")
        except BaseException as error:
            self.config.architectures = before
            if isinstance(error, SafetensorError):
                raise OSError(f"cannot save into {save_directory}: {error}") from error
            raise
        # Once more: the other ranks must not read before the files are in their places.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def gather_sharded_state_dict_for_save(self, *args, **kwargs) -> dict:
        """As in transformers, which under FSDP2 gathers all of the model again, without what is not saved."""
        gathered = super().gather_sharded_state_dict_for_save(*args, **kwargs)
        return {name: tensor for name, tensor in gathered.items() if name not in self._keys_to_ignore_on_save}

    def _left_out(self) -> set[str]:
        """Names that are not saved. Gathered from other ranks, head and embedding are no longer one tensor."""
        return set(self.held_twice()) | ({"lm_head.weight"} if self._is_tied() else set())

    def _check_whole(self, state_dict: dict | None = None) -> None:
        """`whole.check_whole`, by the class of this package that the model's is, or is derived from."""
        built = next(cls for cls in type(self).__mro__ if "saved_architecture" in vars(cls))
        check_whole(self, built, state_dict, self._left_out())

    def _is_tied(self) -> bool | None:
        """Whether the head is the embedding, whatever the config says: a head changed by hand, or by an adapter that was merged, is not.
        None where there is no head, or where weights are offloaded and nothing tells."""
        head, embedding = (getattr(module, "weight", None) for module in (self.get_output_embeddings(), self.get_input_embeddings()))
        return None if head is None or embedding is None or head.is_meta or embedding.is_meta else head is embedding

    def _save_config_and_code(self, folder: str | os.PathLike, remote_code: bool, card: bool) -> None:
        """config.json with or without an `auto_map` of ours, whatever the config in memory was loaded with; and the code."""
        config = copy.deepcopy(self.config)
        if (tied := self._is_tied()) is not None:
            config.tie_word_embeddings = tied
        mapped = {name: value for name, value in (getattr(config, "auto_map", None) or {}).items() if name not in REGISTERED}
        config.auto_map = mapped | (auto_map() if remote_code else {})
        if not config.auto_map:
            del config.auto_map
        config.save_pretrained(folder)
        if remote_code:
            write_code(folder)
        if remote_code and card:
            write_card(folder, remote_code)

    def push_to_hub(
        self, repo_id: str, *, remote_code: bool | None = None, commit_message: str = "Upload model",
        commit_description: str | None = None, private: bool | None = None, token: str | bool | None = None,
        revision: str | None = None, create_pr: bool = False, max_shard_size: int | str = "50GB", tags: list[str] | None = None,
    ):  # fmt: skip
        """As `PreTrainedModel.push_to_hub`; `remote_code` as in `save_pretrained`, whose errors come before anything is created on the
        Hub. A model card that the repository has is kept."""
        remote_code = self._with_code(remote_code)
        commit = {"commit_message": commit_message, "commit_description": commit_description, "revision": revision, "create_pr": create_pr}
        if getattr(self, "_hf_peft_config_loaded", False):  # the card below describes a whole model
            return super().push_to_hub(repo_id, private=private, token=token, max_shard_size=max_shard_size, tags=tags, **commit)
        self._check_whole()
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "README.md"
            if api.file_exists(repo_id, path.name):
                ModelCard.load(repo_id, token=token).save(path)
            else:
                write_card(folder, remote_code, repo_id)
            if tags:
                card = ModelCard.load(path)
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
                card.save(path)
            self.save_pretrained(folder, max_shard_size=max_shard_size, remote_code=remote_code)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)

    def _with_code(self, remote_code: bool | None) -> bool:
        """`remote_code`, checked, or its default."""
        if remote_code is not None and not isinstance(remote_code, bool):
            raise ValueError(f"`remote_code` is {remote_code!r}; expected True, False or None")
        if remote_code and getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError("`remote_code` is True; expected None or False here: of a model with adapters only these are saved")
        return self._auto_class is not None if remote_code is None else remote_code

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """As in transformers. An Auto class itself, rather than its name, comes from there, when it has just registered this class for
        the config: that is taken back, since a registered class is local code, which would run in place of every other repository's."""
        super().register_for_auto_class(auto_class)
        if not isinstance(auto_class, str):
            forget(auto_class, cls)

    # Where this is True transformers copies source files itself while saving, those that one Auto class needs; here all are written.
    is_remote_code = classmethod(lambda cls: False)


__all__ = ["LoadingMixin", "damaged_files"]
