"""Random values as functions of where they are used: alike on every layout, in every pass, after a resume.

SplitMix64 on wrapping int64; nothing here has state.
"""

from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea, Flood 2014) of each int64."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def draw(*parts: int) -> int:
    """A non-negative 62-bit number, another one for other parts; on the host, where it costs no kernel."""
    state = 0
    for part in parts:
        state = _mix_on_host(state + part + 1)
        state = state ^ (state >> 32)
    return _mix_on_host(state) & (2**62 - 1)


def _mix_on_host(x: int) -> int:
    """`mix`, of one number."""
    x = x * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def uniform(index: Tensor, key: int) -> Tensor:
    """fp64 in (0, 1) for each entry of `index`; `key` as from `draw`."""
    bits = _shift(mix(mix(index + key) ^ key), 12)  # with 53 bits, + 0.5 would round up to 1
    return (bits.double() + 0.5) / 2**52


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
