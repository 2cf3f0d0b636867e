"""Loading and saving in the released layout, with errors that name the file and the tensor.

The state dict already has the released names, so transformers' own `from_pretrained` and `save_pretrained` do the work.
Added here: what they raise on a damaged checkpoint becomes an OSError or ValueError that says what is wrong; `architectures`
in a saved config.json stays transformers' class, by which every other runtime finds its own model; and the code travels
along where that is asked for.
"""

import copy
import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from .auto import REGISTERED
from .fp8_quantizer import METHOD as FP8
from .nvfp4 import METHOD as NVFP4
from .remote_code import auto_map, write_card, write_code
from .safetensors_files import INDEX, indexed_files, inspect_header

DOWNLOAD = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def damaged_files(folder: str | os.PathLike) -> list[str]:
    """Describes every safetensors file of a local checkpoint that is missing or shorter than its header says."""
    folder, problems = Path(folder), []
    names = {path.name for path in folder.glob("*.safetensors")} | set(indexed_files(folder) or ())
    for name in sorted(names):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing, though {INDEX} names it")
        elif wrong := inspect_header(folder / name)[1]:
            problems.append(f"{name} {wrong}")
    return problems


def own_quantization(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A copy of `config` whose `quantization_config` goes to a quantiser of this package; None where it is of no kind read here."""
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in ("compressed-tensors", "modelopt"):
        return None
    four_bits = quantization["quant_method"] == "modelopt" or str(quantization.get("format")).startswith("nvfp4")
    config = copy.deepcopy(config)
    config.quantization_config["quant_method"] = NVFP4 if four_bits else FP8
    return config


def with_own_quantization(config_class: type[PreTrainedConfig], path: str | os.PathLike | None, arguments: dict) -> dict:
    """Arguments of `from_pretrained` in which the config of a checkpoint that this package reads as quantised says so."""
    given = arguments.get("config")
    if isinstance(given, PreTrainedConfig):
        config = own_quantization(given)
        return arguments if config is None else arguments | {"config": config}
    source = path if given is None else given
    download = {name: arguments[name] for name in DOWNLOAD if name in arguments}
    try:
        config = None if source is None else own_quantization(config_class.from_pretrained(source, **download))
    except OSError:  # no config there: an adapter's folder, or nothing, of which transformers tells more
        return arguments
    if config is None:
        return arguments
    arguments = arguments | {"config": config}
    # As transformers does where it reads the config itself: an argument that is a field of the config sets it.
    for name in set(arguments) - {*DOWNLOAD, "config", "dtype", "quantization_config", "attn_implementation", "experts_implementation"}:
        if hasattr(config, name):
            setattr(config, name, arguments.pop(name))
    return arguments


class LoadingMixin:
    """`from_pretrained` and `save_pretrained` of both model classes."""

    saved_architecture: str

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: a weight file is missing, truncated or not a safetensors file.
            ValueError: a tensor's shape is not the config's, or the config holds impossible values; or, where the checkpoint is
                quantised, a scheme that is not read here, or a scale that is missing or no positive number.
        """
        kwargs = with_own_quantization(cls.config_class, pretrained_model_name_or_path, kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except (SafetensorError, FileNotFoundError) as error:
            problems = damaged_files(pretrained_model_name_or_path) if os.path.isdir(pretrained_model_name_or_path) else []
            raise OSError(f"cannot load {pretrained_model_name_or_path}: {'; '.join(problems) or error}") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # transformers logs the names and raises without them: load once more to have them.
            again = kwargs | {"ignore_mismatched_sizes": True, "output_loading_info": True}
            mismatched = super().from_pretrained(pretrained_model_name_or_path, *model_args, **again)[1]["mismatched_keys"]
            found = "; ".join(f"{name} has shape {tuple(got)}, expected {tuple(want)}" for name, got, want in sorted(mismatched))
            raise ValueError(f"cannot load {pretrained_model_name_or_path}: {found}") from error

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, remote_code: bool | None = None, **kwargs):
        """As `PreTrainedModel.save_pretrained`; config.json names transformers' architecture.

        Args:
            remote_code: True adds this implementation's code, the `auto_map` that names it and a model card where there is
                none: the folder, or a Hub repository of its files, then loads with `trust_remote_code=True` where this
                package is not installed, and with transformers' own class without. False: weights and settings alone.
                Default: True if the model's own class was loaded with `trust_remote_code` (or registered by
                `register_for_auto_class`), else False.

        Raises:
            ValueError: `push_to_hub=True`; call `model.push_to_hub(repo_id)`, which saves through here. `remote_code=True` with
                adapters, which are saved alone.
        """
        if push_to_hub:
            raise ValueError("`push_to_hub` is True; expected False here: call `model.push_to_hub(repo_id)` instead")
        self._check_remote_code(remote_code)
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` is the file {save_directory}; expected a folder")
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [self.saved_architecture]
        # Adapters are saved alone; a config.json would make a whole checkpoint of their folder.
        if kwargs.get("is_main_process", True) and not getattr(self, "_hf_peft_config_loaded", False):
            self._save_config_and_code(save_directory, self._with_code(remote_code))

    def _with_code(self, remote_code: bool | None) -> bool:
        return self._auto_class is not None if remote_code is None else remote_code

    def _save_config_and_code(self, folder: str | os.PathLike, remote_code: bool) -> None:
        """config.json with or without an `auto_map` of ours, whatever the config in memory was loaded with; and the code."""
        config = copy.deepcopy(self.config)
        mapped = {name: value for name, value in (getattr(config, "auto_map", None) or {}).items() if name not in REGISTERED}
        config.auto_map = mapped | (auto_map() if remote_code else {})
        if not config.auto_map:
            del config.auto_map
        config.save_pretrained(folder)
        if remote_code:
            write_code(folder)
            write_card(folder, remote_code)

    def push_to_hub(
        self, repo_id: str, *, remote_code: bool | None = None, commit_message: str = "Upload model",
        commit_description: str | None = None, private: bool | None = None, token: str | bool | None = None,
        revision: str | None = None, create_pr: bool = False, max_shard_size: int | str = "50GB", tags: list[str] | None = None,
    ):  # fmt: skip
        """As `PreTrainedModel.push_to_hub`; `remote_code` as in `save_pretrained`. A model card that the repository has is kept.

        Raises:
            ValueError: as `save_pretrained`, and before anything is created on the Hub.
        """
        self._check_remote_code(remote_code)
        commit = {"commit_message": commit_message, "commit_description": commit_description, "revision": revision, "create_pr": create_pr}
        if getattr(self, "_hf_peft_config_loaded", False):  # the card below describes a whole model
            return super().push_to_hub(repo_id, private=private, token=token, max_shard_size=max_shard_size, tags=tags, **commit)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "README.md"
            if api.file_exists(repo_id, path.name):
                ModelCard.load(repo_id, token=token).save(path)
            else:
                write_card(folder, self._with_code(remote_code), repo_id)
            if tags:
                card = ModelCard.load(path)
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
                card.save(path)
            self.save_pretrained(folder, max_shard_size=max_shard_size, remote_code=remote_code)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)

    def _check_remote_code(self, remote_code: bool | None) -> None:
        if remote_code is not None and not isinstance(remote_code, bool):
            raise ValueError(f"`remote_code` is {remote_code!r}; expected True, False or None")
        if remote_code and getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError("`remote_code` is True; expected None or False here: of a model with adapters only these are saved")

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: where this is True transformers copies source files itself while saving, those that one Auto class needs.
        `save_pretrained` here writes them all."""
        return False


__all__ = ["LoadingMixin", "damaged_files"]
