"""llama.cpp's binding xllamacpp, an optional package, which other modules import through here."""

from types import ModuleType

from optprune.errors import InputError
from optprune.system.wording import install


def binding() -> ModuleType:
    """Return the package xllamacpp. Raises InputError where it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise InputError(
            f"llama.cpp is needed for this, through the package xllamacpp ({error}): {install('llama')}"
        ) from error
    return xllamacpp
