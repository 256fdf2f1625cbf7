"""From component sums to scores: GradCoo, GradSafe and the gradient norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe.detection.components import COUNT, DOTS, SUM_SQ, ComponentMap, standard_deviation
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.references import Reference
from gradsafe.models import LinearLayer


class GradCoo:
    """Unsigned co-occurrence with an unsafe and a safe reference (arXiv 2502.12411).

    With n(g) = abs(g) / std(g): a_c = <n(g_c), n(unsafe_c)>, b_c the same with the safe reference;
    the score is the mean over components of a relative value such as a_c / (a_c + b_c).

    Args:
        config: Options.
        unsafe: Unsafe reference.
        safe: Safe reference.
    """

    def __init__(self, config: DetectorConfig, unsafe: Reference, safe: Reference) -> None:
        self.config = config
        self.unsafe = unsafe
        self.safe = safe
        self.unsigned = config.unsigned

    def references(self, layer: LinearLayer) -> list[Tensor]:
        """The layer's two references."""
        return [self.unsafe.weights[layer.name], self.safe.weights[layer.name]]

    def scales(self, layer: LinearLayer) -> Sequence[float]:
        """Factors that undo the storage scale of the references."""
        return (self.unsafe.scales[layer.name], self.safe.scales[layer.name])

    def __call__(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Args:
            table: `[B, C, 5]` float64.

        Returns:
            Scores `[B]` and component values `[B, C]`, float64.
        """
        a = self._divide(table[..., DOTS], self.unsafe.std)
        b = self._divide(table[..., DOTS + 1], self.safe.std)
        if self.config.normalize:
            std = standard_deviation(table)
            a, b = self._divide(a, std), self._divide(b, std)
        values = self._relative(a, b, table[..., COUNT].clamp(min=1))
        return self._reduce(values, table[..., COUNT]), values

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """How the dots of one prompt add up to evidence, all denominators fixed; see `explain`.

        Args:
            table: `[C, 5]` float64.

        Returns:
            Factors `[C, 2]`, whose products with the dots sum to a component's evidence, and the
            weights `[C]` of the components, which sum to 1; float64.
        """
        config, entries = self.config, table[:, COUNT].clamp(min=1)
        factors = torch.stack([self._divide(1.0, r.std) for r in (self.unsafe, self.safe)], dim=1)
        if config.normalize:
            factors *= self._divide(1.0, standard_deviation(table))[:, None]
        if config.relative == "share":
            total = (table[:, DOTS:] * factors).abs().sum(1)
            factors *= self._divide(1.0, total)[:, None]
        else:
            factors /= entries[:, None]
        # A signed share is measured from 0, an unsigned one from the undecided a = b.
        two_sided = config.relative == "difference" or (
            config.relative == "share" and config.unsigned
        )
        factors[:, 1] *= -1.0 if two_sided else 0.0
        counts = table[:, COUNT] if config.reduce == "weighted" else torch.ones_like(entries)
        return factors, counts / counts.sum()

    @staticmethod
    def _divide(dots: Tensor | float, std: Tensor) -> Tensor:
        """A component without spread has no direction to share: it counts as zero evidence."""
        return torch.where(std > 0, dots / std, 0.0)

    def _relative(self, a: Tensor, b: Tensor, entries: Tensor) -> Tensor:
        kind = self.config.relative
        if kind == "share":
            total = a.abs() + b.abs()
            # Signed sums keep their sign in the numerator; nothing on either side is undecided.
            neutral = 0.5 if self.config.unsigned else 0.0
            return torch.where(total > 0, a / total, neutral)
        if kind == "ratio":
            return torch.where((a == 0) & (b == 0), 1.0, a / b)
        if kind == "logratio":
            return torch.where((a == 0) & (b == 0), 0.0, (a / b).log())
        if kind == "difference":
            return (a - b) / entries
        return a / entries

    def _reduce(self, values: Tensor, entries: Tensor) -> Tensor:
        if self.config.reduce == "median":
            return values.quantile(0.5, dim=1)  # mean of the middle two, unlike torch.median
        if self.config.reduce == "weighted":
            return (values * entries).sum(1) / entries.sum(1)
        return values.mean(1)


class GradSafe:
    """Mean cosine with the unsafe reference over selected rows and columns (arXiv 2402.13494).

    Args:
        unsafe: Raw unsafe reference.
        selected: `[C]` bool, the slices that count; None for all.
    """

    unsigned = False

    def __init__(self, unsafe: Reference, selected: Tensor | None = None) -> None:
        self.unsafe = unsafe
        self.selected = selected

    def references(self, layer: LinearLayer) -> list[Tensor]:
        """The layer's reference."""
        return [self.unsafe.weights[layer.name]]

    def scales(self, layer: LinearLayer) -> Sequence[float]:
        """Factor that undoes the storage scale of the reference."""
        return (self.unsafe.scales[layer.name],)

    def __call__(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch: `[B, C, 4]` to scores `[B]` and the cosines of the selected slices."""
        norms = (table[..., SUM_SQ] * self.unsafe.sum_sq).sqrt()
        cosines = torch.where(norms > 0, table[..., DOTS] / norms, 0.0)  # a zero slice: cosine 0
        if self.selected is not None:
            cosines = cosines[:, self.selected]
        return cosines.mean(1), cosines

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Factors `[C, 1]` and weights `[C]` of one prompt's `[C, 4]` table; see `GradCoo`."""
        norms = (table[:, SUM_SQ] * self.unsafe.sum_sq).sqrt()
        chosen = torch.ones_like(norms) if self.selected is None else self.selected.to(norms)
        return torch.where(norms > 0, 1.0 / norms, 0.0)[:, None], chosen / chosen.sum()

    def select(self, unsafe: Tensor, safe: Tensor, gap: float) -> None:
        """Choose the slices that tell the reference prompts apart.

        Args:
            unsafe: `[n, C]` cosines of the unsafe reference prompts.
            safe: `[m, C]` cosines of the safe ones.
            gap: Needed difference of the means.

        Raises:
            ValueError: No slice has that gap.
        """
        difference = unsafe.mean(0) - safe.mean(0)
        self.selected = difference > gap
        if not self.selected.any():
            raise ValueError(
                f"gradsafe.Detector.fit: no row or column separates the reference prompts by more "
                f"than gap={gap} (largest: {float(difference.max()):.3f}); lower gap= or choose "
                "references that the model treats differently"
            )


class GradNorm:
    """Norm of the scored gradients: a baseline without references."""

    unsigned = False

    def references(self, layer: LinearLayer) -> list[Tensor]:
        """None."""
        return []

    def scales(self, layer: LinearLayer) -> Sequence[float]:
        """None."""
        return ()

    def __call__(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch: `[B, C, 3]` to norms `[B]` and component norms `[B, C]`."""
        return table[..., SUM_SQ].sum(1).sqrt(), table[..., SUM_SQ].sqrt()


GradientMethod = GradCoo | GradSafe | GradNorm


def component_names(method: GradientMethod, components: ComponentMap) -> list[str]:
    """Names of the columns that a method reports."""
    names = components.names
    if isinstance(method, GradSafe) and method.selected is not None:
        return [name for name, kept in zip(names, method.selected.tolist(), strict=True) if kept]
    return names
