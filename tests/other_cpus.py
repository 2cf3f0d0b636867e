"""Runs the suite as other CPUs would round, and says in a line for each what came of it: `make test-cpus`.

Products, tanh and sorting by entropy differ in their last bits from CPU to CPU, and a random model's canvas is chaotic in them. The
variables below make torch, MKL and oneDNN leave out instructions or choose other code, each of which moves last bits; a test that
passes under all of them does not hang on one machine's rounding.

    python tests/other_cpus.py                                             # the whole suite under every setting
    python tests/other_cpus.py --only avx2 scalar -- tests/test_parity.py  # what stands behind -- is handed to pytest
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "scalar": {"ATEN_CPU_CAPABILITY": "default"},
    "compatible": {"MKL_CBWR": "COMPATIBLE"},
}
PYTEST = (sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "--tb=short", "--show-capture=no")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to run; default: all")
    parser.add_argument("arguments", nargs="*", help="handed to pytest")
    args, failed = parser.parse_args(), []
    for name in args.only:
        shown = " ".join(f"{key}={value}" for key, value in SETTINGS[name].items()) or "nothing set"
        print(f"{name}: {shown}", flush=True)
        start = time.perf_counter()
        environment = {key: value for key, value in os.environ.items() if all(key not in own for own in SETTINGS.values())}
        environment |= SETTINGS[name]
        done = subprocess.run([*PYTEST, *args.arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            failed.append(name)
            print(done.stdout + done.stderr)
        closing = (done.stdout.splitlines() or ["nothing printed"])[-1].strip("= ").split(" in ")[0]
        print(f"{name}: {'FAILED' if name in failed else 'passed'}, {time.perf_counter() - start:.0f} s: {closing}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
