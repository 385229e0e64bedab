"""Taylor: Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning" (CVPR 2019)."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.errors import UsageError


@criterion("taylor", needs=["filters", "gradients"], source="Molchanov et al. 2019, first-order change of the loss")
def taylor(filters: Tensor, gradients: Tensor, joint: str = "gate") -> Tensor:
    r"""Score every filter by the squared first-order change of the loss when it is zeroed.

    Molchanov et al. 2019: with gradient g and weight w, a set S of weights has importance, by name,

    - ``gate`` (eq. 10): :math:`(\sum_{s \in S} g_s w_s)^2`, the weights of a filter gated together;
    - ``sum`` (eq. 8): :math:`\sum_{s \in S} (g_s w_s)^2`, as if they were independent.

    It is computed for every minibatch and averaged over them.

    Departures: batch norm is in eval mode, so that the network is left as found; the average is weighted by the
    number of samples of a minibatch.

    Args:
        filters: Shape ``(C, F)``.
        gradients: Gradient of the minibatch's loss by ``filters``, shape ``(C, F)``.
        joint: ``gate`` or ``sum``.

    Returns:
        Shape ``(C,)``, in the square of the loss's unit, in fp64; higher = keep.

    Raises:
        UsageError: If ``joint`` is neither.
    """
    change = filters.double() * gradients.double()
    if joint == "gate":
        return change.sum(1).square()
    if joint == "sum":
        return change.square().sum(1)
    raise UsageError(f"criterion taylor: unknown joint {joint!r}. Use gate or sum.")
