"""`python -m modeling_diffusiongemma`: the console."""

import sys

from .console.main import main

if __name__ == "__main__":
    sys.exit(main())
