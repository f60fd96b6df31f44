"""Published model cards import from here. The definitions are in `pruned_ops.models`."""

from pruned_ops.models.heads import PrunedBertForNaturalQuestions as PrunedBertForNaturalQuestions
from pruned_ops.models.heads import PrunedRobertaForNaturalQuestions as PrunedRobertaForNaturalQuestions
from pruned_ops.models.natural_questions import load_natural_questions as load_natural_questions
