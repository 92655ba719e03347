"""What a quantization is asked for: the settings that decide what is written, checked."""

import math
from dataclasses import dataclass
from typing import Any

from cupyq.formats.gptq import GPTQ_WIDTHS
from cupyq.quantize.layouts import HEAD_LAYOUTS, Layout
from cupyq.quantize.linear import MOST_GROUP_ROWS


@dataclass(frozen=True)
class Request:
    """Arguments of `quantize_model`, under their names there."""

    bits: float
    head_bits: int
    rows: int
    length: int | None
    seed: int
    format: str
    group_size: int
    is_symmetric: bool
    act_order: bool
    menu: tuple[Layout, ...]
    measured_layouts: int | None
    sensitivity_tokens: int
    damping: float
    windows: int
    shard_bytes: int

    def __post_init__(self) -> None:
        lowest = {"rows": 1, "length": 2, "seed": 0, "measured_layouts": 2, "sensitivity_tokens": 0, "windows": 0}
        for name, low in (lowest | {"shard_bytes": 1}).items():
            value = getattr(self, name)
            may_be_absent = value is None and name in ("length", "measured_layouts")
            if not may_be_absent and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if self.format not in ("exl2", "gptq"):
            raise ValueError(f"format must be 'exl2' or 'gptq', got {self.format!r}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)) or not 0 < self.bits < math.inf:
            raise ValueError(f"bits must be a number above 0, got {self.bits!r}")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be a number of at least 0, got {self.damping!r}")
        if self.is_gptq:
            self._check_gptq()
        else:
            self._check_exl2()

    def _check_gptq(self) -> None:
        if self.bits not in GPTQ_WIDTHS:
            raise ValueError(f"bits must be 2, 3, 4 or 8 for GPTQ, got {self.bits:g}")
        is_whole = isinstance(self.group_size, int)
        if not is_whole or (self.group_size != -1 and (self.group_size < 32 or self.group_size % 32)):
            raise ValueError(f"group_size must be a multiple of 32, or -1 for one group, got {self.group_size!r}")

    def _check_exl2(self) -> None:
        if self.head_bits not in HEAD_LAYOUTS:
            raise ValueError(f"head_bits must be one of {', '.join(map(str, HEAD_LAYOUTS))}, got {self.head_bits!r}")
        if not self.menu:
            raise ValueError("menu is empty: give at least one Layout")
        for layout in self.menu:
            largest = max(part.group_size for part in layout.parts)
            if largest > MOST_GROUP_ROWS:
                raise ValueError(
                    f"menu: layout {layout.name!r} has groups of {largest} rows, and EXL2 layers are quantized in groups of at "
                    f"most {MOST_GROUP_ROWS}: take smaller ones"
                )

    @property
    def is_gptq(self) -> bool:
        return self.format == "gptq"

    @property
    def settings(self) -> dict[str, Any]:
        """Those that count for the format, for JSON."""
        if self.is_gptq:
            own: dict[str, Any] = {"group_size": self.group_size, "sym": self.is_symmetric, "act_order": self.act_order}
        else:
            own = {"head_bits": self.head_bits, "menu": [layout.name for layout in self.menu]}
            own |= {"measured_layouts": self.measured_layouts, "sensitivity_tokens": self.sensitivity_tokens}
        common = {"format": self.format, "bits": float(self.bits), "seed": self.seed, "damping": self.damping}
        return common | own | {"shard_bytes": self.shard_bytes}

    def gptq_bits(self, k: int, n: int) -> int:
        """Bits of a GPTQ matrix: codes, zeros, scales and g_idx."""
        groups = 1 if self.group_size == -1 else -(-k // self.group_size)
        return int(n * (k * self.bits + groups * (self.bits + 16)) + 32 * k)
