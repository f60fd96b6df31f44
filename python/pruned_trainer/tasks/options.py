"""The names of the tasks, and the default that the command line shows of them; imports nothing."""

TASKS = ("squad", "natural_questions")
# The share of the Natural Questions windows without an answer that the paper's own code trains on.
NULL_RATE = 0.02
