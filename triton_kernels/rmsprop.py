"""RMSprop: csrc/rules/rmsprop.h, which has the equation and its sources."""

import triton
import triton.language as tl

from .arithmetic import decayed, maximum, root
from .rule import Rule

CONFIG = ("lr", "alpha", "eps", "weight_decay", "momentum")
STATES = (("square_avg", False),)
STATES_MOMENTUM = (("momentum_buffer", True), *STATES)
STATES_CENTERED = (*STATES, ("grad_avg", True))
STATES_CENTERED_MOMENTUM = (*STATES_MOMENTUM, ("grad_avg", True))


@triton.jit
def derive(config, step):
    """(lr, a, 1 - a, eps, wd, momentum)."""
    lr, alpha, eps, weight_decay, momentum = config
    return lr, alpha, 1.0 - alpha, eps, weight_decay, momentum


@triton.jit
def _rmsprop(p, g, s, hyper, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr):
    lr, alpha, one_minus_alpha, eps, weight_decay, momentum = hyper
    FIRST: tl.constexpr = 1 if MOMENTUM else 0
    g = decayed(g, p, weight_decay)
    square_avg = alpha * s[FIRST] + (one_minus_alpha * g) * g
    states = (square_avg,)
    second = square_avg
    if CENTERED:
        grad_avg = alpha * s[FIRST + 1] + one_minus_alpha * g
        states = (square_avg, grad_avg)
        second = maximum(second - grad_avg * grad_avg, grad_avg * 0.0)
    rooted = root(second)
    direction = tl.div_rn(g, rooted + eps)
    if MOMENTUM:
        direction = momentum * s[0] + direction
        states = (direction,) + states
    return p - lr * direction, states, rooted


@triton.jit
def rmsprop(p, g, s, hyper):
    """Plain."""
    return _rmsprop(p, g, s, hyper, CENTERED=False, MOMENTUM=False)


@triton.jit
def rmsprop_momentum(p, g, s, hyper):
    """With a momentum of the update."""
    return _rmsprop(p, g, s, hyper, CENTERED=False, MOMENTUM=True)


@triton.jit
def rmsprop_centered(p, g, s, hyper):
    """With the variance instead of the mean square."""
    return _rmsprop(p, g, s, hyper, CENTERED=True, MOMENTUM=False)


@triton.jit
def rmsprop_centered_momentum(p, g, s, hyper):
    """Both."""
    return _rmsprop(p, g, s, hyper, CENTERED=True, MOMENTUM=True)


RULES = {
    "rmsprop": Rule(rmsprop, derive, CONFIG, STATES, 6, rooted=0),
    "rmsprop_momentum": Rule(rmsprop_momentum, derive, CONFIG, STATES_MOMENTUM, 6, rooted=1),
    "rmsprop_centered": Rule(rmsprop_centered, derive, CONFIG, STATES_CENTERED, 6),
    "rmsprop_centered_momentum": Rule(rmsprop_centered_momentum, derive, CONFIG, STATES_CENTERED_MOMENTUM, 6),
}
