"""What stands for a tensor at a width when only it is quantized: codes of a weight, the static range of an input."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from bitlaw.allocation.curves import CurveSettings
from bitlaw.allocation.paths import calibration_of
from bitlaw.calibration.cache import calibrate
from bitlaw.calibration.collect import Progress
from bitlaw.calibration.histogram import static_range
from bitlaw.calibration.stats import InputStats
from bitlaw.formats import Params
from bitlaw.methods.method import LayerMethod
from bitlaw.methods.quantize import as_chain
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import BitPlan
from bitlaw.quantized import ActivationSpec, QuantizedTensor, WeightSpec


class Choices:
    """Codes and ranges of some sites, by the settings' method and a calibration of the full-precision model.

    plans: for every width the plan of all sites at it, as the method means it
    by_layer: whether the method is one that does no more than choose the codes of a layer at a time; others have no
        `weight` here, as what they do to one layer shows elsewhere
    """

    def __init__(
        self,
        model: ImageGenerator[Any],
        settings: CurveSettings,
        plans: Mapping[int, BitPlan],
        sites: Sequence[str],
        progress: Progress | None = None,
    ):
        self.model, self.settings, self.plans, self.sites, self.progress = model, settings, plans, sites, progress
        self.calibration = calibration_of(settings)
        self.chain = as_chain(settings.method)
        self.by_layer = not self.chain.transforms and isinstance(self.chain.final, LayerMethod)

    def weight(self, site: str, bits: int) -> QuantizedTensor:
        """The weight of a site at a width."""
        final, precision = self.chain.final, self.plans[bits].weight(site)
        assert self.by_layer and isinstance(final, LayerMethod) and precision is not None
        weight = self.model.net.get_parameter(f"{site}.weight").detach()
        stats = self._weight_stats.get(site, InputStats())
        return final.quantize_layer(weight, stats, WeightSpec.of(precision))

    def ranges(self, site: str, group: int, bits: int) -> Params:
        """Parameters, (1, 1) each, of the range of what enters a site in a step group at a width; {} if dynamic."""
        precision = self.settings.input_precision(bits)
        assert precision is not None
        spec = ActivationSpec.of(precision)
        if spec.range_of != "static":
            return {}
        histograms = self._range_stats[site].histograms_S
        assert histograms is not None
        if not histograms[group].total:  # not called in this group
            return spec.format.fit(torch.tensor([[-1.0, 1.0]]))
        return static_range(histograms[group], spec.format, self.calibration.ranges, self.calibration.percentile)

    @cached_property
    def _weight_stats(self) -> dict[str, InputStats]:
        needs = self.chain.final.needs
        # As `quantize` calibrates for a plan of these sites: its codes are the same, and calibration is done once.
        return self._calibrate(needs | {"rows_RI"} if needs else needs, (0,))

    @cached_property
    def _range_stats(self) -> dict[str, InputStats]:
        return self._calibrate(frozenset({"histograms_S"}), self.settings.step_groups)

    def _calibrate(self, needs: frozenset[str], step_groups: Sequence[int]) -> dict[str, InputStats]:
        if not needs:
            return {}
        return calibrate(self.model, self.calibration, self.sites, needs, step_groups, self.progress)
