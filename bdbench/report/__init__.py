"""The report: one page over all evaluations under a folder, for looking rather than reading."""
