"""Other values for a module's parameters or buffers, for the time of one call.

Not here: which values (`tokens`, `text`).
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def shadowed(module: nn.Module, **values: Tensor) -> Iterator[None]:
    """Let reads of a module's parameters or buffers find other tensors.

    The module's own are neither moved nor replaced, so that its state dict and the optimiser see
    no change, and gradients flow through what the values were made of.

    Args:
        module: owner of the parameters or buffers.
        values: tensor by name, found in their place until the block ends.
    """
    fields = vars(module)  # looked at before the module's tables of parameters and buffers
    kept = {name: fields[name] for name in values if name in fields}
    fields.update(values)
    try:
        yield
    finally:
        for name in values:
            del fields[name]
        fields.update(kept)
