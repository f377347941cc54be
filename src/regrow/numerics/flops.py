"""How much of a card's arithmetic a run uses: its model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re

import torch

# By the beginning of the name: dense FLOP/s at 16 bits, by NVIDIA's data sheets; TF32 is half.
PEAK = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "GeForce RTX 4090": 165e12,
    "GeForce RTX 3090": 71e12,
}


# Words in the names of cards that have fewer or more FLOP/s than the one they are named after.
OTHER = re.compile(r"\b(MIG|Laptop|D|Ti|NVL|\d+Q)\b")  # part of a card, a virtual one, variants


def peak_of_card(name: str) -> float | None:
    """Return the dense FLOP/s at 16 bits of a card by torch's name for it; None if unknown."""
    name = name.removeprefix("NVIDIA ")
    if OTHER.search(name):
        return None
    return next((peak for card, peak in PEAK.items() if re.match(rf"{card}\b", name)), None)


def peak_of(device: torch.device, precision: str, *, tf32: bool) -> float | None:
    """Return the FLOP/s of a device's matrix products in a precision; None if unknown."""
    if device.type != "cuda":
        return None
    peak = peak_of_card(torch.cuda.get_device_name(device))
    if peak is None or precision in ("bf16", "fp16"):
        return peak
    return peak / 2 if tf32 else None
