"""Merge: all LoRAs act everywhere and always, summed with their weights.

    y = W x + sum_k w_k s_k B_k A_k x

The exact sum of the deltas, not of the factors: adding the A's and the B's separately would bring cross terms B_i A_j.
"""

from __future__ import annotations

from compose.denoise import Method, Run
from compose.routes import constant


class Merge(Method):
    """Weighted sum of any number of LoRAs; with none, the stock model."""

    def prepare(self, run: Run) -> None:
        if run.bank is not None:
            run.bank.route = constant([1.0] * len(run.bank.adapters))
