"""Studies and their laws: from measured points to "this size at this precision for that many bits"."""

from bitlaw.scaling.budget import format_bits, parse_bits
from bitlaw.scaling.cells import Line, Measured
from bitlaw.scaling.claims import Best, Claim, LawChoice, Segment, pareto_front
from bitlaw.scaling.family_law import FamilyLaw
from bitlaw.scaling.laws import FORMS
from bitlaw.scaling.points import Point, points_of_records, read_points, write_points
from bitlaw.scaling.published import published_names
from bitlaw.scaling.study_fit import StudyFit, fit, recommend
from bitlaw.scaling.summary import fit_summary, recommend_summary

__all__ = [
    "FORMS",
    "Best",
    "Claim",
    "FamilyLaw",
    "LawChoice",
    "Line",
    "Measured",
    "Point",
    "Segment",
    "StudyFit",
    "fit",
    "fit_summary",
    "format_bits",
    "pareto_front",
    "parse_bits",
    "points_of_records",
    "published_names",
    "read_points",
    "recommend",
    "recommend_summary",
    "write_points",
]
