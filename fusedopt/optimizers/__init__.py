"""What is computed: a file per optimizer, and how one is made from its name."""

from .adafactor import Adafactor
from .adafactor_presets import recommended_adafactor
from .adafactor_schedule import AdafactorSchedule
from .adagrad import Adagrad
from .adamw import Adam, AdamW
from .ademamix import AdEMAMix
from .anyprecision import AnyPrecisionAdamW
from .lion import Lion
from .names import create_optimizer, optimizer_names
from .rmsprop import RMSprop
from .schedule_free import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from .sgd import SGD
from .stable_adamw import StableAdamW

__all__ = [
    "SGD",
    "AdEMAMix",
    "Adafactor",
    "AdafactorSchedule",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "AnyPrecisionAdamW",
    "Lion",
    "RAdamScheduleFree",
    "RMSprop",
    "SGDScheduleFree",
    "StableAdamW",
    "create_optimizer",
    "optimizer_names",
    "recommended_adafactor",
]
