"""`diffusiongemma export`: a folder that is a whole Hub repository."""

import argparse
import json
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import cached_file

from .console_arguments import Command, UsageError, add_json, add_model, say
from .console_model import load_model, load_tokenizer
from .saving import replacing

EXAMPLES = """\
  diffusiongemma export ./my-repository
  diffusiongemma export ./my-repository --model ./my-checkpoint --dtype bfloat16 --max-shard-size 5GB

the folder then loads anywhere, with this code, by
  AutoModelForCausalLM.from_pretrained("./my-repository", trust_remote_code=True)
and without trust_remote_code in transformers' own class. Upload it with: hf upload OWNER/NAME ./my-repository
"""
CARD = "README.md"  # one that is there is kept
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="where to write; new or empty")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds files already")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights written")
    parser.add_argument("--max-shard-size", metavar="SIZE", default="50GB", help="of one weight file, e.g. 5GB (default: 50GB)")
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"FOLDER is {args.folder!r}, which is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise UsageError(f"the folder {args.folder!r} is not empty; expected a new or empty one, or `--overwrite`")

    path = args.model.path
    model, tokenizer = load_model(path, args.dtype), load_tokenizer(path)
    with replacing(folder) as fresh:
        model.save_pretrained(fresh, remote_code=True, max_shard_size=args.max_shard_size)
        tokenizer.save_pretrained(fresh)
        if any(cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES):
            AutoProcessor.from_pretrained(path).save_pretrained(fresh)
        if (folder / CARD).exists():
            (fresh / CARD).unlink()
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    if args.json:
        print(json.dumps({"folder": str(folder.resolve()), "bytes": sum(files.values()), "files": files}))
    else:
        say(f"{len(files)} files, {sum(files.values()):,} bytes, of which {sum(name.endswith('.py') for name in files)} are code")
        print(folder.resolve())
    return 0


EXPORT = Command("export", "write a checkpoint as a Hub repository that brings its own code", EXAMPLES, add_arguments, run)

__all__ = ["EXPORT"]
