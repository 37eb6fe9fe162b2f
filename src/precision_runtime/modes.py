"""Precision modes as values, and the only parser of their names. Imports no torch.

A mode is a frozen record of dtypes; nobody below the parser compares mode strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from precision_runtime.errors import unknown_names
from precision_runtime.formats import FORMATS, Format

Family = Literal["full", "true", "mixed", "tf32", "quantized", "float8", "apex", "auto"]


@dataclass(frozen=True)
class Mode:
    """One precision mode.

    ``params`` is the dtype name that parameters, buffers and inputs are kept in, ``compute`` the dtype of the bulk of
    the arithmetic, ``autocast`` says whether torch's autocast chooses op by op, ``scaled`` whether the loss is scaled.
    ``products`` is the format that the operands of the mode's special layers or products are rounded to, where that is
    not ``compute`` (FP8, TF32); ``weights`` the format that weights of swapped layers are stored in (bitsandbytes).
    ``masters`` says whether optimizers update float32 copies of half parameters.
    """

    name: str
    family: Family
    params: str
    compute: str
    autocast: bool = False
    scaled: bool = False
    products: str = ""
    weights: str = ""
    masters: bool = False

    @property
    def format(self) -> Format:
        """The format of the mode's arithmetic, outside special layers and products."""
        return FORMATS[self.compute]

    @property
    def low(self) -> bool:
        """Whether the arithmetic has 16 bits or fewer."""
        return self.format.precision < FORMATS["float32"].precision

    def __str__(self) -> str:
        return self.name


MODES = MappingProxyType(
    {
        m.name: m
        for m in (
            Mode("32-true", "full", "float32", "float32"),
            Mode("64-true", "full", "float64", "float64"),
            Mode("16-true", "true", "float16", "float16"),
            Mode("bf16-true", "true", "bfloat16", "bfloat16"),
            Mode("16-mixed", "mixed", "float32", "float16", autocast=True, scaled=True),
            Mode("bf16-mixed", "mixed", "float32", "bfloat16", autocast=True),
            Mode("tf32", "tf32", "float32", "float32", products="tf32"),
            Mode("transformer-engine", "float8", "bfloat16", "bfloat16", products="float8_e4m3fn"),
            Mode("transformer-engine-float16", "float8", "float16", "float16", products="float8_e4m3fn"),
            Mode("nf4", "quantized", "bfloat16", "bfloat16", weights="nf4"),
            Mode("nf4-dq", "quantized", "bfloat16", "bfloat16", weights="nf4-dq"),
            Mode("fp4", "quantized", "bfloat16", "bfloat16", weights="fp4"),
            Mode("fp4-dq", "quantized", "bfloat16", "bfloat16", weights="fp4-dq"),
            Mode("int8", "quantized", "bfloat16", "bfloat16", weights="int8"),
            Mode("int8-training", "quantized", "bfloat16", "bfloat16", weights="int8-training"),
            Mode("apex-O0", "apex", "float32", "float32"),
            Mode("apex-O1", "apex", "float32", "float16", autocast=True, scaled=True),
            Mode("apex-O2", "apex", "float16", "float16", scaled=True, masters=True),
            Mode("apex-O3", "apex", "float16", "float16"),
        )
    }
)

# A name that waits for an accelerator: ``automatic.placed`` makes a mode of it. It is no member of MODES or "all".
AUTO = Mode("auto", "auto", "float32", "float32")

# No name needs its capitals.
_BY_KEY = MappingProxyType({name.lower(): mode for name, mode in (*MODES.items(), (AUTO.name, AUTO))})

# What each legacy spelling has always meant (Lightning, Fabric, the old Trainer).
ALIASES = MappingProxyType(
    {
        "32": "32-true",
        "64": "64-true",
        "16": "16-mixed",
        "bf16": "bf16-mixed",
    }
)

GROUPS = MappingProxyType(
    {
        "full": ("32-true", "64-true"),
        "true": ("16-true", "bf16-true"),
        "mixed": ("16-mixed", "bf16-mixed"),
        "half": ("16-true", "bf16-true", "16-mixed", "bf16-mixed"),
        "fp8": ("transformer-engine", "transformer-engine-float16"),
        "quantized": ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"),
        "apex": ("apex-O0", "apex-O1", "apex-O2", "apex-O3"),
        "all": tuple(MODES),
    }
)


