"""StableAdamW: csrc/rules/stable_adamw.h, which has the equation and its papers."""

import triton
import triton.language as tl

from .adamw import STATES, adamw
from .arithmetic import power
from .normalize import MOMENTS
from .rule import Normalizing, Rule

CONFIG = ("lr", "beta1", "beta2", "eps", "weight_decay", "max_lr")


@triton.jit
def _kept(beta, faded):
    return (beta - faded) / (1.0 - faded)


@triton.jit
def _taken(beta, faded):
    return (1.0 - beta) / (1.0 - faded)


@triton.jit
def moments(config, step, machine_eps):
    """See normalize.py."""
    _, _, beta2, eps, _, _ = config
    faded = power(beta2, step)
    none = tl.zeros_like(beta2)
    return _kept(beta2, faded), _taken(beta2, faded), none, eps * eps, none + 1.0, none


@triton.jit
def derive(config, step, sums):
    """AdamW's, with the betas of this step and the learning rate of this tensor."""
    lr, beta1, beta2, eps, weight_decay, max_lr = config
    _, update_sum, numel = sums
    faded1 = power(beta1, step)
    faded2 = power(beta2, step)
    rms = tl.sqrt(update_sum / numel.to(tl.float64))
    lr = lr / tl.where(rms < 1.0, 1.0, rms)  # NaN stays NaN
    return (
        weight_decay,
        1.0 - lr / max_lr * weight_decay,
        _kept(beta1, faded1),
        _taken(beta1, faded1),
        _kept(beta2, faded2),
        _taken(beta2, faded2),
        lr,
        tl.zeros_like(lr) + 1.0,
        eps,
    )


@triton.jit
def stable_adamw(p, g, s, hyper):
    """AdamW's step."""
    return adamw(p, g, s, hyper[MOMENTS:])


RULES = {
    "stable_adamw": Rule(
        stable_adamw, derive, CONFIG, STATES, MOMENTS.value + 9, rooted=1, normalizing=Normalizing(moments, second=1)
    ),
}
