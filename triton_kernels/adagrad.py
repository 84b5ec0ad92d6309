"""Adagrad: csrc/rules/adagrad.h, which has the equation and its paper."""

import triton
import triton.language as tl

from .arithmetic import decayed, root
from .rule import Rule

CONFIG = ("lr", "lr_decay", "eps", "weight_decay")
STATES = (("sum", False),)


@triton.jit
def derive(config, step):
    """(lr / (1 + (t - 1) lr_decay), eps, wd)."""
    lr, lr_decay, eps, weight_decay = config
    return lr / (1.0 + (step - 1).to(tl.float64) * lr_decay), eps, weight_decay


@triton.jit
def adagrad(p, g, s, hyper):
    """Divided by the root of all squares so far."""
    lr, eps, weight_decay = hyper
    g = decayed(g, p, weight_decay)
    total = s[0] + g * g
    rooted = root(total)
    return p - lr * tl.div_rn(g, rooted + eps), (total,), rooted


RULES = {"adagrad": Rule(adagrad, derive, CONFIG, STATES, 3, rooted=0)}
