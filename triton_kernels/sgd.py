"""SGD with momentum: csrc/rules/sgd.h, which has the equation and its sources."""

import triton
import triton.language as tl

from .arithmetic import decayed
from .rule import Rule

CONFIG = ("lr", "momentum", "dampening", "weight_decay")
STATES = (("momentum_buffer", True),)


@triton.jit
def derive(config, step):
    """(lr, momentum, 1 - dampening, wd); the buffer begins as zeros, so the first gradient counts in full."""
    lr, momentum, dampening, weight_decay = config
    return lr, momentum, tl.where(step == 1, 1.0, 1.0 - dampening), weight_decay


@triton.jit
def sgd(p, g, s, hyper):
    """Without momentum."""
    lr, _, _, weight_decay = hyper
    return p - lr * decayed(g, p, weight_decay), (), g


@triton.jit
def _momentum(p, g, s, hyper, NESTEROV: tl.constexpr):
    lr, momentum, one_minus_dampening, weight_decay = hyper
    g = decayed(g, p, weight_decay)
    buffer = momentum * s[0] + one_minus_dampening * g
    if NESTEROV:
        direction = g + momentum * buffer
    else:
        direction = buffer
    return p - lr * direction, (buffer,), g


@triton.jit
def sgd_momentum(p, g, s, hyper):
    """Polyak's."""
    return _momentum(p, g, s, hyper, NESTEROV=False)


@triton.jit
def sgd_nesterov(p, g, s, hyper):
    """Nesterov's."""
    return _momentum(p, g, s, hyper, NESTEROV=True)


RULES = {
    "sgd": Rule(sgd, derive, CONFIG, (), 4),
    "sgd_momentum": Rule(sgd_momentum, derive, CONFIG, STATES, 4),
    "sgd_nesterov": Rule(sgd_nesterov, derive, CONFIG, STATES, 4),
}
