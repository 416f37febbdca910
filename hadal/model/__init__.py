"""The mathematics of DeepSeek-V4 on a single device and ragged tokens."""

from hadal.kernels import Numerics
from hadal.model.drafter import DraftSpan
from hadal.model.moe import Routing
from hadal.model.state import SequenceState
from hadal.model.transformer import InputError, Model, TrainingOutput

__all__ = ["DraftSpan", "InputError", "Model", "Numerics", "Routing", "SequenceState", "TrainingOutput"]
