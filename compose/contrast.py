"""CLoRA's objective on attention maps: the maps of one subject shall be alike, those of different subjects unlike.

    l(a, p) = -log[ exp(s_ap / tau) / (exp(s_ap / tau) + sum_{n: class(n) != class(a)} exp(s_an / tau)) ]
    L       = mean of l over all ordered pairs of one class,      s = cosine of the maps, each brought to 0..1

NT-Xent as in SimCLR (Chen et al., 2020, eq. 1), with one positive in each denominator: other positives are not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TAU = 0.5
_EPS = 1e-8


def nt_xent(maps: Tensor, classes: Sequence[int], tau: float = TAU) -> Tensor:
    """The loss of each row ``[n]`` for maps ``[n, M, D]`` with one class each.

    It lies between ``-log(e^(1/tau) / (e^(1/tau) + N))``, identical within and orthogonal across, and, when nothing can be
    told apart, ``log(1 + N)``; N is the number of maps of other classes.

    Raises:
        ValueError: fewer than two classes, or a class with a single map: its loss and gradient would always be zero.
    """
    counts = Counter(classes)
    if len(counts) < 2 or min(counts.values()) < 2:
        raise ValueError(f"contrast needs two classes with two maps each, not {dict(counts)}")
    unit = F.normalize(maps, dim=-1, eps=_EPS)
    alike = unit @ unit.transpose(-1, -2) / tau
    label = torch.tensor(list(classes), device=maps.device)
    same = label[:, None] == label[None, :]
    others = alike.masked_fill(same, float("-inf")).logsumexp(-1, keepdim=True)
    loss = torch.logaddexp(alike, others) - alike
    pairs = same & ~torch.eye(len(label), dtype=torch.bool, device=maps.device)
    return loss[..., pairs].mean(-1)
