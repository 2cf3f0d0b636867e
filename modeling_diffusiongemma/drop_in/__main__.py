"""`python -m modeling_diffusiongemma.drop_in script.py [arguments]`: runs a script with our class in the place of transformers'."""

import runpy
import sys
from pathlib import Path

from .install import install

if len(sys.argv) < 2 or sys.argv[1].startswith("-") or not Path(sys.argv[1]).is_file():
    got = f"got {sys.argv[1]!r}" if len(sys.argv) > 1 else "got nothing"
    sys.exit(f"usage: python -m modeling_diffusiongemma.drop_in script.py [arguments]; {got}, expected a Python file")
del sys.argv[0]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
install()
runpy.run_path(sys.argv[0], run_name="__main__")
