"""What a V4 model is: sizes, schedule of layers and the official forms they are written in."""

from hadal.config.model import (
    CSA_RATIO,
    ConfigError,
    LayerSpec,
    ModelConfig,
    RopeScaling,
    WeightFormat,
)
from hadal.config.presets import PRESETS, preset

__all__ = ["CSA_RATIO", "PRESETS", "ConfigError", "LayerSpec", "ModelConfig", "RopeScaling", "WeightFormat", "preset"]
