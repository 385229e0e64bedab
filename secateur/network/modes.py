"""The dispatch mode that all others here are made of."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """A dispatch mode that PyTorch calls as it is.

    The wrapper that PyTorch puts around dispatch modes imports its compiler, which takes seconds, and then takes longer
    than most operators.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
