"""Rotary angles against double precision, also where several threads share the work."""

import torch

from hadal.config import preset
from hadal.model.rope import angles


def test_angles_are_exact_at_every_position_whatever_the_threads() -> None:
    config = preset("flash")
    position = torch.arange(1, 6000)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for layer in (config.layers[0], config.layers[2]):
                base = layer.rope_theta ** (-torch.arange(0, 64, 2).double() / 64)
                ramp = ((torch.arange(32).double() - 15) / 10).clamp(0, 1) if layer.yarn else torch.zeros(32)
                wanted = torch.outer(position.double(), base / 16 * ramp + base * (1 - ramp))
                cos, sin = angles(config, layer, position)
                # FP32 angles of up to 6,000 carry 2.4e-4 of rounding themselves
                assert float((cos - wanted.cos()).abs().max()) < 6e-4
                assert float((sin - wanted.sin()).abs().max()) < 6e-4
                near = slice(0, 60)
                assert float((cos[near] - wanted[near].cos()).abs().max()) < 1e-5
                assert float((cos.square() + sin.square() - 1).abs().max()) < 1e-6
    finally:
        torch.set_num_threads(threads)
