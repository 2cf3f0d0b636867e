"""Saving over a folder: afterwards it holds the old checkpoint or the new one, whatever is killed when.

What is new is written into a folder of its own inside of the target, and so on the same file system (`.saving-*`). When it is whole and
on the disk, one rename to `.saved` decides: until then the target is the old checkpoint, from then on the new one, whose files are
moved to their places by renames alone. Whoever loads or saves next finishes a move that was interrupted.

Other programs do not, so the files move in an order in which they find no mixture: first the file through which weights are found
(`model.safetensors` or the index) and what only the old checkpoint had go; it comes back last. In between there are no weights to load.
Where a single file differs it is replaced by one rename, whole in every program's eyes.

Of a checkpoint's files this knows what `safetensors_files` says, and nothing of a model.
"""

import contextlib
import filecmp
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .safetensors_files import finds_weights, indexed_files, weight_files, weights_names

try:
    import fcntl
except ImportError:  # without locks what killed processes left half written is not removed, and two that save at once may meet
    fcntl = None

UNFINISHED = ".saving-"  # begins the name of a folder that is being written
FINISHED = ".saved"  # what is in this folder belongs to the checkpoint; its files are being moved
PLAN = ".plan"  # in both; who holds its lock is alive. At last it names the files that only the old checkpoint had.
FIRST = ("config.json", "adapter_config.json")  # to move: an Auto class reads these before it can ask for the rest


@contextlib.contextmanager
def replacing(folder: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """A context with an empty folder to write into; at its end what was written there takes the place of what is in `folder`, as one.

    `folder` is made where it is missing. Files of other names in it stay, but for the old checkpoint's weights of `variant`, as in
    `save_pretrained`, where new ones were written. After an exception (OSError: it cannot be written, or is full) it is as it was before.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        staged = folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        with staging(staged, wait=True) as plan:  # for another process's `clear`
            try:
                yield staged
                put_in_place(staged, plan, folder, variant)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # somebody else's files are in it by now
                path.rmdir()
        raise


@contextlib.contextmanager
def staging(staged: Path, wait: bool = False) -> Iterator[BinaryIO]:
    """Makes the folder `staged`, or takes over the one that a killed process left, and holds its lock; OSError where a process that is
    alive writes there, and this is not to `wait`."""
    while True:
        staged.mkdir(exist_ok=True)
        try:
            plan = (staged / PLAN).open("a+b")
        except FileNotFoundError:  # another process's `clear` took it for a killed one's, as below
            continue
        with plan:
            if lock(plan, wait) is False:
                raise OSError(f"{staged} is being written by another process; expected one at a time")
            if is_there(plan, staged):
                write_plan(plan, [])
                yield plan
                return


def is_there(plan: BinaryIO, folder: Path) -> bool:
    """Whether an open file still is the plan of `folder`, now that its lock has been got."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(plan.fileno()), os.stat(folder / PLAN))
    return False


def write_plan(plan: BinaryIO, old: list[str]) -> None:
    """Adds a line; the last one counts. On the disk afterwards."""
    plan.write(json.dumps(old).encode() + b"\n")
    plan.flush()
    os.fsync(plan.fileno())


def put_in_place(staged: Path, plan: BinaryIO, folder: Path, variant: str | None = None) -> None:
    """Moves the files of `staged`, whose `plan` is locked, to `folder`, which is their checkpoint from one moment on; OSError where a
    folder stands in a file's place, or the disk is full: nothing has changed."""
    with opened(folder) if fcntl else contextlib.nullcontext() as target:
        lock(target)  # nobody else puts files in place in `folder` meanwhile
        finish(folder)
        for name in files(staged):
            if (folder / name).is_dir():
                raise OSError(f"{folder / name} is a folder; expected none there, since a file of this name is to be saved")
            settings = not name.endswith(".safetensors") and not finds_weights(name)
            if settings and (folder / name).is_file() and filecmp.cmp(staged / name, folder / name, shallow=False):
                (staged / name).unlink()
        new, old = files(staged), set()
        mode = stat.S_IMODE(os.fstat(plan.fileno()).st_mode)  # what this process gives files; safetensors lets nobody else read its own
        for path in (staged / name for name in new):
            if stat.S_IMODE(path.stat().st_mode) != mode:
                path.chmod(mode)
        if not set(new).isdisjoint(weights_names(variant)):
            old = weight_files(folder, variant).difference(new, indexed_files(staged, variant) or ())
        for path in {staged, *(staged / name for name in new), *((staged / name).parent for name in new)}:
            to_disk(path)
        if len(new) == 1 and not old:
            (folder / new[0]).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / new[0], folder / new[0])
            to_disk((folder / new[0]).parent)
        elif new:
            write_plan(plan, sorted(old))
            if fcntl is None:
                plan.close()  # Windows renames no folder with an open file
            os.rename(staged, folder / FINISHED)
            move(folder)


def finish(folder: str | os.PathLike) -> set[str]:
    """Finishes an interrupted move in `folder`, and waits for one that is under way. Returns the files that were moved here; OSError where
    there are any, and `folder` cannot be written."""
    finished = (folder := Path(folder)) / FINISHED
    while os.path.isdir(finished):
        try:
            with (finished / PLAN).open("r+b") as plan:
                lock(plan)
                if is_there(plan, finished):
                    return move(folder)
        except FileNotFoundError:  # everything has moved
            with contextlib.suppress(OSError):
                finished.rmdir()
            return set()
        except OSError as error:
            what = f"a save into {folder} was interrupted while its last files, now in {finished}, were moved to their places"
            raise OSError(f"{what}, and they cannot be moved here: {error}; expected a folder that can be written, once") from error
    return set()


def move(folder: Path) -> set[str]:
    """The renames; whoever calls this holds the lock. May be called again after it was interrupted anywhere."""
    finished = folder / FINISHED
    new, old = files(finished), json.loads((finished / PLAN).read_bytes().splitlines()[-1])
    for name in sorted({*old, *filter(finds_weights, new)}, key=lambda name: (not finds_weights(name), name)):
        (folder / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: (finds_weights(name), name not in FIRST, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(finished / name, folder / name)
    for path in {(folder / name).parent for name in new} | {folder}:
        to_disk(path)
    for path in sorted(finished.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
    (finished / PLAN).unlink()
    with contextlib.suppress(OSError):  # the next save stands there already
        finished.rmdir()
    return set(new)


def clear(folder: Path) -> None:
    """Removes what killed processes left half written."""
    for path in folder.glob(f"{UNFINISHED}*"):
        try:
            with (path / PLAN).open("r+b") as plan:
                if lock(plan, wait=False):
                    shutil.rmtree(path, ignore_errors=True)
        except OSError:
            with contextlib.suppress(OSError):  # killed before it wrote its plan; or no business of ours
                path.rmdir()


def lock(file: BinaryIO | int | None, wait: bool = True) -> bool | None:
    """Locks an open file until it is closed or its process ends. False where another process has it and this is not to `wait`; None
    where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if isinstance(error, BlockingIOError) else None


def files(folder: Path) -> list[str]:
    """Names of the files in a folder and below it, all but its plan."""
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for name in found if name != PLAN]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A context with the descriptor of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "posix":  # Windows syncs what is open for writing alone
        with opened(path) as descriptor:
            os.fsync(descriptor)


__all__ = ["FINISHED", "files", "finish", "put_in_place", "replacing", "staging"]
