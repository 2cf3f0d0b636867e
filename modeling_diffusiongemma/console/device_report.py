"""Every fast path of both packages, proven on one device, with what the device is: a table to put into a report."""

import contextlib
import platform
from typing import Any

import torch
import transformers

from generation.constraints.lattice_kernel import LATTICE_KERNEL
from generation.fast.flags import LATE_FLAGS
from generation.fast.proofs import WITHOUT, UnusableDevice, verdict
from generation.fast.recording import RECORDED_STEP
from generation.vocabulary.kernel import KERNEL
from generation.vocabulary.products import ONEDNN_PRODUCTS

from ..layers.attention import SHARED_KEYS
from ..layers.caches import OFFLOADED_CACHE
from ..layers.experts import GROUPED_ADAPTERS, GROUPED_EXPERTS
from ..version import VERSION
from ..weights.fp8_math import SCALED, SCALED_GROUPED
from ..weights.fp8_numbers import E4M3_TABLE

PATHS = (
    KERNEL, LATTICE_KERNEL, RECORDED_STEP, LATE_FLAGS, SHARED_KEYS, GROUPED_EXPERTS, GROUPED_ADAPTERS, SCALED, SCALED_GROUPED, E4M3_TABLE,
    OFFLOADED_CACHE, ONEDNN_PRODUCTS,
)  # fmt: skip
WORKS, FAILED, NOT_HERE = "works", "FAILED", "not for this device"


def describe_device(device: torch.device) -> dict[str, Any]:
    """Names and versions."""
    about = {
        "device": str(device), "name": platform.processor() or platform.machine(), "modeling_diffusiongemma": VERSION,
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "system": platform.platform(), "triton": None,
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import triton

        about["triton"] = triton.__version__
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about |= {
            "name": found.name, "compute_capability": f"{found.major}.{found.minor}", "memory_gib": round(found.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or torch.version.hip,
        }  # fmt: skip
    return about


def prove_all(device: torch.device) -> list[dict[str, Any]]:
    """Each path and case: `state`, milliseconds, and what is wrong. A path that breaks the device is the last that is proven."""
    rows, broken = [], False
    for path, case in [(one, case) for one in PATHS for case in one.cases]:
        state, seconds, detail = FAILED, 0.0, f"not proven, since an earlier path broke the device; {WITHOUT} can leave that one out"
        if not broken:
            try:
                found = verdict(path, device, *case)
                state, seconds, detail = WORKS if found.works else FAILED if found.applies else NOT_HERE, found.seconds, found.detail
            except UnusableDevice as error:
                broken, detail = True, str(error)
        words = ", ".join(str(value).removeprefix("torch.") for value in case)
        row = {"path": path.name, "case": words, "state": state, "milliseconds": round(1000 * seconds, 1), "detail": detail}
        rows.append(row | {"instead": path.instead})
    return rows


def device_table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """In Markdown: what the device is, each path in a line, and below it what is wrong."""
    lines = [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()), ""]
    lines += ["| path | case | state | ms |", "|---|---|---|---|"]
    lines += [f"| {row['path']} | {row['case']} | {row['state']} | {row['milliseconds']:.1f} |" for row in rows]
    form = {FAILED: "{state}: {path}: {detail}. Instead, {instead}.", NOT_HERE: "{state}: {path}: {detail}."}
    wrong = dict.fromkeys(form[row["state"]].format(**row) for row in rows if row["state"] in form)
    lines += ["", *wrong] if wrong else []
    return "\n".join(lines)


__all__ = ["FAILED", "NOT_HERE", "PATHS", "WORKS", "describe_device", "device_table", "prove_all"]
