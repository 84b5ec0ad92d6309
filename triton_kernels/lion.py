"""Lion: csrc/rules/lion.h, which has the equation and its paper."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it)

from .arithmetic import sign
from .rule import Rule

CONFIG = ("lr", "beta1", "beta2", "weight_decay")
STATES = (("exp_avg", True),)


@triton.jit
def derive(config, step):
    """(lr, 1 - lr wd, b1, 1 - b1, b2, 1 - b2)."""
    lr, beta1, beta2, weight_decay = config
    return lr, 1.0 - lr * weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2


@triton.jit
def lion(p, g, s, hyper):
    """The sign of an average that looks ahead."""
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = hyper
    direction = sign(beta1 * s[0] + one_minus_beta1 * g)
    exp_avg = beta2 * s[0] + one_minus_beta2 * g
    p = p * decay - lr * direction
    return p, (exp_avg,), exp_avg


RULES = {"lion": Rule(lion, derive, CONFIG, STATES, 6)}
