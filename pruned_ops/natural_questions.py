"""The import path that published model cards name. What it holds is defined in `pruned_ops.models`."""

from pruned_ops.models.heads import PrunedBertForNaturalQuestions as PrunedBertForNaturalQuestions
from pruned_ops.models.heads import PrunedRobertaForNaturalQuestions as PrunedRobertaForNaturalQuestions
from pruned_ops.models.heads import load_natural_questions as load_natural_questions
