"""What a step derives before it begins, on the device, so that neither step counts nor learning rates nor the gradient
norm are waited for. It also counts the step. csrc/cuda/prepare.cuh in Triton.
"""

import triton
import triton.language as tl

from . import table as words
from .formats import stream_key

TENSORS = tl.constexpr(64)  # of a program
_CLIP_EPS = tl.constexpr(1e-6)  # fusedopt/gather.py


@triton.jit(do_not_specialize=["count"])
def prepare_kernel(
    table,
    groups,
    derived,
    grad_scale,
    found_inf,
    square_sum,
    grad_norm,
    count,
    DERIVE: tl.constexpr,
    CONFIG: tl.constexpr,
    HYPER: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """Derives the HYPER numbers of each tensor's rule from the CONFIG numbers of its group."""
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    exists = i < count
    row = table + i * words.WIDTH
    group = groups + tl.load(row + words.GROUP, mask=exists, other=0) * words.GROUP_WIDTH
    derived = derived + i * words.DERIVED_WIDTH

    multiplier = 1.0 / tl.load(grad_scale).to(tl.float64)
    if CLIPS:
        norm = tl.sqrt(tl.load(square_sum)) * multiplier
        if tl.program_id(0) == 0:
            tl.store(grad_norm, norm.to(tl.float32))
        limit = tl.load(group + words.MAX_GRAD_NORM).to(tl.float64, bitcast=True)
        coefficient = limit / (norm + _CLIP_EPS)
        multiplier = multiplier * tl.where(coefficient > 1.0, 1.0, coefficient)  # NaN stays NaN
    multiplier = tl.load(group + words.SIGN).to(tl.float64, bitcast=True) * multiplier

    found = tl.zeros((TENSORS,), tl.float32) + tl.load(found_inf)
    tl.store(derived + words.SKIPS, tl.where(found != 0.0, exists.to(tl.int32), 0), mask=exists)
    takes = exists & (found == 0.0)
    steps = tl.load(row + words.STEP, mask=exists, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=exists, other=0.0).to(tl.int64) + 1
    tl.store(steps, step.to(tl.float32), mask=takes)

    config = ()
    for k in tl.static_range(CONFIG):
        config = config + (tl.load(group + words.CONFIG + k).to(tl.float64, bitcast=True),)
    # The first of them is the learning rate, which may be elsewhere on the device.
    lr = tl.load(group + words.LR)
    is_double = tl.load(group + words.LR_IS_DOUBLE)
    narrow = tl.load(lr.to(tl.pointer_type(tl.float32)), mask=(lr != 0) & (is_double == 0), other=0.0)
    wide = tl.load(lr.to(tl.pointer_type(tl.float64)), mask=(lr != 0) & (is_double != 0), other=0.0)
    given = tl.where(is_double != 0, wide, narrow.to(tl.float64))
    config = (tl.where(lr != 0, given, config[0]),) + config[1:]

    tl.store(derived + words.MULTIPLIER, multiplier.to(tl.float32).to(tl.int32, bitcast=True), mask=takes)
    seed = tl.load(group + words.SEED).to(tl.uint32)
    for k in tl.static_range(3):
        key = stream_key(seed, step.to(tl.uint32), k)
        tl.store(derived + words.KEYS + k, key.to(tl.int32, bitcast=True), mask=takes)
    hyper = DERIVE(config, step)
    for k in tl.static_range(HYPER):
        tl.store(derived + words.HYPER + k, hyper[k].to(tl.float32).to(tl.int32, bitcast=True), mask=takes)
