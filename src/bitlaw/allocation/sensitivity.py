"""What quantizing one part of a model alone does to its output: each kind of layer, each block, each layer.

LiteVAR (paper 002, Figure 5) quantizes each kind of linear alone, finds one that suffers most (fc2 in VAR), and leaves
that in 16 bits. Here the same is measured for any model and precision: distortion of the output on the paths of the
full-precision rollout, as in rate-distortion curves, and on request the Fréchet distance of final images. The plan of
LiteVAR's rule is `plan_sparing`; what the rule gains is measured too, by quantizing all kinds but one.

Legend: S steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from bitlaw.allocation.constraints import sites_of
from bitlaw.allocation.curves import CurveSettings, reading, with_tuples
from bitlaw.allocation.distortion import measure_for
from bitlaw.allocation.paths import Paths, calibration_of, model_fingerprint
from bitlaw.calibration.cache import fingerprint_of
from bitlaw.calibration.collect import Progress
from bitlaw.files import write_json
from bitlaw.methods.quantize import Protect, as_chain, check_each, quantize
from bitlaw.metrics.evaluation import evaluate, feature_network, load_reference
from bitlaw.metrics.protocol import score_json
from bitlaw.models.generator import ImageGenerator, Site
from bitlaw.names import unknown_name
from bitlaw.precision import FULL_BITS, BitPlan, Precision, unprotected

SENSITIVITY_VERSION = 1

Level = Literal["all", "kind", "spared", "block", "layer", "cell"]
What = Literal["weights", "inputs", "both"]

AMOUNT = ("precisions", "levels", "fd_levels")
"""Settings that say how much is measured, and nothing of what comes out."""
OF_FD = ("fd_images", "fd_seed", "reference", "features")
"""Settings that Fréchet distances alone depend on."""


@dataclass(frozen=True)
class SensitivitySettings:
    """What is quantized alone, how, and what is looked at.

    precisions: in the notation of `Precision`; see `precisions_of`
    levels: "kind", "block" (its sites together), "layer" (each site), "cell" (a kind in a block), "all" (everything),
        "spared" (everything but a kind)
    method, protect: as of `quantize`; by default nothing is protected
    measure, num_images, seed, batch_size, labels, guidance, sampling: as of `CurveSettings`
    fd_images: images whose Fréchet distance is taken, 0 for none; fd_levels: of which levels; fd_seed: of their noise
    reference, features: as of `evaluate`
    """

    precisions: tuple[str, ...] = ("W2A16", "W3A16", "W4A16", "W8A16", "W16A2", "W16A3", "W16A4", "W16A8")
    levels: tuple[Level, ...] = get_args(Level)
    method: str = "rtn"
    protect: tuple[str, ...] = ("none",)
    measure: str = ""
    num_images: int = 16
    seed: int = 2**21
    batch_size: int = 16
    labels: tuple[int | str, ...] = ()
    guidance: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    fd_images: int = 0
    fd_levels: tuple[Level, ...] = ("kind",)
    fd_seed: int = 0
    reference: str = "ladder"
    features: str = "ladder"

    def __post_init__(self) -> None:
        if not self.precisions:
            raise ValueError("no precision to measure at; give some, W2A16 say")
        for text in self.precisions:
            if Precision.parse(text).is_full:
                raise ValueError(f"precision {text}: nothing is quantized, so that nothing can be measured")
        for level in (*self.levels, *self.fd_levels):
            if level not in get_args(Level):
                raise unknown_name(level, get_args(Level), "level")
        if self.fd_images < 0:
            raise ValueError(f"fd_images {self.fd_images} must be 0 or more")
        as_chain(self.method)
        self.curve_settings()

    def curve_settings(self) -> CurveSettings:
        """The paths on which distortion is measured."""
        return CurveSettings(
            measure=self.measure,
            num_images=self.num_images,
            seed=self.seed,
            batch_size=self.batch_size,
            labels=self.labels,
            guidance=self.guidance,
            sampling=self.sampling,
        )


def precisions_of(bits: Sequence[int], what: Sequence[What] = ("weights", "inputs")) -> tuple[str, ...]:
    """The precisions of widths: of weights alone, of inputs alone, or of both at once."""
    patterns = {"weights": "W{}A16", "inputs": "W16A{}", "both": "W{0}A{0}"}
    for part in what:
        if part not in patterns:
            raise unknown_name(part, patterns, "part to quantize")
    for width in bits:
        if not 0 <= width < FULL_BITS:
            raise ValueError(f"{width} bits: expected 0 to {FULL_BITS - 1}")
    return tuple(patterns[part].format(width) for part in what for width in bits)


@dataclass(frozen=True)
class Subject:
    """What is quantized alone: a name at a level, its sites, and how many weights they have."""

    level: Level
    name: str
    sites: tuple[str, ...]
    weights: int


class Outcome(NamedTuple):
    """What came of quantizing some sites to a precision.

    by_step: (S,): distortion of the output of each step, mean over images
    fd: of final images, as "value", "low" and "high" of its 95 % interval; None where it was not asked for
    """

    by_step: tuple[float, ...]
    fd: Mapping[str, float] | None = None

    @property
    def distortion(self) -> float:
        """Mean over steps."""
        return sum(self.by_step) / len(self.by_step)


@dataclass(frozen=True)
class Sensitivity:
    """All that was measured of a model.

    outcomes: by sites and precision: subjects with the same sites share them
    model: its name; fingerprint: of its numbers and of what else outcomes depend on; measure: of distortion, by name
    full_fd: of the full-precision model's images; None where no distances were asked for
    """

    subjects: tuple[Subject, ...]
    outcomes: Mapping[tuple[tuple[str, ...], str], Outcome]
    settings: SensitivitySettings
    model: str
    fingerprint: str
    measure: str
    full_fd: Mapping[str, float] | None = None

    def at(self, level: Level, precision: str) -> dict[str, Outcome]:
        """Of every subject of a level, by name, what came of quantizing it to a precision of the settings."""
        if precision not in self.settings.precisions:
            raise unknown_name(precision, self.settings.precisions, "measured precision")
        return {s.name: self.outcomes[s.sites, precision] for s in self.of(level)}

    def of(self, level: Level) -> list[Subject]:
        """The subjects of a level."""
        return [subject for subject in self.subjects if subject.level == level]

    def most_sensitive(self, precision: str, level: Level = "kind") -> str:
        """What of a level distorts the output most. ValueError if the level was not measured."""
        found = self.at(level, precision)
        if not found:
            raise ValueError(f"level {level} was not measured; measured: {', '.join(self.settings.levels)}")
        return max(found, key=lambda name: found[name].distortion)

    def save(self, path: Path | str) -> None:
        """Write a JSON file, atomically."""
        outcomes = [
            {"sites": sites, "precision": precision, "distortion": outcome.distortion, **outcome._asdict()}
            for (sites, precision), outcome in self.outcomes.items()
        ]
        rest = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("outcomes", "subjects", "settings")
        }
        subjects = [asdict(subject) for subject in self.subjects]
        content = {**rest, "settings": asdict(self.settings), "subjects": subjects, "outcomes": outcomes}
        write_json(path, {"bitlaw_sensitivity": SENSITIVITY_VERSION, **content})

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """What `save` wrote. ValueError, naming the file, for anything else."""
        with reading(path, "bitlaw_sensitivity", SENSITIVITY_VERSION, "a model's sensitivity") as value:
            outcomes = {
                (tuple(entry["sites"]), entry["precision"]): Outcome(tuple(entry["by_step"]), entry["fd"])
                for entry in value.pop("outcomes")
            }
            subjects = tuple(Subject(**with_tuples(entry)) for entry in value.pop("subjects"))
            settings = SensitivitySettings(**with_tuples(value.pop("settings")))
            return cls(subjects, outcomes, settings, **value)


def measure_sensitivity(
    model: ImageGenerator[Any],
    settings: SensitivitySettings,
    *,
    file: Path | str | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> Sensitivity:
    """Quantize every subject alone, at every precision. The same sites are measured once, whatever they are called.

    file: where the result is written as it grows; what it has of this model and these settings is not measured again
    progress: told of every measurement
    name: of the model, to be noted
    Raises ValueError for a file of something else, and one that names every site that cannot be quantized so, before
    anything is measured.
    """
    subjects = tuple(subjects_of(model, settings))
    _check(model, subjects, settings)
    described = {key: value for key, value in asdict(settings).items() if key not in AMOUNT + OF_FD}
    fingerprint = fingerprint_of({"model": model_fingerprint(model), **described}, model.autoencoder)
    outcomes, full_fd = _found(file, fingerprint, settings)
    calibration = calibration_of(settings.curve_settings())
    score = _scorer(settings)
    if score is not None and full_fd is None:
        if progress is not None:
            progress("full precision: drawing images", 0, 0)
        full_fd = score(model)
    measure, _ = measure_for(model, settings.measure)
    result = Sensitivity(subjects, outcomes, settings, name, fingerprint, measure, full_fd)
    paths: Paths | None = None
    total, done = len(subjects) * len(settings.precisions), 0
    for subject in subjects:
        for precision in settings.precisions:
            known = outcomes.get((subject.sites, precision))
            wanted = score if subject.level in settings.fd_levels else None
            if known is None or (wanted is not None and known.fd is None):
                plan = BitPlan.uniform(Precision.parse(precision), _named(model, subject.sites), "none")
                small = quantize(model, plan, settings.method, calibration=calibration)
                if known is None:
                    paths = paths or Paths(model, settings.curve_settings(), progress)
                    known = Outcome(tuple(paths.distortion(small).tolist()))
                if wanted is not None:
                    known = known._replace(fd=wanted(small))
                outcomes[subject.sites, precision] = known
                if file is not None:
                    result.save(file)
            done += 1
            if progress is not None:
                progress("quantizing parts alone", done, total)
    if file is not None:
        result.save(file)
    return result


def _named(model: ImageGenerator[Any], names: Sequence[str]) -> list[Site]:
    return [site for site in model.sites() if site.name in names]


def _check(model: ImageGenerator[Any], subjects: Sequence[Subject], settings: SensitivitySettings) -> None:
    """Raise one ValueError naming every site that cannot be quantized as the settings say."""
    sites = _named(model, [name for subject in subjects for name in subject.sites])
    plans = {text: BitPlan.uniform(Precision.parse(text), sites, "none") for text in settings.precisions}
    check_each(model, plans, settings.method)


def _found(
    file: Path | str | None, fingerprint: str, settings: SensitivitySettings
) -> tuple[dict[tuple[tuple[str, ...], str], Outcome], Mapping[str, float] | None]:
    """What a file has already. ValueError if it is of something else."""
    if file is None or not Path(file).exists():
        return {}, None
    before = Sensitivity.read(file)
    if before.fingerprint != fingerprint:
        raise ValueError(
            f"{file}: of another model ({before.model}) or other settings; remove it, or give another file"
        )
    if any(getattr(before.settings, name) != getattr(settings, name) for name in OF_FD):
        return {key: outcome._replace(fd=None) for key, outcome in before.outcomes.items()}, None
    return dict(before.outcomes), before.full_fd


def _scorer(settings: SensitivitySettings) -> Callable[[ImageGenerator[Any]], dict[str, float]] | None:
    """What gives the Fréchet distance of a model's images; None if none are wanted."""
    if not settings.fd_images:
        return None
    network = feature_network(settings.features)
    reference = load_reference(settings.reference, network)

    def score(model: ImageGenerator[Any]) -> dict[str, float]:
        fd = evaluate(
            model,
            reference,
            settings.fd_images,
            seed=settings.fd_seed,
            features=network,
            prompts=[str(label) for label in settings.labels],
            guidance=settings.guidance,
            **settings.sampling,
        )["fd"]
        return score_json(fd.value, fd.interval)

    return score


