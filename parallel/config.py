"""Degrees of parallelism and their arithmetic, without torch: a layout can be checked anywhere."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of each axis; dp and edp follow from the world size."""

    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Ranks that share a row's tokens (context parallel)."""
    tp: int = 1
    """Ranks that share the heads and the vocabulary (tensor parallel)."""
    ep: int = 1
    """Ranks that share the experts of a layer (expert parallel)."""
    etp: int = 1
    """Ranks that share an expert's ffn (expert tensor parallel)."""
    zero_stage: int = 1
    """1: gradients reduced once a step; 2: after every micro-batch; 3: parameters, too, kept sharded."""

    def __post_init__(self) -> None:
        """Check each value by itself."""
        for axis in ("pp", "cp", "tp", "ep", "etp"):
            degree = getattr(self, axis)
            if degree < 1:
                raise ValueError(f"parallel.{axis}={degree} must be at least 1")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"parallel.zero_stage={self.zero_stage} must be 1, 2 or 3")

    def dp(self, world_size: int) -> int:
        """Data-parallel degree of the dense mesh: world_size / (pp cp tp).

        Raises:
            ValueError: the degrees do not fit the world size, or an axis is not available yet.
        """
        dense, expert = self.pp * self.cp * self.tp, self.pp * self.ep * self.etp
        for product, names in ((dense, "pp * cp * tp"), (expert, "pp * ep * etp")):
            if world_size % product:
                legal = [n for n in range(1, world_size + 1) if world_size % n == 0]
                raise ValueError(
                    f"parallel: {names} = {product} must divide the world size {world_size}; "
                    f"its divisors are {legal}"
                )
        for axis in ("pp", "cp", "tp", "ep", "etp"):
            if getattr(self, axis) != 1:
                raise ValueError(f"parallel.{axis}={getattr(self, axis)} is not available yet; use 1")
        return world_size // dense
