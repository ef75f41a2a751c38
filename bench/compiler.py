"""Whether torch.compile can run here."""

from functools import cache

import torch


@cache
def missing_compiler() -> str:
    """Why torch.compile cannot run here, on one line; "" if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except (torch._inductor.exc.InductorError, torch._dynamo.exc.BackendCompilerFailed) as error:
        return str(error).splitlines()[0]
    return ""
