"""Every error engram-edge raises on purpose.

    EngramError                exit code 1, never raised itself
    ├── RequestError           2   a prompt, option or token id the model cannot take
    │   └── LengthError        2   a text of more tokens than are taken
    ├── BundleError            3   a bundle that is damaged, incomplete or of another format
    │   └── TableError         3   a host table that does not hold what its manifest says
    ├── CheckpointError        3   a checkpoint that cannot be exported
    ├── TargetError            4   machine code or a profile that does not fit this machine
    │   └── CompileError       4   a graph that cannot be compiled for a target
    ├── VerificationError      5   results differ from what they must equal
    ├── NumericError           6   logits that are not finite numbers
    └── ForkError              7   a forked process goes on with what its parent loaded

Messages say what is wrong, with the value found and the value wanted, then what to do.
"""

from typing import ClassVar

OS_ERROR_EXIT_CODE = 3  # what the commands return where the operating system refuses, as for a disk that fails
UNFIT_EXIT_CODE = 4  # what ``engram plan`` and ``engram doctor`` return where a model or a machine won't do


class EngramError(Exception):
    """Base of all errors a user can act on; ``exit_code`` is what the commands return."""

    exit_code: ClassVar[int] = 1


class RequestError(EngramError):
    """A prompt, option or token id the model cannot take."""

    exit_code = 2


class LengthError(RequestError):
    """A text of more tokens than are taken."""


class BundleError(EngramError):
    """A bundle that is damaged, incomplete or of another format."""

    exit_code = 3


class TableError(BundleError):
    """A host table that does not hold what its manifest says."""


class CheckpointError(EngramError):
    """A checkpoint that cannot be exported."""

    exit_code = 3


class TargetError(EngramError):
    """Machine code or a profile that does not fit this machine."""

    exit_code = 4


class CompileError(TargetError):
    """A graph that cannot be compiled for a target."""


class VerificationError(EngramError):
    """Results differ from what they must equal."""

    exit_code = 5


class NumericError(EngramError):
    """Logits that are not finite numbers: a damaged weight, row or state."""

    exit_code = 6


class ForkError(EngramError):
    """A forked process goes on with what its parent loaded, of which it has the memory and none of the threads."""

    exit_code = 7