# What others call formats. None of these says whether autocast is meant, so none is a name here; likeness of letters
# alone would lead from fp16 to bf16, which is another format.
_FP16, _BF16 = ("fp16", "float16", "f16"), ("bfloat16", "bfp16")
ELSEWHERE = MappingProxyType(
    {
        **dict.fromkeys(_FP16, ("16-mixed", "16-true")),
        **dict.fromkeys(_BF16, ("bf16-mixed", "bf16-true")),
        # By the letters alone fp16-mixed would be nearest to bf16-mixed.
        **{f"{name}-{how}": (f"16-{how}",) for name in _FP16 for how in ("mixed", "true")},
        **{f"{name}-{how}": (f"bf16-{how}",) for name in _BF16 for how in ("mixed", "true")},
        **dict.fromkeys(("fp32", "float32", "f32", "float"), ("32-true",)),
        **dict.fromkeys(("fp64", "float64", "f64", "double"), ("64-true",)),
        **dict.fromkeys(("float8", "e4m3", "te"), ("transformer-engine",)),
        **dict.fromkeys(("int4", "4bit", "4-bit"), ("nf4",)),
        **dict.fromkeys(("8bit", "8-bit"), ("int8",)),
        **{f"o{level}": (f"apex-O{level}",) for level in range(4)},
    }
)


def parse_mode(name: object, where: str = "") -> Mode:
    """Return the mode called ``name``: a name, a legacy name, one of the integers 16, 32 and 64, or a ``Mode``.

    Raises ``UnknownNameError`` with the nearest known name. ``where`` says where the name was given.
    """
    return parse_modes([name], where)[0]


def parse_modes(names: Iterable[object], where: str = "") -> list[Mode]:
    """Parse several names, in order and without duplicates, and report every unknown one at once. No groups."""
    found: dict[str, Mode] = {}
    bad: list[object] = []
    for name in names:
        mode = _lookup(name)
        if mode is None:
            bad.append(name)
        else:
            found.setdefault(mode.name, mode)
    if bad:
        raise unknown_names("precision mode", bad, _known(), where, ELSEWHERE)
    return list(found.values())


def expand_modes(names: Iterable[object], where: str = "") -> list[Mode]:
    """Like ``parse_modes``, with the groups of ``GROUPS`` and ``"!name"``, which takes a mode or group away again.

    A list that only takes away starts from all modes. Order is that of first mention. Names may share a text, with
    commas between them, as shells and settings have it.
    """
    given = [part for name in names for part in _parts(name)]
    chosen: dict[str, Mode] = {}
    bad: list[object] = []
    if given and all(isinstance(name, str) and name.strip().startswith("!") for name in given):
        chosen.update(MODES)
    for name in given:
        text = name.strip() if isinstance(name, str) else name
        away = isinstance(text, str) and text.startswith("!")
        members = _members(text[1:] if away and isinstance(text, str) else text)
        if members is None:
            bad.append(name)
        elif away:
            for mode in members:
                chosen.pop(mode.name, None)
        else:
            for mode in members:
                chosen.setdefault(mode.name, mode)
    if bad:
        raise unknown_names("precision mode", bad, [*_known(), *GROUPS], where, ELSEWHERE)
    return list(chosen.values())


def _parts(name: object) -> list[Any]:
    if isinstance(name, str) and "," in name:
        return [part.strip() for part in name.split(",") if part.strip()] or [name]
    return [name]


def _known() -> Sequence[str]:
    return [*MODES, AUTO.name, *ALIASES]


def _members(name: object) -> list[Mode] | None:
    if isinstance(name, str) and name.strip().lower() in GROUPS:
        return [MODES[m] for m in GROUPS[name.strip().lower()]]
    mode = _lookup(name)
    return None if mode is None else [mode]


def _lookup(name: object) -> Mode | None:
    if isinstance(name, Mode):
        return name
    if isinstance(name, bool):  # True == 1 would otherwise reach the integers below
        return None
    if isinstance(name, int):
        name = str(name)
    if not isinstance(name, str):  # 32.0 is no mode: others let it slip through and then run no precision at all
        return None
    key = name.strip().lower()
    return _BY_KEY.get(ALIASES.get(key, key).lower())
