"""What a step derives before it begins, on the device, so that nothing waits for step counts, learning rates or the
gradient norm. It also counts the step. csrc/cuda/prepare.cuh in Triton.
"""

import triton
import triton.language as tl

from . import table as words
from .formats import BFLOAT16, FLOAT16, stream_key
from .normalize import MOMENTS, moments_of
from .reduce import paired

TENSORS = tl.constexpr(64)  # of a program
_CLIP_EPS = tl.constexpr(1e-6)  # fusedopt/engine/gather.py


@triton.jit
def _group_of(row, groups, exists):
    return groups + tl.load(row + words.GROUP, mask=exists, other=0) * words.GROUP_WIDTH


@triton.jit
def _steps_of(row, exists):
    """Where steps are counted, and how many there have been."""
    steps = tl.load(row + words.STEP, mask=exists, other=0).to(tl.pointer_type(tl.float32))
    return steps, tl.load(steps, mask=exists, other=0.0).to(tl.int64)


@triton.jit
def _config_of(group, CONFIG: tl.constexpr):
    """The hyperparameters of groups; the first one, the learning rate, may be elsewhere on the device."""
    config = ()
    for k in tl.static_range(CONFIG):
        config = config + (tl.load(group + words.CONFIG + k).to(tl.float64, bitcast=True),)
    lr = tl.load(group + words.LR)
    is_double = tl.load(group + words.LR_IS_DOUBLE)
    narrow = tl.load(lr.to(tl.pointer_type(tl.float32)), mask=(lr != 0) & (is_double == 0), other=0.0)
    wide = tl.load(lr.to(tl.pointer_type(tl.float64)), mask=(lr != 0) & (is_double != 0), other=0.0)
    given = tl.where(is_double != 0, wide, narrow.to(tl.float64))
    return (tl.where(lr != 0, given, config[0]),) + config[1:]


@triton.jit
def _epsilon_of(row, exists):
    """The distance from 1 to the next number, in the formats of parameters."""
    dtype = tl.load(row + words.FORMATS, mask=exists, other=0) & 7
    eps = tl.where(dtype == BFLOAT16, 0.0078125, tl.where(dtype == FLOAT16, 0.0009765625, 0.00000011920928955078125))
    return eps.to(tl.float64)


@triton.jit
def _store_hyper(at, hyper, COUNT: tl.constexpr, mask):
    for k in tl.static_range(COUNT):
        tl.store(at + k, hyper[k].to(tl.float32).to(tl.int32, bitcast=True), mask=mask)


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
    NORMALIZES: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """Derives the HYPER numbers of each tensor's rule from the CONFIG numbers of its group, or its moments."""
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    exists = i < count
    row = table + i * words.WIDTH
    group = _group_of(row, groups, exists)
    derived = derived + i * words.DERIVED_WIDTH

    multiplier = 1.0 / tl.load(grad_scale).to(tl.float64)
    skips = tl.where(tl.zeros((TENSORS,), tl.float32) + tl.load(found_inf) != 0.0, 1, 0)
    if CLIPS:
        norm = tl.sqrt(tl.load(square_sum)) * multiplier
        if tl.program_id(0) == 0:
            tl.store(grad_norm, norm.to(tl.float32))
        limit = tl.load(group + words.MAX_GRAD_NORM).to(tl.float64, bitcast=True)
        coefficient = limit / (norm + _CLIP_EPS)
        multiplier = multiplier * tl.where(coefficient > 1.0, 1.0, coefficient)  # NaN stays NaN
        above = tl.load(group + words.SKIP_ABOVE).to(tl.float64, bitcast=True)
        is_within = tl.where(norm <= above, 1, 0)  # which NaN is not
        skips = tl.where(above < float("inf"), skips | (1 - is_within), skips)
    multiplier = tl.load(group + words.SIGN).to(tl.float64, bitcast=True) * multiplier

    tl.store(derived + words.SKIPS, skips, mask=exists)
    takes = exists & (skips == 0)
    steps, taken = _steps_of(row, exists)
    step = taken + 1
    tl.store(steps, step.to(tl.float32), mask=takes)

    tl.store(derived + words.MULTIPLIER, multiplier.to(tl.float32).to(tl.int32, bitcast=True), mask=takes)
    seed = tl.load(group + words.SEED).to(tl.uint32)
    for k in tl.static_range(3):
        key = stream_key(seed, step.to(tl.uint32), k)
        tl.store(derived + words.KEYS + k, key.to(tl.int32, bitcast=True), mask=takes)
    config = _config_of(group, CONFIG)
    if NORMALIZES:
        hyper = DERIVE(config, step, _epsilon_of(row, exists))
    else:
        hyper = DERIVE(config, step)
    _store_hyper(derived + words.HYPER, hyper, HYPER, takes)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    table,
    cuts,
    groups,
    derived,
    doubles,
    floats,
    count,
    DERIVE: tl.constexpr,
    CONFIG: tl.constexpr,
    HYPER: tl.constexpr,
):
    """The rest for a rule that normalizes, once the sums of units are known: one program per tensor."""
    own = tl.arange(0, 1)
    program = tl.program_id(0)
    row = table + program * words.WIDTH
    cut = cuts + program * words.CUT_WIDTH
    derived = derived + program * words.DERIVED_WIDTH
    if tl.load(derived + words.SKIPS) == 0:
        moments = moments_of(derived)
        units = tl.load(cut + words.UNITS)
        both = tl.arange(0, 2)
        begin = tl.where(both == 0, tl.load(cut + words.PARAM_SUMS), tl.load(cut + words.UPDATE_SUMS))
        of_params = tl.where(moments[5], units, 0)
        of_updates = tl.where(moments[4], units, tl.load(cut + words.WEIGHED))
        found = paired(doubles, begin, tl.where(both == 0, of_params, of_updates), 2, 256, 8)
        exists = own >= 0
        _, step = _steps_of(row + own, exists)  # of this step, which has been counted already
        param_sum = tl.sum(tl.where(both == 0, found, 0.0), 0)  # of one number
        update_sum = tl.sum(tl.where(both == 1, found, 0.0), 0)
        sums = (param_sum, update_sum, tl.load(row + words.NUMEL))
        hyper = DERIVE(_config_of(_group_of(row + own, groups, exists), CONFIG), step, sums)
        _store_hyper(derived + own + (words.HYPER + MOMENTS), hyper, HYPER, exists)
        factors = (derived + words.FACTORS).to(tl.pointer_type(tl.int64))
        tl.store(factors, (floats + tl.load(cut + words.ROW_FACTORS)).to(tl.int64))
        tl.store(factors + 1, (floats + tl.load(cut + words.COLUMN_FACTORS)).to(tl.int64))
