"""Evaluation of explanations, whoever made them: faithfulness, question answering, localisation, cost.

Nothing here knows how relevance is made: a method is any `method(model, inputs, target) -> relevance`.
"""

from attnlrp.evaluation.answers import pointing
from attnlrp.evaluation.data import draw, read
from attnlrp.evaluation.experiment import Report, faithfulness, localise, question_answering
from attnlrp.evaluation.flipping import Curves, curves
from attnlrp.evaluation.image_data import Packed, read_image_records
from attnlrp.evaluation.localisation import locating
from attnlrp.evaluation.perturbation import Perturbation
from attnlrp.evaluation.pixels import PixelPerturbation
from attnlrp.evaluation.samples import Output, Sample, classified, extractive, image_classified, next_token, question
from attnlrp.evaluation.statistics import Difference, Mean, compare, mean

__all__ = [
    "Curves",
    "Difference",
    "Mean",
    "Output",
    "Packed",
    "Perturbation",
    "PixelPerturbation",
    "Report",
    "Sample",
    "classified",
    "compare",
    "curves",
    "draw",
    "extractive",
    "faithfulness",
    "image_classified",
    "localise",
    "locating",
    "mean",
    "next_token",
    "pointing",
    "question",
    "question_answering",
    "read",
    "read_image_records",
]
