"""Evaluation of explanations, whoever made them: faithfulness by perturbation, question answering, cost.

Nothing here knows how relevance is made: a method is any `method(model, inputs, target) -> relevance`.
"""

from attnlrp.evaluation.answers import pointing
from attnlrp.evaluation.data import draw, read
from attnlrp.evaluation.experiment import Report, faithfulness, question_answering
from attnlrp.evaluation.flipping import Curves, curves
from attnlrp.evaluation.perturbation import Perturbation
from attnlrp.evaluation.samples import Output, Sample, classified, extractive, next_token, question
from attnlrp.evaluation.statistics import Difference, Mean, compare, mean

__all__ = [
    "Curves",
    "Difference",
    "Mean",
    "Output",
    "Perturbation",
    "Report",
    "Sample",
    "classified",
    "compare",
    "curves",
    "draw",
    "extractive",
    "faithfulness",
    "mean",
    "next_token",
    "pointing",
    "question",
    "question_answering",
    "read",
]
