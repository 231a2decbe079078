"""The training experiment: nets, one run, the plan of all, their record and what it says."""
