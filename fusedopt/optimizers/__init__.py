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
from .sgd import SGD

__all__ = [
    "SGD",
    "AdEMAMix",
    "Adafactor",
    "AdafactorSchedule",
    "Adagrad",
    "Adam",
    "AdamW",
    "AnyPrecisionAdamW",
    "Lion",
    "RMSprop",
    "create_optimizer",
    "optimizer_names",
    "recommended_adafactor",
]