def subjects_of(model: ImageGenerator[Any], settings: SensitivitySettings) -> list[Subject]:
    """What of a model is quantized alone, level by level. ValueError if everything is protected."""
    sites = unprotected(model.sites(), settings.protect)
    if not sites:
        raise ValueError("all sites are protected: there is nothing to quantize")
    groups: dict[tuple[Level, str], list[Site]] = {}
    for site in sites:
        names: dict[Level, str] = {
            "all": "all",
            "kind": site.kind,
            "block": block_of(site),
            "layer": site.name,
            "cell": f"{block_of(site)} {site.kind}",
        }
        for level, name in names.items():
            groups.setdefault((level, name), []).append(site)
    kinds = list(dict.fromkeys(site.kind for site in sites))
    if len(kinds) > 1:
        for kind in kinds:
            groups["spared", kind] = [site for site in sites if site.kind != kind]
    found = []
    for level in dict.fromkeys(settings.levels):
        for (own, name), members in groups.items():
            if own == level:
                weights = sum(model.net.get_parameter(f"{site.name}.weight").numel() for site in members)
                found.append(Subject(level, name, tuple(site.name for site in members), weights))
    return found


def block_of(site: Site) -> str:
    """The block of a site in words: its number, or embed or head outside of the blocks."""
    return site.phase if site.block is None else str(site.block)


def plan_sparing(
    model: ImageGenerator[Any],
    precision: Precision | str,
    kinds: Sequence[str] = ("fc2",),
    protect: Protect = "first-last",
) -> BitPlan:
    """One precision for all sites but the protected ones and those of some kinds, which stay in 16 bits.

    LiteVAR's mixed precision (paper 002, section 4) is `kinds=("fc2",)`. ValueError for a kind the model has not.
    """
    if isinstance(precision, str):
        precision = Precision.parse(precision)
    rules = [protect] if isinstance(protect, str) else protect
    return BitPlan.uniform(precision, model.sites(), sites_of(model.sites(), "+".join([*rules, *kinds])))
