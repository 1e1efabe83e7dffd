"""One clear error per rank, an exit code, and no hang.

Every rank reaches its verdict alone: the checks of this folder read files and settings, and exchange nothing. A rank
that fails raises `UserError` where a person can put it right (value, bound, remedy), which docstrings leave out. It
ends with a non-zero code, and the launcher (deepspeed, torchrun, mpirun) then ends the others;
once torch.distributed is open they end by themselves, as soon as `launch.cluster.watchdog` tells them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable

EXIT_ERROR = 1
EXIT_USAGE = 2
# A launcher kills the other ranks as soon as it sees one end. Ranks start within about a second of each other, so that
# a moment's wait lets each of them print its own verdict.
GRACE_SECONDS = 2.0
# DeepSpeed's and torch's.
MASTER_PORT = "29500"


# Called with the error of a rank that is about to end with it; `launch.cluster.watchdog` tells the other ranks. What
# is returned, if anything, is shown instead of that error.
before_end: list[Callable[[Exception], Exception | None]] = []
_training = False


class UserError(ValueError):
    """Something that the person who started the run can put right; shown without a traceback."""


class UsageError(UserError):
    """A wrong flag, or a wrong combination of flags."""


# Who starts processes, and the variables in which it tells each its rank, the number of ranks and the rank on its own
# machine. Slurm's batch script has SLURM_PROCID and SLURM_NTASKS too; the number of a step's tasks, srun's alone have.
LAUNCHER_VARIABLES = {
    "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def process_rank() -> tuple[int, int]:
    """(rank, world size) of this process as its launcher told it through the environment; (0, 1) without a launcher."""
    for rank, world, _ in LAUNCHER_VARIABLES.values():
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def local_rank() -> int:
    """This process's number on its own machine; 0 without a launcher."""
    for _, _, local in LAUNCHER_VARIABLES.values():
        if local in os.environ:
            return int(os.environ[local])
    return 0


def say(text: str) -> None:
    """One line that everybody should read, printed by one process."""
    if process_rank()[0] == 0:
        print(text, flush=True)


def adopt_rank() -> None:
    """Puts what another launcher said into torch's variables, where rank 0's address is known.

    Open MPI's and MPICH's ranks without MASTER_ADDR are left to DeepSpeed's discovery through mpi4py.
    """
    launcher = next((name for name, names in LAUNCHER_VARIABLES.items() if {*names[:2]} <= {*os.environ}), None)
    if launcher in (None, "torch"):
        return
    if "MASTER_ADDR" in os.environ:
        rank, world = process_rank()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank()))
        os.environ.setdefault("MASTER_PORT", MASTER_PORT)
    elif launcher == "Slurm":
        raise UserError(
            "srun started this process, and MASTER_ADDR is not set: export MASTER_ADDR=<first host> (and MASTER_PORT) "
            "before srun, as launch/slurm.sbatch does."
        )


def training_begins() -> None:
    """From here on an error that nobody foresaw keeps its traceback: a long run cannot be repeated to get it."""
    global _training
    _training = True


def describe(error: BaseException, debug: bool) -> str:
    """The text shown for an error: one line; the traceback too where `debug` asks or in training; no secrets."""
    from ds_moelora.redaction import redact_text  # not above: launch/multinode.sh starts without the package

    return redact_text(_describe(error, debug))


def _describe(error: BaseException, debug: bool) -> str:
    prefix = f"[rank {process_rank()[0]}] "
    foreseen = isinstance(error, UserError)
    message = " ".join(str(error).split())  # one line, whatever library the reason is from
    if not foreseen:
        message = f"{type(error).__name__}: {message}"
        if not (debug or _training):
            message += " (--show_traceback shows where)"
    if debug or (_training and not foreseen):
        return f"{prefix}{traceback.format_exc()}{prefix}error: {message}"
    return f"{prefix}error: {message}"


def run_guarded(main: Callable[[], None], debug: bool) -> None:
    """Calls `main`; an exception becomes a message on stderr and the end of this process."""
    try:
        keep_secrets()
        main()
    except Exception as error:  # the one place where every failure of a rank ends up
        for announce in before_end:
            error = announce(error) or error
        # One write: print's second one, of the line's end, may come after another rank's message.
        sys.stderr.write(f"{describe(error, debug)}\n")
        sys.stderr.flush()
        _end(EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR)


def keep_secrets() -> None:
    """Takes note of the secrets in environment and command line, and keeps them out of all that is logged."""
    from ds_moelora.redaction import redact_text, remember, remember_words

    remember(os.environ)
    remember_words(sys.argv)

    class Record(logging.LogRecord):
        def getMessage(self) -> str:  # noqa: N802  (logging's name)
            return redact_text(super().getMessage())

    logging.setLogRecordFactory(Record)


def _end(code: int) -> None:
    """Ends this process with `code`, without waiting for its peers."""
    if process_rank()[1] == 1:
        sys.exit(code)
    time.sleep(GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the process group's destructor, loader threads and atexit handlers may wait for ranks that in turn
    # wait for this one in a collective, and the launcher acts only once this process is gone.
    os._exit(code)
