"""`diffusiongemma export`: a folder that is a whole Hub repository."""

import argparse
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import cached_file

from ..weights.saving import replacing
from .arguments import json_line, say
from .session import load_model, load_tokenizer

CARD = "README.md"  # one that is there is kept
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def run(args: argparse.Namespace) -> int:
    folder, path = Path(args.folder), args.model.path
    model, tokenizer = load_model(path, dtype=args.dtype), load_tokenizer(path)
    with replacing(folder) as fresh:
        model.save_pretrained(fresh, remote_code=True, max_shard_size=args.max_shard_size)
        tokenizer.save_pretrained(fresh)
        if any(cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES):
            AutoProcessor.from_pretrained(path).save_pretrained(fresh)
        if (folder / CARD).exists():
            (fresh / CARD).unlink()
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    if args.json:
        print(json_line({"folder": str(folder.resolve()), "bytes": sum(files.values()), "files": files}))
    else:
        say(f"{len(files)} files, {sum(files.values()):,} bytes, of which {sum(name.endswith('.py') for name in files)} are code")
        print(folder.resolve())
    return 0


__all__ = ["run"]
