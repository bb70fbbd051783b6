"""The one file of tensors that a folder holds, for formats that are no more than that."""

from saekit.hub.files import Files
from saekit.hub.tensors import PICKLED, Head
from saekit.types import SaekitError


def pickled(files: Files) -> tuple[str, dict[str, Head]] | None:
    """Name of the only file of ``torch.save``, and its tensors' names, shapes and dtypes; None where there isn't just one.

    One that can't be read says why if nothing lies beside it; else it may be another tool's, whose folder it is.
    """
    names = files.names()
    found = [name for name in names if name.endswith(PICKLED)]
    if len(found) != 1:
        return None
    try:
        return found[0], files.heads(found[0])
    except SaekitError:
        if len(names) == 1:
            raise
        return None
