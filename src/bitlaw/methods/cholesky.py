"""The factor of an inverse Hessian, by which second-order methods pass errors on.

Legend: I inputs of an output channel.
"""

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LARGEST_DAMPING = 1e6
"""Times the mean of the diagonal: beyond it nothing is left of a Hessian."""


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = s (H + damping * mean(diag H))^-1 for some s > 0; float32.

    The scale s, which no use of it depends on, is mean(diag H), or 1 where H is 0. Damping that is not enough for the
    factorization in float32 is multiplied by 10, and logged, until it is. Raises ValueError for NaN or Inf.

    With J the reversal of an order, L L^T = J H J makes J L J upper triangular and H = (J L J) (J L J)^T, so that U is
    the inverse of J L J: one factorization and one triangular inverse instead of two factorizations and two inverses.
    """
    if not hessian_II.isfinite().all():
        raise ValueError("NaN or Inf in the Hessian; calibrate again with inputs that are finite")
    size_I = hessian_II.diagonal()
    mean = float(size_I.double().mean())
    flipped_II = hessian_II.float().flip(0, 1) / (mean if mean > 0 else 1.0)
    while True:
        damped_II = flipped_II.clone()
        damped_II.diagonal().add_(damping)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            upper_II = lower_II.flip(0, 1)
            eye_II = torch.eye(len(upper_II), device=upper_II.device)
            factor_II = torch.linalg.solve_triangular(upper_II, eye_II, upper=True)
            if factor_II.isfinite().all():
                return factor_II
        grown = max(10 * damping, 1e-6)
        if grown > LARGEST_DAMPING:
            raise ValueError("the Hessian cannot be factorized: it is no mean of x x^T; calibrate again")
        logger.warning("damping %g is not enough to factorize the Hessian; trying %g", damping, grown)
        damping = grown
