"""The paper's study repeated: its pieces of work, their records, and its part of the results page."""
